"""TransNeXt's aggregated attention: each token attends to its neighbours and to pooled keys.

Shi, arXiv 2311.17132. With ^ for a vector of length 1, e and T_j learned for each head, tau the
softplus of a learned temperature, and L_i the number of keys of query i,

    s_ij = tau log(L_i) (^q_i + e) . ^k_j + b_ij      over the 3 x 3 tokens around it and the pooled
    a_i  = softmax(s_i)                               keys, in one softmax
    y_i  = sum_local (a_ij + ^q_i . T_j + t_j) v_j + sum_pooled a_ij v_j

b is learned for each of the nine neighbours; for pooled keys, a small network computes it from the
distance, see `bias`. Without neighbours, it is cosine attention over the pooled keys alone; in the
last stage, these are all tokens.

`Aggregation` replaces the softmax in an `attention.Core`. It has two forms: `reference`, the
definition, makes nine copies of keys and values; `shifted` multiplies and adds nine shifted maps,
without copies. `shifted` is the default; `attention.using("einsum")` and "plain" request the
reference.
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention

REFERENCE = ("einsum", "plain")   # requested forms that select the reference
REACH = 1
# (rows, columns) from a query to its neighbours, in the order of the learned parameters.
NEIGHBOURS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))
SQUARE_EPSILON = 1e-24   # the square of the least length, 1e-12, as in torch's normalize


class Local(NamedTuple):
  """Learned parameters for the neighbours: bias (h, 9) of their scores; tokens (h, d, 9) and
  token_bias (h, 1, 9) of their weights."""
  bias: jax.Array
  tokens: jax.Array
  token_bias: jax.Array


class Aggregation(NamedTuple):
  """An operator for `attention.Core`. It takes queries (B, N, h, d) of a grid, and keys and values
  (B, N + P, h, d), those of the tokens before the pooled ones; without `local`, only the pooled
  ones (B, P, h, d).

  temperature: (h, 1, 1), before the softplus; embedding: (h, 1, d), added to queries; bias:
  (h, N, P), added to the scores of pooled keys.
  """
  grid: tuple[int, int]
  temperature: jax.Array
  embedding: jax.Array
  bias: jax.Array
  local: Local | None = None

  def __call__(self, core, query_bnhd, key_bmhd, value_bmhe):
    """Returns (B, N, h, e) in the values' dtype."""
    del core
    arrays, batch = (query_bnhd, key_bmhd, value_bmhe), query_bnhd.shape[0]
    if attention.requested_form() in REFERENCE:
      return reference(self, *arrays)
    if attention.loops_over_images() and isinstance(batch, int) and batch > 1:
      # One image after another, so that its shifted maps stay in a CPU's cache.
      return jax.lax.map(lambda image: shifted(self, *(x[None] for x in image))[0], arrays)
    return shifted(self, *arrays)

  def maps(self, core, query_bnhd, key_bmhd):
    """Returns the softmax, float32: (B, h, N, 9 + P), neighbours first, or (B, h, N, P)."""
    del core
    unit, query, keys, pooled = self.split(query_bnhd, key_bmhd)
    del unit
    scores = self.pooled_scores(query, pooled)
    if self.local is not None:
      scores = jnp.concatenate([copied_scores(self, query, keys), scores], axis=-1)
    return jax.nn.softmax(scores, axis=-1)

  def split(self, query_bnhd, key_bmhd):
    """Returns (unit queries, scaled queries, unit keys of the grid or None, pooled unit keys), each
    (B, h, tokens, d), with heads before tokens."""
    unit_bhnd = normalise(query_bnhd.swapaxes(1, 2))
    sharpness_hn1 = jax.nn.softplus(self.temperature) * jnp.asarray(self.lengths()[None, :, None])
    scaled = (unit_bhnd + self.embedding[None]) * sharpness_hn1[None]
    keys, pooled = self.parts(normalise(key_bmhd.swapaxes(1, 2)))
    dtype = query_bnhd.dtype
    return (unit_bhnd.astype(dtype), scaled.astype(dtype),
            None if keys is None else keys.astype(dtype), pooled.astype(dtype))

  def parts(self, x_bhmd):
    """Splits tokens into (those of the grid, or None; the pooled ones)."""
    if self.local is None:
      return None, x_bhmd
    count = math.prod(self.grid)
    return x_bhmd[:, :, :count], x_bhmd[:, :, count:]

  def lengths(self) -> np.ndarray:
    """Returns (N,), the log of the number of keys of each query."""
    keys = self.bias.shape[-1] * np.ones(math.prod(self.grid), np.float32)
    return np.log(keys if self.local is None else keys + inside(self.grid).sum(-1))

  def pooled_scores(self, query_bhnd, pooled_bhpd):
    """Returns the scores of pooled keys (B, h, N, P), float32."""
    with jax.named_scope(attention.SCOPE):
      scores = jnp.einsum("bhnd,bhpd->bhnp", query_bhnd, pooled_bhpd,
                          preferred_element_type=jnp.float32)
    return scores + self.bias[None]

  def extra(self, unit_bhnd):
    """Returns (B, h, N, 9) to add to the weights of neighbours."""
    with jax.named_scope(attention.SCOPE):
      out = jnp.einsum("bhnd,hdj->bhnj", unit_bhnd, self.local.tokens.astype(unit_bhnd.dtype),
                       preferred_element_type=jnp.float32)
    return out + self.local.token_bias[None]


