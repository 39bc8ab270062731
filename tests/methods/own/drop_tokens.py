"""Tokens axis: patches of small norm are dropped."""
import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from vitcompact import token_state
from vitcompact.token_state import Reduction


@dataclasses.dataclass(frozen=True)
class KeepLargest:
  """After each of `blocks`, keeps the share `keep` of the patches, those with the largest norms."""
  axis: ClassVar = "tokens"
  keep: float = 0.7
  blocks: tuple[int, ...] = (3, 6, 9)

  def needs(self, site):
    return {"free tokens": "use tokens=None"}

  def removes(self, site):
    return ("grid",)

  def reduction(self, block, depth):
    return Reduction(after_block=self.reduce) if block in self.blocks else token_state.NOTHING

  def reduce(self, tokens, query, key, prefix):
    norm_bp = jnp.linalg.norm(tokens.x[:, prefix:], axis=-1)
    return token_state.keep_best(tokens, norm_bp, math.ceil(self.keep * norm_bp.shape[1]), prefix)
