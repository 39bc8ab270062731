"""Block-sparse attention on NVIDIA Hopper: Pallas on Mosaic GPU, forward and backward.

One program (a warpgroup of 128 threads) owns one tile of 64 tokens and iterates over its list of
chosen tiles. The tensor memory accelerator copies the next tiles to shared memory while the
previous ones are used. Images and heads are flattened: a kernel sees only tiles and lists of tiles.
Several programs share a multiprocessor and hide each other's latency, so they need no warp
specialisation.

Exponentials are to base 2, as in hardware: scores, biases and log sums are multiplied by log2(e).
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vitcompact.kernels.block_sparse import attention
from vitcompact.kernels.pairs import pairs_by_key

SLOTS = 2       # tiles in flight; with 2, at least four programs fit on one multiprocessor
LOWEST = -1e30  # below every score, and finite: the difference of two infinities is NaN
LOG2_E = math.log2(math.e)


def forward(interpret, query, key, value, bias, chosen):
  """See `block_sparse.attention`; bfloat16, a = c = 64, d = 64, e = 64 or 128."""
  out, log_sum = _forward(_tiles(query), _tiles(key), _tiles(value), _bias(bias, key),
                          _tiles(_global_index(chosen, key.shape[2])), interpret)
  return out.reshape(*query.shape[:4], value.shape[-1]), log_sum.reshape(query.shape[:4])


def backward(interpret, query, key, value, bias, chosen, log_sum, shift, d_out):
  keys, queries = key.shape[2], query.shape[2]
  rows = [_tiles(x) for x in (query, d_out, log_sum * LOG2_E, shift)]
  columns = [_tiles(key), _tiles(value), _bias(bias, key)]
  d_query = _d_query(*rows, *columns, _tiles(_global_index(chosen, keys)), interpret)
  chosen_by_key, first = pairs_by_key(chosen, keys)
  first = _global_index(first, chosen_by_key.shape[-1])
  spans = jnp.stack([first[..., :-1], first[..., 1:]], axis=-1).reshape(-1, 2)
  chosen_by_key = _global_index(chosen_by_key, queries).reshape(-1)
  d_key, d_value = _d_key_value(*rows, *columns, chosen_by_key, spans, interpret)
  return d_query.reshape(query.shape), d_key.reshape(key.shape), d_value.reshape(value.shape)


attend = attention(forward, backward)


def _tiles(x_bfq):
  """Flattens images, heads and blocks into one axis of tiles."""
  return x_bfq.reshape(-1, *x_bfq.shape[3:])


def _global_index(index_bf, count: int):
  """Converts indices below `count` within each image and head to indices into all tiles."""
  batch, heads, *rest = index_bf.shape
  start = count * jnp.arange(batch * heads, dtype=jnp.int32)
  return index_bf.astype(jnp.int32) + start.reshape(batch, heads, *(1,) * len(rest))


def _bias(bias_b1kc, key_bfkcd):
  """Returns the bias (tiles, c), to base 2."""
  return _tiles(jnp.broadcast_to(bias_b1kc * LOG2_E, key_bfkcd.shape[:4]))


def _product(a, b, interpret, transposed: bool = False):
  """a b or a b^T on the tensor cores, float32; a is in registers or shared memory, b in shared
  memory.

  The interpreter does not support operands in registers (jax 0.10 and 0.11), and gets a plain
  product.
  """
  if interpret is not None:
    return lax.dot_general(a[...], b[...], (((1,), (int(transposed),)), ((), ())),
                           preferred_element_type=jnp.float32)
  b = b.transpose((1, 0)) if transposed else b

  def run(sum_ref):
    plgpu.wgmma(sum_ref, a, b)
    return sum_ref[...]

  return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _row(x_c, like_ac):
  return lax.broadcast_in_dim(x_c, like_ac.shape, [1])


def _column(x_a, like_ac):
  return lax.broadcast_in_dim(x_a, like_ac.shape, [0])


def _for_each(count, fetch, ready, own, step, start):
  """Repeats carry = step(slot, carry) for `count` tiles, which `fetch(number, slot)` copies.

  ready: the barriers of the slots; own: the barrier of the program's own arrays, which every step
  reads.
  """
  for slot in range(SLOTS):
    pl.when(slot < count)(functools.partial(fetch, slot, slot))
  plgpu.barrier_wait(own)

  def body(number, carry):
    slot = lax.rem(number, jnp.int32(SLOTS))
    plgpu.barrier_wait(ready.at[slot])
    carry = step(slot, carry)
    plgpu.commit_smem()  # all four warps must have read the slot before it is refilled
    pl.when(number + SLOTS < count)(lambda: fetch(number + SLOTS, slot))
    return carry

  return lax.fori_loop(jnp.int32(0), jnp.int32(count), body, start)


def _copy_in(refs, buffers, ready):
  """Starts copies to shared memory, which arrive at a barrier."""
  for ref, buffer in zip(refs, buffers, strict=True):
    plgpu.copy_gmem_to_smem(ref, buffer, ready)


def _copy_out(buffers, refs):
  plgpu.commit_smem()
  for buffer, ref in zip(buffers, refs, strict=True):
    plgpu.copy_smem_to_gmem(buffer, ref)
  plgpu.wait_smem_to_gmem(0)


def _buffers(arrays, *slots: int):
  """Returns shared memory for a tile of each array."""
  return [plgpu.SMEM((*slots, *x.shape[1:]), x.dtype) for x in arrays]


def _launch(body, tiles: int, out, scratch, interpret):
  return plgpu.kernel(
      body, out_type=out, scratch_types=scratch, grid=(tiles,), grid_names=("tile",),
      num_threads=1, thread_name="warpgroup", interpret=interpret,
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))


def _forward(query, key, value, bias, chosen, interpret):
  """Computes (Q, a, d), (K, c, d), (K, c, e), (K, c), (Q, s) -> (Q, a, e), (Q, a)."""
  tiles, count = chosen.shape
  out = [jax.ShapeDtypeStruct((*query.shape[:2], value.shape[-1]), value.dtype),
         jax.ShapeDtypeStruct(query.shape[:2], jnp.float32)]

  def block_sparse_attention(query_ref, key_ref, value_ref, bias_ref, chosen_ref, out_ref,
                             log_sum_ref, query_s, key_s, value_s, bias_s, out_s, log_sum_s,
                             own, ready):
    tile = lax.axis_index("tile")

    def fetch(number, slot):
      block = chosen_ref[tile, number]
      _copy_in([ref.at[block] for ref in (key_ref, value_ref, bias_ref)],
               [buffer.at[slot] for buffer in (key_s, value_s, bias_s)], ready.at[slot])

    def step(slot, carry):
      summed, top, total = carry
      scores = _product(query_s, key_s.at[slot], interpret, transposed=True) * LOG2_E
      scores = scores + _row(bias_s[slot], scores)
      higher = jnp.maximum(top, scores.max(axis=1))
      weights = jnp.exp2(scores - _column(higher, scores))
      shrink = jnp.exp2(top - higher)
      total = total * shrink + weights.sum(axis=1)
      added = _product(weights.astype(value.dtype), value_s.at[slot], interpret)
      return summed * _column(shrink, summed) + added, higher, total

    _copy_in([query_ref.at[tile]], [query_s], own)
    start = (jnp.zeros(out_s.shape, jnp.float32), jnp.full(log_sum_s.shape, LOWEST, jnp.float32),
             jnp.zeros(log_sum_s.shape, jnp.float32))
    summed, top, total = _for_each(count, fetch, ready, own, step, start)
    out_s[...] = (summed / _column(total, summed)).astype(out_s.dtype)
    log_sum_s[...] = top * (1 / LOG2_E) + jnp.log(total)
    _copy_out([out_s, log_sum_s], [out_ref.at[tile], log_sum_ref.at[tile]])

  scratch = [*_buffers([query]), *_buffers([key, value, bias], SLOTS), *_buffers(out),
             plgpu.Barrier(), plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS)]
  return _launch(block_sparse_attention, tiles, out, scratch, interpret)(
      query, key, value, bias, chosen)


def _d_query(query, d_out, log_sum, shift, key, value, bias, chosen, interpret):
  """Returns the gradient of queries (Q, a, d); as in forward, a program owns a tile of queries."""
  tiles, count = chosen.shape

  def block_sparse_d_query(query_ref, d_out_ref, log_sum_ref, shift_ref, key_ref, value_ref,
                           bias_ref, chosen_ref, d_query_ref, query_s, d_out_s, log_sum_s, shift_s,
                           key_s, value_s, bias_s, own, ready):
    tile = lax.axis_index("tile")

    def fetch(number, slot):
      block = chosen_ref[tile, number]
      _copy_in([ref.at[block] for ref in (key_ref, value_ref, bias_ref)],
               [buffer.at[slot] for buffer in (key_s, value_s, bias_s)], ready.at[slot])

    def step(slot, summed):
      scores = _product(query_s, key_s.at[slot], interpret, transposed=True) * LOG2_E
      scores = scores + _row(bias_s[slot], scores)
      weights = jnp.exp2(scores - _column(log_sum_s[...], scores))
      d_weights = _product(d_out_s, value_s.at[slot], interpret, transposed=True)
      d_scores = weights * (d_weights + _column(shift_s[...], scores))
      return summed + _product(d_scores.astype(key.dtype), key_s.at[slot], interpret)

    _copy_in([ref.at[tile] for ref in (query_ref, d_out_ref, log_sum_ref, shift_ref)],
             [query_s, d_out_s, log_sum_s, shift_s], own)
    d_query = _for_each(count, fetch, ready, own, step, jnp.zeros(query_s.shape, jnp.float32))
    query_s[...] = d_query.astype(query_s.dtype)  # it is not read again
    _copy_out([query_s], [d_query_ref.at[tile]])

  scratch = [*_buffers([query, d_out, log_sum, shift]), *_buffers([key, value, bias], SLOTS),
             plgpu.Barrier(num_arrivals=4), plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS)]
  out = jax.ShapeDtypeStruct(query.shape, query.dtype)
  return _launch(block_sparse_d_query, tiles, out, scratch, interpret)(
      query, d_out, log_sum, shift, key, value, bias, chosen)


def _d_key_value(query, d_out, log_sum, shift, key, value, bias, chosen_by_key, spans, interpret):
  """Returns the gradients of keys and values; a program owns a tile of keys, and its scores are
  transposed.

  chosen_by_key: tiles of queries; spans (K, 2): start and end of each key tile's part of it.
  """
  tiles = key.shape[0]

  def block_sparse_d_key_value(query_ref, d_out_ref, log_sum_ref, shift_ref, key_ref, value_ref,
                               bias_ref, chosen_ref, spans_ref, d_key_ref, d_value_ref, query_s,
                               d_out_s, log_sum_s, shift_s, key_s, value_s, bias_s, own,
                               ready):
    tile = lax.axis_index("tile")
    first = spans_ref[tile, 0]

    def fetch(number, slot):
      block = chosen_ref[first + number]
      _copy_in([ref.at[block] for ref in (query_ref, d_out_ref, log_sum_ref, shift_ref)],
               [buffer.at[slot] for buffer in (query_s, d_out_s, log_sum_s, shift_s)],
               ready.at[slot])

    def step(slot, carry):
      d_key, d_value = carry
      scores = _product(key_s, query_s.at[slot], interpret, transposed=True) * LOG2_E
      scores = scores + _column(bias_s[...], scores)
      weights = jnp.exp2(scores - _row(log_sum_s[slot], scores))
      d_value = d_value + _product(weights.astype(value.dtype), d_out_s.at[slot], interpret)
      d_weights = _product(value_s, d_out_s.at[slot], interpret, transposed=True)
      d_scores = weights * (d_weights + _row(shift_s[slot], scores))
      d_key = d_key + _product(d_scores.astype(key.dtype), query_s.at[slot], interpret)
      return d_key, d_value

    _copy_in([ref.at[tile] for ref in (key_ref, value_ref, bias_ref)], [key_s, value_s, bias_s],
             own)
    start = [jnp.zeros(buffer.shape, jnp.float32) for buffer in (key_s, value_s)]
    count = spans_ref[tile, 1] - first
    d_key, d_value = _for_each(count, fetch, ready, own, step, tuple(start))
    key_s[...] = d_key.astype(key_s.dtype)        # it is not read again
    value_s[...] = d_value.astype(value_s.dtype)
    _copy_out([key_s, value_s], [d_key_ref.at[tile], d_value_ref.at[tile]])

  scratch = [*_buffers([query, d_out, log_sum, shift], SLOTS), *_buffers([key, value, bias]),
             plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS)]
  out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)]
  return _launch(block_sparse_d_key_value, tiles, out, scratch, interpret)(
      query, d_out, log_sum, shift, key, value, bias, chosen_by_key, spans)