def reference(call: Aggregation, query_bnhd, key_bmhd, value_bmhe):
  """Computes the definition: copies neighbours, concatenates all scores, applies one softmax."""
  unit, query, keys, pooled = call.split(query_bnhd, key_bmhd)
  values, pooled_values = call.parts(value_bmhe.swapaxes(1, 2))
  scores = call.pooled_scores(query, pooled)
  if call.local is None:
    return _weigh("bhnp,bhpe->bnhe", jax.nn.softmax(scores, axis=-1), pooled_values)
  scores = jnp.concatenate([copied_scores(call, query, keys), scores], axis=-1)
  near, far = jnp.split(jax.nn.softmax(scores, axis=-1), [len(NEIGHBOURS)], axis=-1)
  copies = _stack(shifts(values, call.grid), 3)
  return (_weigh("bhnj,bhnje->bnhe", near + call.extra(unit), copies)
          + _weigh("bhnp,bhpe->bnhe", far, pooled_values))


def copied_scores(call: Aggregation, query_bhnd, key_bhnd):
  """Returns the scores of neighbours (B, h, N, 9), float32; -inf beyond the edge."""
  copies = _stack(shifts(key_bhnd, call.grid), 3)
  with jax.named_scope(attention.SCOPE):
    scores = jnp.einsum("bhnd,bhnjd->bhnj", query_bhnd, copies,
                        preferred_element_type=jnp.float32)
  return _mask_scores(call, scores)


def shifted(call: Aggregation, query_bnhd, key_bmhd, value_bmhe):
  """Computes the same by multiply-adds of shifted maps. The pooled part is divided by the sum of
  the softmax after the product with the values, which has fewer entries. (MACs are counted in the
  reference.)"""
  unit, query, keys, pooled = call.split(query_bnhd, key_bmhd)
  values, pooled_values = call.parts(value_bmhe.swapaxes(1, 2))
  scores = call.pooled_scores(query, pooled)
  top = scores.max(axis=-1, keepdims=True)
  if call.local is not None:
    near = _mask_scores(call, _stack((_sum_channels(_product(query, key))
                                      for key in shifts(keys, call.grid)), -1))
    top = jnp.maximum(top, near.max(axis=-1, keepdims=True))
  top = jax.lax.stop_gradient(top)
  far = jnp.exp(scores - top)
  total = far.sum(axis=-1, keepdims=True)
  if call.local is not None:
    near = jnp.exp(near - top)
    total = total + near.sum(axis=-1, keepdims=True)
  out_bhne = _weigh("bhnp,bhpe->bhne", far, pooled_values) / total
  if call.local is not None:
    weights = near / total + call.extra(unit)
    for j, value in enumerate(shifts(values, call.grid)):
      out_bhne = out_bhne + _product(weights[..., j:j + 1], value)
  return out_bhne.swapaxes(1, 2).astype(value_bmhe.dtype)


