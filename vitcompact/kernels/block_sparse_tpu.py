"""Block-sparse attention on TPU: Pallas on Mosaic TPU, forward and backward.

One step of the grid owns a block of queries (for the gradients of keys and values, a block of keys)
and iterates over its list of chosen blocks, which is in scalar memory. The arrays of the other side
stay in vector memory for all steps of a head: they are read from HBM once, and blocks are indexed.
Images are computed one after another, because scalar memory holds only the lists of one image.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vitcompact.kernels.block_sparse import attention
from vitcompact.kernels.pairs import pairs_by_key

LANES = 128
# For keys and values (or queries and their gradients) of two heads, as the next head is prefetched.
# Leaves room for the rest in the 16 MiB that a kernel may use by default.
RESIDENT_BYTES = 12 * 2 ** 20
LOWEST = -1e30  # below every score, and finite: the difference of two infinities is NaN


def resident_bytes(tokens: int, d: int, e: int, itemsize: int) -> int:
  """Returns the bytes of vector memory for `tokens`, whose rows are padded to whole lanes."""
  return 2 * tokens * itemsize * sum(LANES * -(-width // LANES) for width in (d, e))


def forward(interpret, query, key, value, bias, chosen):
  """See `block_sparse.attention`."""
  out, log_sum = lax.map(lambda image: _forward(*image, interpret),
                         (query, key, value, bias.swapaxes(1, 2), _flatten_lists(chosen)))
  return out, log_sum[..., 0, :]


def backward(interpret, query, key, value, bias, chosen, log_sum, shift, d_out):
  def image_gradients(image):
    rows, columns, chosen, chosen_by_key, first = image
    return (_d_query(*rows, *columns, chosen, interpret),
            *_d_key_value(*rows, *columns, chosen_by_key, first, interpret))

  rows = (query, d_out.astype(value.dtype), log_sum[..., None, :], shift[..., None, :])
  columns = (key, value, bias.swapaxes(1, 2))
  lists = [_flatten_lists(x) for x in (chosen, *pairs_by_key(chosen, key.shape[2]))]
  return lax.map(image_gradients, (rows, columns, *lists))


attend = attention(forward, backward)


def _flatten_lists(index_b):
  """Flattens the lists of each image into one row."""
  return index_b.reshape(len(index_b), -1)


def _product(a, b):
  return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _product_transposed(a, b):
  """Returns a b^T."""
  return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _diagonal(size: int):
  return (lax.broadcasted_iota(jnp.int32, (size, size), 0) ==
          lax.broadcasted_iota(jnp.int32, (size, size), 1))


def _as_column(row_1a):
  """Returns (a, 1), using only operations that lower on every version."""
  return jnp.sum(jnp.where(_diagonal(row_1a.shape[1]), row_1a, 0.0), axis=1, keepdims=True)


def _as_row(column_a1):
  return jnp.sum(jnp.where(_diagonal(column_a1.shape[0]), column_a1, 0.0), axis=0, keepdims=True)


def _block_spec(array_fq):
  """Returns the spec of one block of a head for each step of the grid."""
  shape = (None, None, *array_fq.shape[2:])
  return pl.BlockSpec(shape, lambda head, block, *_: (head, block, 0, 0))


def _head_spec(array_fk):
  """Returns the spec of all blocks of a head."""
  return pl.BlockSpec((None, *array_fk.shape[1:]), lambda head, block, *_: (head, 0, 0, 0))


def _launch(body, grid, lists, in_specs, out_specs, out, interpret):
  return pl.pallas_call(
      body, out_shape=out, interpret=bool(interpret),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=lists, grid=grid, in_specs=in_specs, out_specs=out_specs),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")))


def _forward(query, key, value, bias, chosen, interpret):
  """(f, q, a, d), (f, k, c, d), (f, k, c, e), (k, 1, c), (f q s) -> (f, q, a, e), (f, q, 1, a)."""
  heads, queries, area, _ = query.shape
  count = chosen.size // (heads * queries)
  out = [jax.ShapeDtypeStruct((heads, queries, area, value.shape[-1]), jnp.float32),
         jax.ShapeDtypeStruct((heads, queries, 1, area), jnp.float32)]

  def block_sparse_attention(chosen_ref, query_ref, key_ref, value_ref, bias_ref, out_ref,
                             log_sum_ref):
    start = (pl.program_id(0) * queries + pl.program_id(1)) * count

    def step(number, carry):
      summed, top, total = carry
      block = chosen_ref[start + number]
      scores = _product_transposed(query_ref[...], key_ref[block]) + bias_ref[block]
      higher = jnp.maximum(top, scores.max(axis=1, keepdims=True))
      weights = jnp.exp(scores - higher)
      shrink = jnp.exp(top - higher)
      total = total * shrink + weights.sum(axis=1, keepdims=True)
      added = _product(weights.astype(value.dtype), value_ref[block])
      return summed * shrink + added, higher, total

    begin = (jnp.zeros(out_ref.shape, jnp.float32), jnp.full((area, 1), LOWEST, jnp.float32),
             jnp.zeros((area, 1), jnp.float32))
    summed, top, total = lax.fori_loop(0, count, step, begin)
    out_ref[...] = summed / total
    log_sum_ref[...] = _as_row(top + jnp.log(total))

  specs = [_block_spec(query), _head_spec(key), _head_spec(value), _bias_spec(bias)]
  return _launch(block_sparse_attention, (heads, queries), 1, specs,
                 [_block_spec(x) for x in out], out, interpret)(chosen, query, key, value, bias)


def _bias_spec(array_k):
  return pl.BlockSpec(array_k.shape, lambda head, block, *_: (0, 0, 0))


def _d_query(query, d_out, log_sum, shift, key, value, bias, chosen, interpret):
  """Returns the gradient of queries (f, q, a, d); as in forward, a step owns a block of queries."""
  heads, queries = query.shape[:2]
  count = chosen.size // (heads * queries)

  def block_sparse_d_query(chosen_ref, query_ref, d_out_ref, log_sum_ref, shift_ref, key_ref,
                           value_ref, bias_ref, d_query_ref):
    start = (pl.program_id(0) * queries + pl.program_id(1)) * count
    log_sum, shift = _as_column(log_sum_ref[...]), _as_column(shift_ref[...])

    def step(number, summed):
      block = chosen_ref[start + number]
      scores = _product_transposed(query_ref[...], key_ref[block]) + bias_ref[block]
      d_weights = _product_transposed(d_out_ref[...], value_ref[block])
      d_scores = jnp.exp(scores - log_sum) * (d_weights + shift)
      return summed + _product(d_scores.astype(key.dtype), key_ref[block])

    summed = lax.fori_loop(0, count, step, jnp.zeros(query_ref.shape, jnp.float32))
    d_query_ref[...] = summed.astype(query.dtype)

  specs = [*(_block_spec(x) for x in (query, d_out, log_sum, shift)),
           *(_head_spec(x) for x in (key, value)), _bias_spec(bias)]
  out = jax.ShapeDtypeStruct(query.shape, query.dtype)
  return _launch(block_sparse_d_query, (heads, queries), 1, specs, _block_spec(out), out,
                 interpret)(chosen, query, d_out, log_sum, shift, key, value, bias)


def _d_key_value(query, d_out, log_sum, shift, key, value, bias, chosen_by_key, first, interpret):
  """Returns the gradients of keys and values; a step owns a block of keys, and its scores are
  transposed.

  chosen_by_key (f q s), first (f (k + 1)): see `pairs_by_key`.
  """
  heads, keys = key.shape[:2]
  pairs = chosen_by_key.size // heads

  def block_sparse_d_key_value(chosen_ref, first_ref, query_ref, d_out_ref, log_sum_ref, shift_ref,
                               key_ref, value_ref, bias_ref, d_key_ref, d_value_ref):
    head = pl.program_id(0)
    own = head * (keys + 1) + pl.program_id(1)
    bias = _as_column(bias_ref[...])

    def step(number, carry):
      d_key, d_value = carry
      block = chosen_ref[head * pairs + number]
      scores = _product_transposed(key_ref[...], query_ref[block]) + bias
      weights = jnp.exp(scores - log_sum_ref[block])
      d_value = d_value + _product(weights.astype(value.dtype), d_out_ref[block])
      d_weights = _product_transposed(value_ref[...], d_out_ref[block])
      d_scores = weights * (d_weights + shift_ref[block])
      return d_key + _product(d_scores.astype(key.dtype), query_ref[block]), d_value

    begin = tuple(jnp.zeros(ref.shape, jnp.float32) for ref in (key_ref, value_ref))
    d_key, d_value = lax.fori_loop(first_ref[own], first_ref[own + 1], step, begin)
    d_key_ref[...] = d_key.astype(key.dtype)
    d_value_ref[...] = d_value.astype(value.dtype)

  own_bias = pl.BlockSpec((None, *bias.shape[1:]), lambda head, block, *_: (block, 0, 0))
  specs = [*(_head_spec(x) for x in (query, d_out, log_sum, shift)),
           *(_block_spec(x) for x in (key, value)), own_bias]
  out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)]
  return _launch(block_sparse_d_key_value, (heads, keys), 2, specs,
                 [_block_spec(x) for x in out], out, interpret)(
      chosen_by_key, first, query, d_out, log_sum, shift, key, value, bias)
