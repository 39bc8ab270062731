"""Sparsifiner's predictor at block granularity: mean queries and keys of blocks rank the blocks.

Ours, not the authors': their low-rank map is tied to positions, of which there are few when blocks
are ranked. Here the low rank is in the channels,

    score = (Q_mean W_query) (K_mean W_key)^T / sqrt(d) + log(tokens in the block of keys).

With its initial W = 1 this is the score of the means. It works for any number of tokens.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention
from vitcompact.attention import Core
from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.windows import Windows, nearest_blocks, on_grid, on_sequence
from vitcompact.tracing import param


def choose(score_bfqk, own, count: int):
  """Returns (B, f, q, count) int32, the blocks of keys with the highest scores, each query block's
  own (q,) first; ties go to the lowest index."""
  own = jnp.asarray(own)[:, None] == jnp.arange(score_bfqk.shape[-1])[None]
  return jax.lax.top_k(jnp.where(own[None, None], jnp.inf, score_bfqk), count)[1]


def block_mass(maps_bfnm, layout: BlockLayout):
  """Returns the share of each query block's attention to blocks that goes to each block of keys.

  maps_bfnm: dense maps over all keys, of the queries in blocks, in the order of the blocks.
  """
  maps_bfnm = layout.inner(maps_bfnm.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
  rows, columns = (jax.nn.one_hot(windows.block_of(), windows.blocks)
                   for windows in (layout.queries, layout.keys))
  mass = jnp.einsum("bfnm,nq,mk->bfqk", maps_bfnm, rows, columns)
  return mass / mass.sum(axis=-1, keepdims=True)


class BlockMaskPredictor(nn.Module):
  """The predictor of one block of the network: adds a layout of blocks of tokens to its attention.

  Leaves: query, key (head width, rank), shared by the heads.
  tokens: number of keys before any token reduction; the first `prefix` are not patches.
  query_grid, key_grid: (height, width) of the patches among queries and keys; None: a sequence.
  """
  spec: Any   # a Sparsifiner
  tokens: int
  prefix: int = 0
  query_grid: tuple[int, int] | None = None
  key_grid: tuple[int, int] | None = None

  @nn.compact
  def __call__(self, core: Core, query_bnfd, key_bmfd, source_bs=None, fused: bool = False) -> Core:
    """Returns `core` restricted to the chosen blocks. source_bs, fused: as in `token_state.Tokens`.
    """
    # The choice has no gradient, and the reconstruction loss trains only the predictor.
    query, key = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (query_bnfd, key_bmfd))
    layout = self._layout(query.shape[1], key.shape[1], source_bs, int(fused))
    means = layout.means(layout.queries, query), layout.means(layout.keys, key)
    score_bfqk = self._score(*means, layout)
    if attention.wants_predictions(self):
      own_bn = layout.inner(jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2]))
      maps = core.maps(layout.inner(query), key, own_n=own_bn)
      self.sow("attention", "score", jax.nn.softmax(score_bfqk, axis=-1))
      self.sow("attention", "target", jax.lax.stop_gradient(block_mass(maps, layout)))
    if not self.spec.masked:
      return core
    start = self._windows(self.key_grid, self.tokens - self.prefix).blocks
    count = min(max(1, round(self.spec.keep * start)), layout.keys.blocks)
    chosen = choose(jax.lax.stop_gradient(score_bfqk),
                    nearest_blocks(layout.queries, layout.keys), count)
    layout = layout._replace(chosen=chosen)
    if attention.wants_predictions(self):
      self.sow("attention", "kept", layout.scored_blocks())
    return core._replace(layout=layout)

  def _score(self, query_bfqd, key_bfkd, layout: BlockLayout):
    width = query_bfqd.shape[-1]

    def identity(key, shape):
      del key
      return jnp.eye(*shape)

    sizes = jnp.log(jnp.asarray(layout.keys.valid().sum(axis=1), jnp.float32))
    with jax.named_scope(attention.SCOPE):
      query, key = (x @ param(self, name, identity, (width, self.spec.rank or width))
                    for name, x in (("query", query_bfqd), ("key", key_bfkd)))
      score = jnp.einsum("bfqr,bfkr->bfqk", query, key)
    return score * width ** -0.5 + sizes[None, None, None]

  def _layout(self, queries: int, keys: int, source_bs, fused: int) -> BlockLayout:
    """Cuts the tokens into blocks; none is chosen yet."""
    if source_bs is None:
      return BlockLayout(None, self._windows(self.query_grid, queries - self.prefix),
                        self._windows(self.key_grid, keys - self.prefix), prefix=self.prefix)
    windows = on_sequence(keys - self.prefix - fused, self.spec.window ** 2)
    order = self._window_order(source_bs, keys)[:, self.prefix:keys - fused]
    return BlockLayout(None, windows, windows, order=jnp.argsort(order, axis=1),
                      prefix=self.prefix, fused=fused)

  def _windows(self, grid, tokens: int) -> Windows:
    window = self.spec.window
    return on_sequence(tokens, window ** 2) if grid is None else on_grid(grid, window)

  def _window_order(self, source_bs, tokens: int):
    """Returns (B, tokens): for each remaining token, the place of its first source token in the
    order of the blocks of the whole grid."""
    slots = self._windows(self.key_grid, self.tokens - self.prefix).slot_of()
    slots = jnp.asarray(np.concatenate([np.arange(self.prefix), self.prefix + slots]), jnp.int32)
    batch = source_bs.shape[0]
    place_bs = jnp.where(source_bs < 0, tokens, source_bs)
    start = jnp.full((batch, tokens), jnp.iinfo(jnp.int32).max)
    return start.at[jnp.arange(batch)[:, None], place_bs].min(
        jnp.broadcast_to(slots, (batch, *slots.shape)), mode="drop")