def _product(x, y):
  """Returns x * y, float32."""
  return x.astype(jnp.float32) * y.astype(jnp.float32)


def _sum_channels(x):
  """Sums over the last axis."""
  if attention.current().platform != "cpu" or attention.requested_form() in REFERENCE:
    return x.sum(axis=-1)
  # At batch 1, XLA sums the few channels of a head as a product in a third of the time.
  return x @ jnp.ones(x.shape[-1], x.dtype)


def _stack(arrays, axis: int):
  """jnp.stack, using only operations that ONNX has."""
  return jnp.concatenate([jnp.expand_dims(x, axis) for x in arrays], axis)


def _weigh(equation: str, weights, values):
  with jax.named_scope(attention.SCOPE):
    return jnp.einsum(equation, weights.astype(values.dtype), values)


def _mask_scores(call: Aggregation, scores_bhnj):
  scores_bhnj = scores_bhnj + call.local.bias[None, :, None]
  return jnp.where(inside(call.grid)[None, None], scores_bhnj, -jnp.inf)


def normalise(x):
  """Returns x / |x| over the last axis, float32."""
  wide = x.astype(jnp.float32)
  square = _sum_channels(wide * wide)[..., None]
  return wide * jax.lax.rsqrt(jnp.maximum(square, SQUARE_EPSILON))


def shifts(x_bhnd, grid: tuple[int, int]):
  """Yields the neighbours in order: (B, h, N, d) each, zeros beyond the edge."""
  height, width = grid
  edge = (REACH, REACH)
  padded = jnp.pad(x_bhnd.reshape(*x_bhnd.shape[:2], height, width, x_bhnd.shape[-1]),
                   ((0, 0), (0, 0), edge, edge, (0, 0)))
  for i, j in NEIGHBOURS:
    yield padded[:, :, REACH + i:REACH + i + height, REACH + j:REACH + j + width].reshape(
        x_bhnd.shape)


def inside(grid: tuple[int, int]) -> np.ndarray:
  """Returns (N, 9): whether a neighbour lies in the grid."""
  height, width = grid
  row, column = np.divmod(np.arange(height * width), width)
  return np.stack([(row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
                   for i, j in NEIGHBOURS], axis=-1)


def distances(grid: tuple[int, int], keys: tuple[int, int], reference_grid: tuple[int, int]):
  """Returns (rows, columns, 2) float32: every distance, in rows and columns, between a query of a
  grid and the centre of the cells that a pooled key averages, on a logarithmic scale.

  sign(x) log2(|x| + 1) / log2(8) of x = 8 distance / (side - 1), where side is that of the
  reference grid, with which the model was trained.
  """
  axes = []
  for side, count, reference_side in zip(grid, keys, reference_grid, strict=True):
    cells = side // count
    steps = np.arange(2 * side - cells) - (side - cells) - (cells - 1) / 2
    x = 8 * steps / (reference_side - 1)
    axes.append(np.sign(x) * np.log2(np.abs(x) + 1) / np.log2(8))
  return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)


def bias(table_rch, grid: tuple[int, int], keys: tuple[int, int]):
  """Returns the biases (h, N, P) of all queries and pooled keys, from a table over their distances
  (rows, columns, h), see `distances`. The column of each key is a window of the table."""
  table = jnp.moveaxis(table_rch, -1, 0)
  for axis, side, count in ((2, grid[1], keys[1]), (1, grid[0], keys[0])):
    cells = side // count
    starts = [(count - 1 - key) * cells for key in range(count)]
    table = _stack((jax.lax.slice_in_dim(table, start, start + side, axis=axis)
                    for start in starts), -1)
  # (h, height, width, key column, key row)
  return table.swapaxes(-1, -2).reshape(table.shape[0], math.prod(grid), math.prod(keys))
