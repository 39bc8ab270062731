"""Asymmetric fast path: all tokens attend, but only a share takes the FFN (Rao et al., TPAMI 2023,
arXiv 2207.01580: DynamicViT for hierarchical models, there Swin and ConvNeXt)."""
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import token_state
from vitcompact.layers import apply_norm, batch_affine, dense, fold_into_linear
from vitcompact.methods import surgery
from vitcompact.methods.protocol import Site
from vitcompact.methods.tokens import predictor
from vitcompact.regression import low_rank, sums_of
from vitcompact.settings import weight
from vitcompact.token_state import Paths, Reduction, Tokens, take
from vitcompact.torch_names import Entry, linear, norm
from vitcompact.trees import Leaf

STEP = 0.2   # how much the share falls from one decision to the next


@dataclasses.dataclass(frozen=True)
class FastPath:
  """Tokens axis: x + FFN(norm x) for a share of the patches, x + linear(norm' x) for the others.

  A predictor before the s-th of `blocks` chooses int(share_s * patches) of all patches. These take
  the FFN in this block and in the following ones, up to the next predictor or the end of the stage.
  No token is dropped, so the method fits models whose tokens must stay on their grid. Prefix tokens
  always take the FFN.

  keep: the share of the first decision, in (0, 1]; each further share is lower by 0.2. Or a tuple
    of shares, one for each of `blocks`. 1 changes nothing, and has no predictor.
  blocks: numbered from 0 over all stages. The published choices are blocks 1, 2, 3 of a third stage
    with 6 blocks, which are the default in PVT-S and PVT v2-B2; and 2, 4, 6 or 3, 6, 9 of a deeper
    stage: (9, 11, 13) in PVT-M and PVT v2-B3, (14, 17, 20) in PVT-L and PVT v2-B4. In Next-ViT,
    name transformer blocks; each decides only for itself.

  Training computes both paths, and a straight-through Gumbel mask (rng "dropout") chooses; how many
  patches take the FFN is learned from the loss `kept_ratio`, as in DynamicViT. Given the same mask,
  training and inference compute the same function. (In the authors' code they do not: it also keeps
  the output of the path not taken, and a patch that changes paths continues with that.)
  PVT v2 has a convolution inside its FFN, for which patches on the fast path count as 0.
  """
  axis: ClassVar[str] = "tokens"
  provenance: ClassVar = ("arXiv 2207.01580",
                          "its use in PVT, PVT v2, Next-ViT and plain ViTs is ours")
  rules: ClassVar = [*predictor.RULES,
                     (r".*/fast_path/linear/kernel", Leaf(("embed", None), decay=True))]
  settings: ClassVar = {"loss.kept_ratio": weight()}
  collections: ClassVar = ("tokens",)

  keep: float | tuple[float, ...] = 0.7
  blocks: tuple[int, ...] = (8, 9, 10)

  def __post_init__(self):
    object.__setattr__(self, "blocks", token_state.checked_blocks("FastPath", self.blocks))
    if isinstance(self.keep, list):
      object.__setattr__(self, "keep", tuple(self.keep))
    shares = self.keep if isinstance(self.keep, tuple) else (self.keep,)
    for share in shares:
      token_state.check_keep("FastPath", share)
    if isinstance(self.keep, tuple) and len(shares) != len(self.blocks):
      raise ValueError(f"FastPath(keep={self.keep}, blocks={self.blocks}): keep must be one share "
                       f"for each of the {len(self.blocks)} blocks, or a number")
    if min(self.shares()) <= 0:
      raise ValueError(f"FastPath(keep={self.keep}, blocks={self.blocks}): the share falls by "
                       f"{STEP} from block to block, to {min(self.shares()):g}; give a larger "
                       "share, or one for each block, such as keep=(0.5, 0.4, 0.3)")

  def shares(self) -> tuple[float, ...]:
    """Returns the share of all patches that takes the FFN, as decided in each of `blocks`."""
    if isinstance(self.keep, tuple):
      return self.keep
    if self.keep == 1:
      return (1,) * len(self.blocks)
    # Rounded, because 0.7 - 0.2 is below 0.5.
    return tuple(round(self.keep - STEP * stage, 9) for stage in range(len(self.blocks)))

  def stage(self, block: int) -> int | None:
    """Returns the number of the decision that is valid in a block; None if there is none yet, or
    all patches take the FFN."""
    decided = [stage for stage, first in enumerate(self.blocks) if first <= block]
    return decided[-1] if decided and self.shares()[decided[-1]] < 1 else None

  @property
  def losses(self):
    shares = [share for share in self.shares() if share < 1]
    return {"kept_ratio": lambda forward: predictor.kept_ratio(
        predictor.stage_masks(forward.collections["tokens"]), shares)}

  def check_training(self, config):
    if config.loss.kept_ratio and min(self.shares()) == 1:
      raise ValueError("config.loss.kept_ratio is for FastPath with keep < 1; set it to 0")

  def acts(self, site: Site) -> bool:
    """Whether there is a valid decision, made about the same tokens."""
    stage = self.stage(site.block)
    return stage is not None and self.blocks[stage] >= site.first

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"paths": "name blocks with attention of a model such as DeiT, PVT, PVT v2 or Next-ViT"}

  def reduction(self, block: int, depth: int) -> Reduction:
    """Returns what happens in this block, if the method acts there."""
    del depth
    stage = self.stage(block)
    if stage is None:
      return token_state.NOTHING
    if block not in self.blocks:
      return Reduction(ffn=TwoPaths)
    return Reduction(predict=functools.partial(PredictPaths, stage, self.shares()[stage]),
                     ffn=TwoPaths)

  def from_dense(self, site: Site, params, stats, data):
    """Adds a freshly initialised predictor. The fast path starts with the FFN's norm; its linear
    layer is fresh, too, or with calibration images the best linear approximation of the FFN."""
    width = site.ffn_width
    if data is None:
      kernel = 0.02 * jax.random.normal(jax.random.key(site.block), (width, width))
      linear_params = {"kernel": kernel, "bias": jnp.zeros(width)}
    else:
      fit, _ = low_rank(data.sums(_ffn_sums), np.zeros((width, width)), width)
      data.note("tokens fast_path", fitted=fit.fitted, held_out=fit.held_out)
      linear_params = {"kernel": jnp.asarray(fit.a @ fit.b, jnp.float32),
             "bias": jnp.asarray(fit.bias, jnp.float32)}
    # Copied, because a training step donates the buffer of each leaf.
    norm_params = jax.tree.map(jnp.array, params["norm2"])
    if site.batch_norm:
      stats = {**stats, "fast_path": {"norm": jax.tree.map(jnp.array, stats["norm2"])}}
    new = surgery.fresh_predictor(self.reduction(site.block, site.depth), site.width)
    return {**params, **new, "fast_path": {"norm": norm_params, "linear": linear_params}}, stats

  def fold(self, site: Site, params, stats):
    """Folds a batch norm into the linear layer after it."""
    if not site.batch_norm:
      return params, stats
    fast_path = params["fast_path"]
    affine = batch_affine(fast_path["norm"], stats["fast_path"]["norm"])
    params = {**params, "fast_path": {"linear": fold_into_linear(fast_path["linear"], *affine)}}
    return params, {name: leaf for name, leaf in stats.items() if name != "fast_path"}

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries under the authors' names for Swin; predictors are numbered as theirs."""
    theirs, path = f"{torch}.fastmlp.fc1", f"{ours}/fast_path"
    entries = linear(f"{theirs}.1", f"{path}/linear")
    if not (site.batch_norm and site.deploy):
      entries += norm(f"{theirs}.0", f"{path}/norm", running=site.batch_norm)
    if site.block in self.blocks:
      entries += predictor.torch_entries(self.stage(site.block), ours)
    return entries


