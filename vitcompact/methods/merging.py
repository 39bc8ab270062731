"""Merging of tokens: decided once as a `Merge`, then applied to every array of the tokens."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitcompact.token_state import take


class Merge(NamedTuple):
  """A merge of N tokens into K of them.

  pairs: [(from (B, r), into (B, r)), ...], old indices; the merges are applied one after the other.
  kept: (B, K), old indices of the remaining tokens, in their new order.
  moved: (B, N), the new index of the token that holds each old one.
  """
  pairs: tuple[tuple[jax.Array, jax.Array], ...]
  kept: jax.Array
  moved: jax.Array

  def total(self, array_bn):
    """Sums over the tokens that each remaining token holds: (B, N, ...) -> (B, K, ...)."""
    rows = jnp.arange(array_bn.shape[0])[:, None]
    for from_br, into_br in self.pairs:
      array_bn = array_bn.at[rows, into_br].add(take(array_bn, from_br))
    return take(array_bn, self.kept)

  def largest(self, array_bn):
    """Takes the maximum instead of the sum of `total`."""
    rows = jnp.arange(array_bn.shape[0])[:, None]
    for from_br, into_br in self.pairs:
      array_bn = array_bn.at[rows, into_br].max(take(array_bn, from_br))
    return take(array_bn, self.kept)

  def mean(self, array_bn, weight_bn):
    """Takes the mean, weighted by (B, N), instead of the sum of `total`; computed in float32."""
    ones = (1,) * (array_bn.ndim - 2)
    weighted_bn = array_bn.astype(jnp.float32) * weight_bn.reshape(*weight_bn.shape, *ones)
    total_bk = self.total(weight_bn)
    mean_bk = self.total(weighted_bn) / total_bk.reshape(*total_bk.shape, *ones)
    return mean_bk.astype(array_bn.dtype)


def merge_of(pairs, rank_bn) -> Merge:
  """Makes the Merge of these pairs; the remaining tokens are sorted by rank (B, N), int, stable."""
  batch, count = rank_bn.shape
  index_bn = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
  holder_bn = index_bn
  for from_br, into_br in pairs:   # comparisons, because a scatter takes far longer to compile
    leaves_bnr = holder_bn[:, :, None] == from_br[:, None, :]
    target_bn = jnp.where(leaves_bnr, into_br[:, None, :], 0).sum(axis=2, dtype=jnp.int32)
    holder_bn = jnp.where(leaves_bnr.any(axis=2), target_bn, holder_bn)
  # Merged tokens are sorted last, and cut off.
  last = jnp.iinfo(jnp.int32).max
  order_bn = jnp.argsort(jnp.where(holder_bn == index_bn, rank_bn, last), axis=1, stable=True)
  place_bn = jnp.argsort(order_bn, axis=1)
  kept = count - sum(from_br.shape[1] for from_br, _ in pairs)
  return Merge(tuple(pairs), order_bn[:, :kept], take(place_bn, holder_bn))


def even_first(count: int, prefix: int):
  """Returns ranks (count,) that sort the prefix first, then even positions, then odd ones."""
  index = jnp.arange(count)
  return jnp.where(index < prefix, index, index + count * (1 + index % 2))


def cosines(metric_bnd):
  """Returns (B, even, odd) cosines between tokens at even and at odd positions, in float32."""
  metric_bnd = metric_bnd.astype(jnp.float32)
  norm = jnp.linalg.norm(metric_bnd, axis=-1, keepdims=True)
  metric_bnd = metric_bnd / jnp.maximum(norm, 1e-12)
  return jnp.einsum("bmd,bnd->bmn", metric_bnd[:, ::2], metric_bnd[:, 1::2])


def exclude_ends(weight_bmn, prefix: int, last: int = 0):
  """Sets pairs (even, odd) that contain one of the first `prefix` or last `last` tokens to -inf."""
  _, evens, odds = weight_bmn.shape
  free = jnp.arange(evens + odds) >= prefix
  if last:
    free = free.at[-last:].set(False)
  return jnp.where((free[::2, None] & free[None, 1::2])[None], weight_bmn, -jnp.inf)


def match(metric_bnd, r: int, prefix: int, last: int = 0):
  """Matches tokens in two groups; returns the r best pairs (from, into), indices (B, r) each.

  Each token at an even position is paired with the most similar one at an odd position, and the r
  most similar pairs are taken. The first `prefix` and the last `last` tokens are in no pair.
  """
  row_br, column_br = best_rows(exclude_ends(cosines(metric_bnd), prefix, last), r)
  return 2 * row_br, 2 * column_br + 1


def best_rows(weight_bmn, r: int):
  """Returns the r rows of largest maximum, and the column of each maximum: (B, r), (B, r)."""
  row_br = jax.lax.top_k(weight_bmn.max(axis=-1), r)[1]
  return row_br, jnp.take_along_axis(weight_bmn.argmax(axis=-1), row_br, axis=1)
