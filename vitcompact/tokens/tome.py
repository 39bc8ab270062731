"""ToMe: merge the most similar tokens of every block, pair by pair (Bolya et al., ICLR 2023,
arXiv 2210.09461). Written from the paper's equations; needs no training."""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from vitcompact.tokens.carry import Tokens, follow, identity_source, take


@dataclasses.dataclass(frozen=True)
class ToMe:
  """Tokens axis: between attention and FFN of every block, r tokens are merged into others.

  r: tokens a block loses, at most half of those that may merge; 0 changes nothing.
  schedule: "constant", or "decreasing": linearly from 2 r in the first block to 0 in the last.
  prop_attn: attention counts a token as many times as it has merged ones.
  order: "position", tokens stay in ascending position; "code", those at even positions come first,
    as in the authors' implementation.
  """
  r: int = 13
  schedule: str = "constant"
  prop_attn: bool = True
  order: str = "position"

  def __post_init__(self):
    if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 0:
      raise ValueError(f"ToMe(r={self.r!r}): must be a whole number of tokens, 0 or more")
    for field, allowed in (("schedule", ("constant", "decreasing")),
                           ("order", ("position", "code"))):
      if getattr(self, field) not in allowed:
        raise ValueError(f"ToMe({field}={getattr(self, field)!r}): must be one of {allowed}")

  def merged_in(self, block: int, depth: int) -> int:
    """How many tokens a block loses, if it has enough."""
    if self.schedule == "constant" or depth == 1:
      return self.r
    return int(2 * self.r - 2 * self.r * block / (depth - 1) + 1e-9)

  def after_attention(self, block: int, depth: int):
    """The reduction of this block, a function (tokens, query, key, prefix) -> tokens, or None."""
    r = self.merged_in(block, depth)
    return functools.partial(self.reduce, r) if r else None

  def reduce(self, r: int, tokens: Tokens, query_bnhd, key_bnhd, prefix: int) -> Tokens:
    """Tokens after attention, with the keys that it used (real heads, averaged)."""
    del query_bnhd
    batch, count, _ = tokens.x.shape
    r = min(r, (count - prefix) // 2)
    if not r:
      return tokens
    from_br, into_br = match(jax.lax.stop_gradient(key_bnhd.mean(axis=2)), r, prefix)
    rows = jnp.arange(batch)[:, None]
    size_bn = jnp.ones((batch, count)) if tokens.size is None else tokens.size
    sum_bnw = tokens.x.astype(jnp.float32) * size_bn[..., None]
    sum_bnw = sum_bnw.at[rows, into_br].add(take(sum_bnw, from_br))
    size_bn = size_bn.at[rows, into_br].add(take(size_bn, from_br))
    # Merged tokens go last, the others keep their order; then the last r are cut off.
    merged_bn = jnp.zeros((batch, count), jnp.int32).at[rows, from_br].set(2)
    side_n = (jnp.arange(count) % 2 if self.order == "code" else jnp.zeros(count)).astype(jnp.int32)
    order_bn = jnp.argsort(merged_bn + side_n[None], axis=1, stable=True)
    place_bn = jnp.zeros((batch, count), jnp.int32).at[rows, order_bn].set(
        jnp.arange(count, dtype=jnp.int32)[None])
    moved_bn = place_bn.at[rows, from_br].set(take(place_bn, into_br))
    kept_bk = order_bn[:, :count - r]
    size_bk = take(size_bn, kept_bk)
    x_bkw = (take(sum_bnw, kept_bk) / size_bk[..., None]).astype(tokens.x.dtype)
    return Tokens(x_bkw, size=size_bk, source=follow(identity_source(tokens), moved_bn),
                  proportional=self.prop_attn)


def match(metric_bnd, r: int, prefix: int):
  """Bipartite matching: the r best pairs (from, into), indices (B, r) each.

  Tokens at even positions each name their most similar one at an odd position; the r most similar
  pairs are taken. The first `prefix` tokens are in no pair.
  """
  metric_bnd = metric_bnd.astype(jnp.float32)
  metric_bnd /= jnp.linalg.norm(metric_bnd, axis=-1, keepdims=True)
  even, odd = metric_bnd[:, ::2], metric_bnd[:, 1::2]
  similar = jnp.einsum("bmd,bnd->bmn", even, odd)
  free = jnp.arange(metric_bnd.shape[1]) >= prefix
  similar = jnp.where((free[::2, None] & free[None, 1::2])[None], similar, -jnp.inf)
  best, partner = similar.max(axis=-1), similar.argmax(axis=-1)
  from_br = jax.lax.top_k(best, r)[1]
  return 2 * from_br, 2 * jnp.take_along_axis(partner, from_br, axis=1) + 1