def _ffn_sums(seen):
  """Returns sums for the regression of the FFN's target output on its normed input."""
  return sums_of(seen.inputs, seen.target_ffn, seen.step)


class PredictPaths(nn.Module):
  """Scores patches by their own features and the mean of all; decides which ones take the FFN.

  stage: the number of this predictor in the model, from 0. share: of the patches.
  """
  stage: int
  share: float
  dtype: str = "float32"

  @nn.compact
  def __call__(self, tokens: Tokens, prefix: int, train: bool = False) -> Tokens:
    patches_bpw = tokens.x[:, prefix:]
    batch, patches, _ = patches_bpw.shape
    choice_bp2 = predictor.log_choices(self, patches_bpw, jnp.ones((batch, patches)))
    if train:
      keep_bp = predictor.straight_through(self.make_rng("dropout"), choice_bp2)
      first_bp = jnp.ones((batch, prefix), keep_bp.dtype)
      paths = Paths(mask=jnp.concatenate([first_bp, keep_bp], axis=1))
    else:
      count = prefix + predictor.budget(self.share, patches)
      # The prefix first, then patches by score; ties go to the first.
      score_bn = jnp.pad(choice_bp2[..., 0], [(0, 0), (prefix, 0)], constant_values=jnp.inf)
      order_bn = jnp.argsort(-score_bn, axis=1, stable=True).astype(jnp.int32)
      place_bn = jnp.argsort(order_bn, axis=1).astype(jnp.int32)
      paths = Paths(order_bn[:, :count], order_bn[:, count:], place_bn)
      keep_bp = (place_bn[:, prefix:] < count).astype(jnp.float32)
    if not self.is_initializing():
      self.sow("tokens", "keep_mask", keep_bp)
    return tokens.replace(paths=paths)


class TwoPaths(nn.Module):
  """The FFN branch of a block: full(x) for some tokens, linear(norm x) for the others.

  norm: of the block's kind; None: it is folded into the linear layer.
  """
  norm: nn.Module | None
  dtype: str = "float32"

  @nn.compact
  def __call__(self, full: Callable, x_bnw, paths: Paths, train: bool = False):
    linear = dense(x_bnw.shape[-1], dtype=self.dtype).clone(name="linear", parent=self)

    def short(x):
      return linear(apply_norm(self.norm, x, train))

    if paths.mask is not None:
      mask_bn1 = paths.mask[..., None].astype(x_bnw.dtype)
      full_bnw = full(x_bnw, train, lambda mixer, hidden_bnm: mixer(hidden_bnm * mask_bn1))
      return mask_bn1 * full_bnw + (1 - mask_bn1) * short(x_bnw)
    y_bkw = full(take(x_bnw, paths.full), train,
                 lambda mixer, hidden_bkm: mixer(hidden_bkm, paths.full))
    # Rows are in the order of the decision, and gathered back to their places.
    return take(jnp.concatenate([y_bkw, short(take(x_bnw, paths.short))], axis=1), paths.place)
