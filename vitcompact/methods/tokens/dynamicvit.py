"""DynamicViT: small predictors tell which patches go on (Rao et al., NeurIPS 2021,
arXiv 2106.02034)."""
import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import token_state
from vitcompact.layers import LayerNorm, dense, gelu
from vitcompact.methods import surgery
from vitcompact.methods.protocol import Site
from vitcompact.settings import weight
from vitcompact.token_state import Reduction, Tokens
from vitcompact.torch_names import Entry, linear, norm
from vitcompact.trees import Leaf

EPSILON = 1e-5   # of the predictor's LayerNorm


def kept_ratio(keep_masks, shares) -> jax.Array:
  """Mean over stages s of (mean_i keep^s_i - shares_s)^2: (B,).

  keep_masks: a list with (B, P) of each stage, 1 where a patch is kept; shares:
  `DynamicViT.shares()`.
  """
  squares = [(jnp.mean(keep_bp, axis=1) - share) ** 2
             for keep_bp, share in zip(keep_masks, shares, strict=True)]
  return sum(squares) / len(squares)


def stage_masks(tokens) -> list[jax.Array]:
  """Of the collection "tokens": (B, P) for each stage, which patches it kept."""
  found = {int(name.removeprefix("blocks_")): block["predict_tokens"]["keep_mask"][0]
           for name, block in tokens.items() if name.startswith("blocks_")
           and "predict_tokens" in block}
  return [found[block] for block in sorted(found)]


@dataclasses.dataclass(frozen=True)
class DynamicViT:
  """Tokens axis: a predictor before the s-th of `blocks` keeps int(patches * keep^s) patches.

  keep: in (0, 1]; 1 changes nothing, and has no predictors. blocks: numbered from 0.

  In inference the other patches are gone. In training every token stays, those dropped are hidden
  from the others by a straight-through Gumbel mask (rng "dropout"), and how many are is for the
  loss to teach: `kept_ratio`, on the masks sown as blocks_{i}/predict_tokens/keep_mask in "tokens".
  Filters of hallucinated heads thus meet dropped neighbours in training only.
  """
  axis: ClassVar[str] = "tokens"
  rules: ClassVar = [
      (r".*/predict_tokens/(in_proj|out\d)/kernel", Leaf(("embed", None), decay=True))]
  settings: ClassVar = {"loss.kept_ratio": weight()}
  collections: ClassVar = ("tokens",)

  keep: float = 0.7
  blocks: tuple[int, ...] = (3, 6, 9)

  def __post_init__(self):
    token_state.check_keep("DynamicViT", self.keep)
    object.__setattr__(self, "blocks", token_state.checked_blocks("DynamicViT", self.blocks))

  def shares(self) -> tuple[float, ...]:
    """The share of all patches that each of `blocks` is to keep."""
    return tuple(self.keep ** stage for stage in range(1, len(self.blocks) + 1))

  @property
  def losses(self):
    return {"kept_ratio": lambda seen: kept_ratio(stage_masks(seen.collections["tokens"]),
                                                  self.shares())}

  def check_training(self, config):
    if config.loss.kept_ratio and self.keep == 1:
      raise ValueError("config.loss.kept_ratio is for DynamicViT with keep < 1; set it to 0")

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"free tokens": "token reducers are for isotropic models such as DeiT and LV-ViT"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("grid",)

  def from_dense(self, site: Site, params, stats, data):
    """A freshly drawn predictor, each stage's another."""
    del data
    new = surgery.fresh_predictor(self.reduction(site.block, site.depth), site.width)
    return {**params, **new}, stats

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Predictors are numbered, as the authors do."""
    if self.reduction(site.block, site.depth).predict is None:
      return []
    torch, ours = f"score_predictor.{self.blocks.index(site.block)}", f"{ours}/predict_tokens"
    return [*norm(f"{torch}.in_conv.0", f"{ours}/norm"),
            *linear(f"{torch}.in_conv.1", f"{ours}/in_proj"),
            *linear(f"{torch}.out_conv.0", f"{ours}/out1"),
            *linear(f"{torch}.out_conv.2", f"{ours}/out2"),
            *linear(f"{torch}.out_conv.4", f"{ours}/out3")]

  def reduction(self, block: int, depth: int) -> Reduction:
    """What happens in this block."""
    del depth
    if block not in self.blocks or self.keep == 1:
      return token_state.NOTHING
    stage = self.blocks.index(block)
    return Reduction(predict=functools.partial(PredictTokens, stage, self.shares()[stage]))


class PredictTokens(nn.Module):
  """Scores patches from their own features and the mean of those kept; keeps a share of all.

  stage: which predictor of the model this is, from 0. share: of the patches at the start.
  """
  stage: int
  share: float
  dtype: str = "float32"

  @nn.compact
  def __call__(self, tokens: Tokens, prefix: int, train: bool = False) -> Tokens:
    x_bpw = tokens.x[:, prefix:]
    width = x_bpw.shape[-1]
    keep_bp = token_state.kept_patches(tokens, prefix)

    def layer(features, name):
      return dense(features, dtype=self.dtype).clone(name=name, parent=self)

    x_bpw = LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x_bpw)
    x_bpw = with_mean(gelu(layer(width, "in_proj")(x_bpw)), keep_bp)
    x_bpw = gelu(layer(width // 2, "out1")(x_bpw))
    x_bpw = gelu(layer(width // 4, "out2")(x_bpw))
    # (keep, drop) for each patch.
    choice_bp2 = jax.nn.log_softmax(layer(2, "out3")(x_bpw).astype(jnp.float32))
    if not train:
      patches = token_state.identity_source(tokens).shape[1] - prefix
      count = max(1, int(patches * self.share + 1e-9))
      return token_state.keep_best(tokens, choice_bp2[..., 0], count, prefix)
    keep_bp = keep_bp * straight_through(self.make_rng("dropout"), choice_bp2)
    if not self.is_initializing():
      self.sow("tokens", "keep_mask", keep_bp)
    first_bp = jnp.ones((keep_bp.shape[0], prefix))
    return tokens.replace(keep_mask=jnp.concatenate([first_bp, keep_bp], axis=1))


def with_mean(x_bpw, keep_bp):
  """The second half of the features becomes its mean over the kept patches: (B, P, width)."""
  local, rest = jnp.split(x_bpw, [x_bpw.shape[-1] // 2], axis=-1)
  keep_bp1 = keep_bp[..., None].astype(x_bpw.dtype)
  # No kept patch is no reason for a NaN.
  mean = (rest * keep_bp1).sum(1, keepdims=True) / jnp.maximum(keep_bp1.sum(1, keepdims=True), 1)
  return jnp.concatenate([local, jnp.broadcast_to(mean, rest.shape)], axis=-1)


def straight_through(key, choice_bp2):
  """Draws 1 (keep) or 0 from log probabilities (B, P, 2); the gradient is a Gumbel softmax's."""
  soft = jax.nn.softmax(choice_bp2 + jax.random.gumbel(key, choice_bp2.shape))[..., 0]
  hard = (soft >= 0.5).astype(soft.dtype)
  return hard + (soft - jax.lax.stop_gradient(soft))
