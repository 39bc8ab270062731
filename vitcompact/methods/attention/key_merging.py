"""Key merging: keeps all queries, and merges similar keys and their values (ours, after ToMe: Bolya
et al., ICLR 2023, arXiv 2210.09461).

With k_j, v_j the means of keys and values of s_j tokens each,

    out_i = sum_j softmax_j(q_i . k_j / sqrt(d) + log s_j) v_j,

which equals dense attention if all members of a mean are equal. No token is lost, so it fits models
whose tokens must stay on their grid. It needs no training.
"""
import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.attention import Core, tuning
from vitcompact.methods.merging import match, merge_of
from vitcompact.methods.protocol import Site


@dataclasses.dataclass(frozen=True)
class KeyMerging:
  """Attention axis: each query is scored against a share `keep` of the keys, by merging keys.

  keep: in [0.5, 1]; of M keys, floor((1 - keep) M) are merged into others, chosen by a bipartite
    matching on the cosines of keys (mean over the real heads); 1 changes nothing. Prefix tokens and
    EViT's fused remainder are not merged, and not counted.
  min_tokens: blocks of the network with fewer keys stay dense; None: the measured crossover.

  A hallucinated head's filters act on the map over all keys, in which the members of a mean share
  its attention. Nothing is merged while DynamicViT trains, which then only hides dropped tokens.
  """
  axis: ClassVar[str] = "attention"
  provenance: ClassVar = ("the matching of ToMe, arXiv 2210.09461",
                          "merging keys and values but not queries is ours")

  keep: float = 0.5
  min_tokens: int | None = None

  def __post_init__(self):
    number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
    if not number or not 0.5 <= self.keep <= 1:
      raise ValueError(f"KeyMerging(keep={self.keep!r}): must be a share of the keys in [0.5, 1]; "
                       "a matching merges at most half of them")
    is_int = isinstance(self.min_tokens, int) and not isinstance(self.min_tokens, bool)
    if self.min_tokens is not None and not (is_int and self.min_tokens >= 0):
      raise ValueError(f"KeyMerging(min_tokens={self.min_tokens!r}): must be a whole number of "
                       "tokens, 0 or more, or None")

  @property
  def token_threshold(self) -> int:
    """`min_tokens`, with None replaced by its default."""
    return tuning.MERGE_MIN_TOKENS if self.min_tokens is None else self.min_tokens

  def merged_count(self, keys: int) -> int:
    """Returns how many of `keys` mergeable keys are merged into others."""
    return min(int((1 - self.keep) * keys + 1e-9), keys // 2)

  def acts(self, site: Site) -> bool:
    return (site.tokens_left >= self.token_threshold and
            self.merged_count(site.tokens_left - site.prefix) > 0)

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"softmax": "use attention=None there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return "full attention", "all scores"

  @classmethod
  def options(cls, site: Site) -> list["KeyMerging"]:
    """Returns keep=0.5 and keep=0.75, if that is faster than dense attention here."""
    return [method for method in (cls(keep=0.5), cls(keep=0.75)) if method.acts(site)]

  def make(self, site: Site, **kwargs) -> nn.Module:
    return MergeKeys(self, site.prefix, **kwargs)


class MergeKeys(nn.Module):
  """Adds the merging of keys to the attention of a block; has no parameters."""
  spec: KeyMerging
  prefix: int

  def __call__(self, core: Core, query_bnfd, key_bmfd, source_bs=None, fused: bool = False) -> Core:
    """Returns `core` over merged keys. source_bs, fused: as in `token_state.Tokens`."""
    del query_bnfd, source_bs
    batch, count = key_bmfd.shape[:2]
    r = self.spec.merged_count(count - self.prefix - fused)
    if not r or core.keep_mask is not None:
      return core
    pair = match(jax.lax.stop_gradient(key_bmfd.mean(axis=2)), r, self.prefix, int(fused))
    merge = merge_of([pair], jnp.broadcast_to(jnp.arange(count), (batch, count)))
    size_bm = jnp.ones((batch, count)) if core.size is None else core.size
    return core._replace(merge=lambda x_bm: merge.mean(x_bm, size_bm), size=merge.total(size_bm))
