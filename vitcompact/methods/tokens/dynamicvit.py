"""DynamicViT: small predictors choose the patches to keep (Rao et al., NeurIPS 2021,
arXiv 2106.02034)."""
import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vitcompact import token_state
from vitcompact.methods import surgery
from vitcompact.methods.protocol import Site
from vitcompact.methods.tokens import predictor
from vitcompact.settings import weight
from vitcompact.token_state import Reduction, Tokens
from vitcompact.torch_names import Entry


@dataclasses.dataclass(frozen=True)
class DynamicViT:
  """Tokens axis: a predictor before the s-th of `blocks` keeps int(patches * keep^s) patches.

  keep: in (0, 1]; 1 changes nothing, and has no predictors. blocks: numbered from 0.

  Inference removes the other patches. Training keeps every token, and a straight-through Gumbel
  mask (rng "dropout") hides dropped tokens from the others. How many are dropped is learned from
  the loss `kept_ratio`, on the masks sown as blocks_{i}/predict_tokens/keep_mask in "tokens". In
  training, unlike in inference, the filters of hallucinated heads still see dropped neighbours.
  """
  axis: ClassVar[str] = "tokens"
  provenance: ClassVar = ("arXiv 2106.02034", "how it combines with other methods is ours")
  rules: ClassVar = predictor.RULES
  settings: ClassVar = {"loss.kept_ratio": weight()}
  collections: ClassVar = ("tokens",)

  keep: float = 0.7
  blocks: tuple[int, ...] = (3, 6, 9)

  def __post_init__(self):
    token_state.check_keep("DynamicViT", self.keep)
    object.__setattr__(self, "blocks", token_state.checked_blocks("DynamicViT", self.blocks))

  def shares(self) -> tuple[float, ...]:
    """Returns the share of all patches that each of `blocks` should keep."""
    return tuple(self.keep ** stage for stage in range(1, len(self.blocks) + 1))

  @property
  def losses(self):
    return {"kept_ratio": lambda forward: predictor.kept_ratio(
        predictor.stage_masks(forward.collections["tokens"]), self.shares())}

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
    """Adds a freshly initialised predictor, a different one in each stage."""
    del data
    new = surgery.fresh_predictor(self.reduction(site.block, site.depth), site.width)
    return {**params, **new}, stats

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries of the predictor, numbered as the authors do."""
    del torch
    if self.reduction(site.block, site.depth).predict is None:
      return []
    return predictor.torch_entries(self.blocks.index(site.block), ours)

  def reduction(self, block: int, depth: int) -> Reduction:
    """Returns what happens in this block."""
    del depth
    if block not in self.blocks or self.keep == 1:
      return token_state.NOTHING
    stage = self.blocks.index(block)
    return Reduction(predict=functools.partial(PredictTokens, stage, self.shares()[stage]))


class PredictTokens(nn.Module):
  """Scores patches by their own features and the mean of the kept ones; keeps a share of them.

  stage: the number of this predictor in the model, from 0. share: of the source patches.
  """
  stage: int
  share: float
  dtype: str = "float32"

  @nn.compact
  def __call__(self, tokens: Tokens, prefix: int, train: bool = False) -> Tokens:
    keep_bp = token_state.kept_patches(tokens, prefix)
    choice_bp2 = predictor.log_choices(self, tokens.x[:, prefix:], keep_bp)
    if not train:
      patches = token_state.identity_source(tokens).shape[1] - prefix
      count = predictor.budget(self.share, patches)
      return token_state.keep_best(tokens, choice_bp2[..., 0], count, prefix)
    keep_bp = keep_bp * predictor.straight_through(self.make_rng("dropout"), choice_bp2)
    if not self.is_initializing():
      self.sow("tokens", "keep_mask", keep_bp)
    first_bp = jnp.ones((keep_bp.shape[0], prefix))
    return tokens.replace(keep_mask=jnp.concatenate([first_bp, keep_bp], axis=1))
