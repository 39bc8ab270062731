"""ToMe: merge pairs of the most similar tokens in every block (Bolya et al., ICLR 2023,
arXiv 2210.09461). Written from the paper's equations; needs no training."""
import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from vitcompact import token_state
from vitcompact.methods.merging import even_first, match, merge_of
from vitcompact.methods.protocol import Site
from vitcompact.token_state import Reduction, Tokens


@dataclasses.dataclass(frozen=True)
class ToMe:
  """Tokens axis: between attention and FFN of every block, r tokens are merged into others.

  r: number of tokens that a block removes, at most half of the mergeable ones; 0 changes nothing.
  schedule: "constant", or "decreasing": linearly from 2 r in the first block to 0 in the last.
  prop_attn: attention counts a token as many times as the number of source tokens that it holds.
  order: "position" keeps tokens in ascending position; "code" puts even positions first, as in the
    authors' implementation.
  """
  axis: ClassVar[str] = "tokens"
  provenance: ClassVar = ("arXiv 2210.09461, written from the equations",
                          "keeping tokens in the order of their positions is ours")

  r: int = 13
  schedule: str = "constant"
  prop_attn: bool = True
  order: str = "position"

  def __post_init__(self):
    if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 0:
      raise ValueError(f"ToMe(r={self.r!r}): must be a whole number of tokens, 0 or more")
    if not isinstance(self.prop_attn, bool):
      raise ValueError(f"ToMe(prop_attn={self.prop_attn!r}): must be True or False")
    for field, allowed in (("schedule", ("constant", "decreasing")),
                           ("order", ("position", "code"))):
      if getattr(self, field) not in allowed:
        raise ValueError(f"ToMe({field}={getattr(self, field)!r}): must be one of {allowed}")

  def merged_in(self, block: int, depth: int) -> int:
    """Returns how many tokens a block removes, if it has enough."""
    if self.schedule == "constant" or depth == 1:
      return self.r
    return int(2 * self.r - 2 * self.r * block / (depth - 1) + 1e-9)

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"free tokens": "token reducers are for isotropic models such as DeiT and LV-ViT"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("grid",) if self.order == "position" else ("grid", "token order")

  @classmethod
  def options(cls, site: Site) -> list["ToMe"]:
    """Returns constant numbers per block that leave 3/4, 1/2 or 1/4 of the patches."""
    patches = site.tokens - site.prefix
    per_block = {round(patches * share / site.depth) for share in (0.25, 0.5, 0.75)}
    return [cls(r=r) for r in sorted(per_block - {0})]

  def reduction(self, block: int, depth: int) -> Reduction:
    """Returns what happens in this block."""
    r = self.merged_in(block, depth)
    if not r:
      return token_state.NOTHING
    return Reduction(after_attention=functools.partial(self.reduce, r))

  def reduce(self, r: int, tokens: Tokens, query_bnhd, key_bnhd, prefix: int) -> Tokens:
    """Merges tokens after attention, given the keys that it used (real heads, averaged)."""
    del query_bnhd
    batch, count, _ = tokens.x.shape
    r = min(r, (count - prefix) // 2)
    if not r:
      return tokens
    pair = match(jax.lax.stop_gradient(key_bnhd.mean(axis=2)), r, prefix)
    rank_n = even_first(count, prefix) if self.order == "code" else jnp.arange(count)
    merge = merge_of([pair], jnp.broadcast_to(rank_n, (batch, count)))
    size_bn = jnp.ones((batch, count)) if tokens.size is None else tokens.size
    return Tokens(merge.mean(tokens.x, size_bn), size=merge.total(size_bn),
                  source=token_state.follow(token_state.identity_source(tokens), merge.moved),
                  proportional=self.prop_attn)
