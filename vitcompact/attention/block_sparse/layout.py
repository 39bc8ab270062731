"""Block-sparse attention: each block of queries attends to the blocks of keys chosen for it.

Only the chosen pairs of blocks are computed, and memory is linear in the number of tokens.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitcompact import kernels
from vitcompact.attention.block_sparse import heads, kernel, plain
from vitcompact.attention.block_sparse.windows import Windows
from vitcompact.attention.choice import for_layout
from vitcompact.attention.device import current, requested_form


class BlockLayout(NamedTuple):
  """Which blocks of keys each block of queries attends to, for one call of attention.

  chosen: (B, f, q, s) int32, s different blocks of keys for each of q blocks of queries and head.
  order: (B, n) or None: the order in which tokens are cut into blocks.
  prefix, fused: how many tokens at the start and at the end are in no block: they attend to all
    tokens, and all attend to them.
  """
  chosen: jax.Array
  queries: Windows
  keys: Windows
  order: jax.Array | None = None
  prefix: int = 0
  fused: int = 0

  def of_heads(self, start: int, stop: int) -> "BlockLayout":
    return self._replace(chosen=self.chosen[:, start:stop])

  def inner(self, x_bn):
    """Returns the tokens in blocks, in the order of the blocks."""
    x_bn = x_bn[:, self.prefix:x_bn.shape[1] - self.fused]
    return x_bn if self.order is None else _take(x_bn, self.order)

  def outer(self, x_bn):
    """Returns the tokens outside the blocks."""
    if not self.fused:
      return x_bn[:, :self.prefix]
    return jnp.concatenate([x_bn[:, :self.prefix], x_bn[:, -self.fused:]], axis=1)

  def split(self, windows, x_bnfd):
    """Splits tokens into those in blocks, (B, f, k, c, d), and those outside, (B, o, f, d)."""
    return windows.cut(self.inner(x_bnfd)), self.outer(x_bnfd)

  def join(self, windows, blocks_bfkcd, outer_bofd):
    """Inverse of `split`: (B, N, f, d)."""
    inner_bnfd = windows.join(blocks_bfkcd)
    if self.order is not None:
      inner_bnfd = _take(inner_bnfd, jnp.argsort(self.order, axis=1))
    return jnp.concatenate([outer_bofd[:, :self.prefix], inner_bnfd, outer_bofd[:, self.prefix:]],
                           axis=1)

  def means(self, windows, x_bnfd):
    """Returns means over the tokens of each block: (B, N, f, d) -> (B, f, blocks, d), float32."""
    if current().loops_over_images and self.order is None and windows.valid().all():
      return windows.means_by_rows(x_bnfd, self.prefix)
    return windows.means(self.inner(x_bnfd))

  def biases(self, bias_bm):
    """Returns (B or 1, 1, blocks, area) to add to the scores of keys, or None; -inf in the padding.
    """
    valid = self.keys.valid()
    if bias_bm is None:
      return None if valid.all() else jnp.where(valid, 0.0, -jnp.inf)[None, None]
    bias = self.keys.cut(self.inner(bias_bm)[:, :, None, None])[..., 0]
    return jnp.where(valid[None, None], bias, -jnp.inf)

  def block_shapes(self, *arrays_bnfd):
    """Returns the shapes of the blocks of queries, keys and values."""
    return [jax.ShapeDtypeStruct((x.shape[0], x.shape[2], windows.blocks, windows.area, x.shape[3]),
                                 x.dtype)
            for windows, x in zip((self.queries, self.keys, self.keys), arrays_bnfd, strict=True)]

  def attend(self, query_bnfd, key_bmfd, value_bmfe, bias_bm=None, form: str | None = None):
    """softmax(q k^T / sqrt(d) + bias) v over the chosen blocks: (B, N, f, e).

    bias: of the keys, without a gradient. form: the result of `choice.for_layout`; None: calls it.
    """
    arrays = query_bnfd, key_bmfd, value_bmfe
    form = form or for_layout(current(), self, *arrays, requested_form()).form
    if form == "block_sparse_kernel":
      return kernel.attend(self, kernels.block_attention(current().platform), *arrays, bias_bm)
    if form == "block_sparse_plain":
      return plain.attend(self, *arrays, bias_bm)
    return heads.attend(self, form == "block_sparse_cpu", *arrays, bias_bm)

  def scored_blocks(self):
    """Returns (B, f, q, blocks of keys): whether the scores of two blocks are computed."""
    return jax.nn.one_hot(self.chosen, self.keys.blocks, dtype=bool).any(axis=-2)

  def mask(self):
    """Returns (B, f, N, M): whether the scores of two tokens are computed."""
    rows, columns = (jnp.asarray(windows.block_of()) for windows in (self.queries, self.keys))
    mask = self.scored_blocks()[:, :, rows][..., columns]
    if self.order is not None:
      inverse = jnp.argsort(self.order, axis=1)
      mask = jax.vmap(lambda mask, inverse: mask[:, inverse][:, :, inverse])(mask, inverse)
    outer = [(self.prefix, self.fused)] * 2
    return jnp.pad(mask, [(0, 0), (0, 0), *outer], constant_values=True)


def _take(x_bn, index_bn):
  return jnp.take_along_axis(x_bn, index_bn.reshape(*index_bn.shape, *(1,) * (x_bn.ndim - 2)), 1)
