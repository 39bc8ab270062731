"""Attention in tiles of queries: keeps no scores, so memory is linear in the number of tokens."""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vitcompact.attention import cpu, online_softmax, tuning
from vitcompact.attention.reference import SCOPE


def attend(query_bnhd, key_bmhd, value_bmhe, bias_bm=None, *, loop: str | None):
  """softmax(q k^T / sqrt(d) + bias) v, with a custom backward pass.

  loop: on a CPU, over "images", with all heads of one together, or over "heads" (and in the forward
    pass also over tiles of keys); None: all images and heads together.
  """
  with jax.named_scope(SCOPE):
    return _attend(loop, query_bnhd * query_bnhd.shape[-1] ** -0.5, key_bmhd, value_bmhe, bias_bm)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(loop, query_bnhd, key_bmhd, value_bmhe, bias_bm):
  return _forward(loop, query_bnhd, key_bmhd, value_bmhe, bias_bm)[0]


def _forward(loop, query_bnhd, key_bmhd, value_bmhe, bias_bm):
  keys, arrays = key_bmhd.shape[1], (query_bnhd, key_bmhd, value_bmhe)
  most, step = (tuning.STEP_QUERIES, tuning.STEP_KEYS) if loop else (_most_rows(keys), keys)

  def head(query_nd, key_md, value_me, bias_m):
    def tile(query_nd):
      state = online_softmax.attend(query_nd, key_md, value_me, bias_m, step)
      return state.attention().astype(value_me.dtype), state.log_sum()
    if len(query_nd) <= most:
      return tile(query_nd)
    return jax.tree.map(lambda x: _join_tiles(x, len(query_nd)),
                        jax.lax.map(tile, _split_tiles(query_nd, most)))

  out_bnhe, log_sum_bnh1 = _over_heads(head, loop)(arrays, bias_bm)
  return out_bnhe, (*arrays, bias_bm, out_bnhe, log_sum_bnh1)


def _backward(loop, residuals, d_out_bnhe):
  query_bnhd, key_bmhd, value_bmhe, bias_bm, out_bnhe, log_sum_bnh1 = residuals
  *gradients, d_bias_bmh = _over_heads(_head_backward, loop)(
      (query_bnhd, key_bmhd, value_bmhe, out_bnhe, log_sum_bnh1, d_out_bnhe), bias_bm)
  return *gradients, None if bias_bm is None else d_bias_bmh.sum(axis=-1)


_attend.defvjp(_forward, _backward)


def _head_backward(query_nd, key_md, value_me, out_ne, log_sum_n1, d_out_ne, bias_m):
  """Returns gradients of query, key, value and bias; those of the keys are summed over tiles."""
  count, keys = query_nd.shape[0], (key_md, value_me, bias_m)
  shift_n1 = jnp.sum(out_ne.astype(jnp.float32) * d_out_ne, axis=-1, keepdims=True)

  def step(sums, tile):
    d_query_nd, *new = online_softmax.gradients(*keys, *tile)
    return [None if total is None else total + d
            for total, d in zip(sums, new, strict=True)], d_query_nd

  sums = [None if x is None else jnp.zeros(x.shape, jnp.float32) for x in keys]
  arrays = (query_nd, log_sum_n1, shift_n1, d_out_ne)
  most = _most_rows(len(key_md))
  if count <= most:
    sums, d_query_nd = step(sums, arrays)
  else:
    sums, d_query_tnd = jax.lax.scan(step, sums, [_split_tiles(x, most) for x in arrays])
    d_query_nd = _join_tiles(d_query_tnd, count)
  return d_query_nd, *(None if x is None else total.astype(x.dtype)
                       for x, total in zip(keys, sums, strict=True))


def _over_heads(head: Callable, loop: str | None) -> Callable:
  """Turns a function of arrays (N, ...) and a bias (M,) into one of arrays (B, N, h, ...) and
  biases (B, M)."""
  if loop == "heads":
    return cpu.loop_over_heads(head)

  def image(arrays_nh, bias_m):
    arrays_hn = jax.tree.map(lambda x: x.swapaxes(0, 1), arrays_nh)
    out_hn = jax.vmap(lambda *arrays_n: head(*arrays_n, bias_m))(*arrays_hn)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), out_hn)

  return cpu.loop_over_images(image) if loop == "images" else jax.vmap(image)


def _most_rows(keys: int) -> int:
  """Returns how many queries a tile over all keys may have."""
  return max(tuning.MIN_TILE_QUERIES, tuning.TILE_ENTRIES // keys)


def _split_tiles(x_n, most: int):
  """Splits (N, ...) into equal tiles of at most `most` rows, zero-padded: (tiles, rows, ...)."""
  tiles = -(-len(x_n) // most)
  rows = -(-len(x_n) // tiles)
  padded = jnp.pad(x_n, [(0, tiles * rows - len(x_n))] + [(0, 0)] * (x_n.ndim - 1))
  return padded.reshape(tiles, rows, *x_n.shape[1:])


def _join_tiles(x_tn, count: int):
  return x_tn.reshape(-1, *x_tn.shape[2:])[:count]


def attend_any(attend_tile: Callable, call, query_bnhd, key_bmhd, value_bmhe, rescore=None):
  """Computes any `call.Core` in tiles, by autodiff of `attend_tile`, which takes the arguments of
  `forms.einsum`.

  Each tile includes the halo of rows that `rescore` needs.
  """
  queries, keys, heads = *(x.shape[1] for x in (query_bnhd, key_bmhd)), value_bmhe.shape[2]
  tiles = -(-queries // max(tuning.MIN_ROW_QUERIES, tuning.ROW_ENTRIES // (keys * heads)))
  rows, reach = -(-queries // tiles), 0 if rescore is None else rescore.reach
  start_t1 = rows * jnp.arange(tiles)[:, None]
  missing = tiles * rows - queries
  with_halo_tr = start_t1 + jnp.arange(rows + 2 * reach)[None]
  padded = jnp.pad(query_bnhd, [(0, 0), (reach, reach + missing), (0, 0), (0, 0)])
  mask = call.mask
  if mask is not None:
    mask = jnp.pad(mask, [(0, 0), (0, 0), (0, missing), (0, 0)], constant_values=True)
    mask = jnp.moveaxis(mask.reshape(*mask.shape[:2], tiles, rows, keys), 2, 0)

  # In the layout that products need; else XLA:CPU would transpose them for each tile.
  key_bhdm, value_bhme = key_bmhd.transpose(0, 2, 3, 1), value_bmhe.swapaxes(1, 2)

  @jax.checkpoint
  def tile(arrays):
    query_bnhd, own_n, mask = arrays
    return attend_tile(call._replace(mask=mask), query_bnhd, key_bhdm.transpose(0, 3, 1, 2),
                   value_bhme.swapaxes(1, 2), rescore, own_n=own_n, edges=False)

  out_tbnhe = jax.lax.map(tile, (jnp.moveaxis(padded[:, with_halo_tr], 1, 0),
                                 start_t1 + jnp.arange(rows)[None], mask))
  out_btnhe = jnp.moveaxis(out_tbnhe, 0, 1)
  return out_btnhe.reshape(-1, tiles * rows, *out_btnhe.shape[3:])[:, :queries]
