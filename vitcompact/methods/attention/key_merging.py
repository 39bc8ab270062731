"""Key merging: the queries stay, similar keys and their values become one (ours, after ToMe: Bolya
et al., ICLR 2023, arXiv 2210.09461).

With keys and values the means k_j, v_j of s_j tokens each,

    out_i = sum_j softmax_j(q_i . k_j / sqrt(d) + log s_j) v_j,

which is dense attention where the members of each mean are equal. No token is lost: it fits models
whose tokens must stay on their grid, and needs no training.
"""
import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.attention import Core, tuning
from vitcompact.methods.merging import match, merging
from vitcompact.methods.protocol import Site


@dataclasses.dataclass(frozen=True)
class KeyMerging:
  """Attention axis: each query is scored against means of keys, a share `keep` as many as keys.

  keep: in [0.5, 1]; of M keys floor((1 - keep) M) are merged into others, those that a bipartite
    matching by the cosines of keys (mean over the real heads) finds most alike; 1 changes nothing.
    Prefix tokens, and a remainder that EViT fused, are merged with none, and not counted.
  min_tokens: blocks of the network with fewer keys stay dense; None: the measured crossover.

  A hallucinated head's filters act on the map over all keys, in which members of a mean share its
  attention. While DynamicViT trains, which hides tokens where it will drop them, none are merged.
  """
  axis: ClassVar[str] = "attention"

  keep: float = 0.5
  min_tokens: int | None = None

  def __post_init__(self):
    number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
    if not number or not 0.5 <= self.keep <= 1:
      raise ValueError(f"KeyMerging(keep={self.keep!r}): must be a share of the keys in [0.5, 1]; "
                       "a matching merges at most half of them")
    whole = isinstance(self.min_tokens, int) and not isinstance(self.min_tokens, bool)
    if self.min_tokens is not None and not (whole and self.min_tokens >= 0):
      raise ValueError(f"KeyMerging(min_tokens={self.min_tokens!r}): must be a whole number of "
                       "tokens, 0 or more, or None")

  @property
  def least_tokens(self) -> int:
    """`min_tokens`, resolved."""
    return tuning.MERGE_MIN_TOKENS if self.min_tokens is None else self.min_tokens

  def merged_of(self, keys: int) -> int:
    """How many of a number of keys that may merge are merged into others."""
    return min(int((1 - self.keep) * keys + 1e-9), keys // 2)

  def acts(self, site: Site) -> bool:
    return (site.tokens_left >= self.least_tokens and
            self.merged_of(site.tokens_left - site.prefix) > 0)

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"softmax": "use attention=None there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return "full attention", "all scores"

  @classmethod
  def options(cls, site: Site) -> list["KeyMerging"]:
    """Half and three quarters of the keys, where that is faster than dense attention."""
    return [method for method in (cls(keep=0.5), cls(keep=0.75)) if method.acts(site)]

  def make(self, site: Site, **kwargs) -> nn.Module:
    return MergeKeys(self, site.prefix, **kwargs)


class MergeKeys(nn.Module):
  """Gives the attention of a call its means of keys; without parameters."""
  spec: KeyMerging
  prefix: int

  def __call__(self, core: Core, query_bnfd, key_bmfd, source_bs=None, fused: bool = False) -> Core:
    """`core` over merged keys. source_bs, fused: as in `tokens.token_state.Tokens`."""
    del query_bnfd, source_bs
    batch, count = key_bmfd.shape[:2]
    r = self.spec.merged_of(count - self.prefix - fused)
    if not r or core.keep_mask is not None:
      return core
    pair = match(jax.lax.stop_gradient(key_bmfd.mean(axis=2)), r, self.prefix, int(fused))
    merge = merging([pair], jnp.broadcast_to(jnp.arange(count), (batch, count)))
    size_bm = jnp.ones((batch, count)) if core.size is None else core.size
    return core._replace(merge=lambda x_bm: merge.mean(x_bm, size_bm), size=merge.total(size_bm))
