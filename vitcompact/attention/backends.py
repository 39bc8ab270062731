"""Ways to compute softmax(q k^T / sqrt(d) + bias) v whose memory does not grow with all pairs.

Each takes queries (B, N, h, d), keys (B, M, h, d), values (B, M, h, e) and a bias (B, M) of the
keys or None, and gives (B, N, h, e) in the values' dtype. `attention.backend` chooses.
"""
import functools
import math

import jax
import jax.numpy as jnp

# Scores that a tile of the backward pass holds, of all keys.
TILE_ENTRIES = 2 ** 20
# Queries and keys of a step forward on a CPU: 1 MB of scores, which its cache holds. Fewer queries
# are slower products; a backward pass in such steps took a tenth longer than with all keys.
STEP_QUERIES, STEP_KEYS = 1024, 256
TPU_BLOCK = 128     # splash's blocks, and the lanes of a TPU


def tiled(query_bnhd, key_bmhd, value_bmhe, bias_bm=None, *, in_turn: str | None):
  """Tiles of queries in turn, computed again in the backward pass.

  in_turn: for the sake of a CPU's cache, "heads" (and keys of the forward pass) or "images", all
    heads of one at once: of a few hundred tokens the scores stay in the cache, and an allocation
    this small is not given back to the system after each layer. None: the tiles of all images.
  """
  return _tiled(in_turn, query_bnhd * query_bnhd.shape[-1] ** -0.5, key_bmhd, value_bmhe, bias_bm)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(in_turn, query_bnhd, key_bmhd, value_bmhe, bias_bm):
  return _tiled_forward(in_turn, query_bnhd, key_bmhd, value_bmhe, bias_bm)[0]


def _of_heads(head, in_turn: str | None):
  """`head` of arrays (N, ...) and a bias (M,), for arrays (B, N, h, ...) and biases (B, M)."""
  def image(arrays_nh, bias_m):
    out_hn = jax.vmap(lambda *arrays_n: head(*arrays_n, bias_m))(*_swapped(0, arrays_nh))
    return _swapped(0, out_hn)

  def images_in_turn(arrays_bnh, bias_bm):
    return jax.lax.map(lambda one: image(*one), (arrays_bnh, bias_bm))

  def heads_in_turn(arrays_bnh, bias_bm):
    # Laid out before the loop: in it, images of 577 tokens took a twentieth longer.
    batch, _, heads = arrays_bnh[0].shape[:3]
    arrays_gn = [x.reshape(batch * heads, *x.shape[2:]) for x in _swapped(1, arrays_bnh)]
    bias_gm = None if bias_bm is None else jnp.repeat(bias_bm, heads, axis=0)
    out_gn = jax.lax.map(lambda one: head(*one), (*arrays_gn, bias_gm))
    return _swapped(1, jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), out_gn))

  return {"images": images_in_turn, "heads": heads_in_turn, None: jax.vmap(image)}[in_turn]


def _swapped(axis: int, arrays):
  """Arrays of tokens and heads in the other order."""
  return jax.tree.map(lambda x: x.swapaxes(axis, axis + 1), arrays)


def _most_rows(keys: int) -> int:
  """Queries of a tile over all keys."""
  return max(64, TILE_ENTRIES // keys)


def _over_tiles(fn, most: int, *arrays_n):
  """fn of even tiles of arrays (N, ...), `most` rows in each at the most; its results (N, ...)."""
  count = arrays_n[0].shape[0]
  if count <= most:
    return fn(*arrays_n)
  out = jax.lax.map(lambda tiles: fn(*tiles), tuple(_tiles(x, most) for x in arrays_n))
  return jax.tree.map(lambda x: _joined(x, count), out)


def _tiles(x_n, most: int):
  """(N, ...) -> (tiles, rows, ...), zeros behind the last."""
  tiles = -(-x_n.shape[0] // most)
  rows = -(-x_n.shape[0] // tiles)
  padded = jnp.pad(x_n, [(0, tiles * rows - x_n.shape[0])] + [(0, 0)] * (x_n.ndim - 1))
  return padded.reshape(tiles, rows, *x_n.shape[1:])


def _joined(x_tn, count: int):
  return x_tn.reshape(-1, *x_tn.shape[2:])[:count]


def _scores(query_nd, key_md, bias_m):
  scores_nm = jnp.matmul(query_nd, key_md.T, preferred_element_type=jnp.float32)
  return scores_nm if bias_m is None else scores_nm + bias_m[None]


def attend_rows(query_nd, key_md, value_me, bias_m, step: int):
  """(attention (N, e), log of the sum of exponentials (N, 1) in float32); queries are scaled.

  step: so many keys are seen at a time, those that such steps leave over first.
  """
  def seen(key_sd, value_se, bias_s):
    scores_ns = _scores(query_nd, key_sd, bias_s)
    # Keys without size, all of a step's perhaps, score -inf.
    top_n1 = jnp.maximum(scores_ns.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    exp_ns = jnp.exp(scores_ns - top_n1)
    return top_n1, exp_ns.sum(axis=-1, keepdims=True), jnp.matmul(
        exp_ns.astype(value_se.dtype), value_se, preferred_element_type=jnp.float32)

  def more(before, keys):
    top_n1, *sums = before
    new_top_n1, *new_sums = seen(*keys)
    both_n1 = jnp.maximum(top_n1, new_top_n1)
    old, new = jnp.exp(top_n1 - both_n1), jnp.exp(new_top_n1 - both_n1)
    return (both_n1, *(old * x + new * y for x, y in zip(sums, new_sums, strict=True))), None

  keys, first = (key_md, value_me, bias_m), (len(key_md) - 1) % step + 1
  state = seen(*jax.tree.map(lambda x: x[:first], keys))
  if first < len(key_md):
    steps = jax.tree.map(lambda x: x[first:].reshape(-1, step, *x.shape[1:]), keys)
    state = jax.lax.scan(more, state, steps)[0]
  top_n1, total_n1, out_ne = state
  # Divided after the product: so many quotients fewer.
  return (out_ne / total_n1).astype(value_me.dtype), top_n1 + jnp.log(total_n1)


def _tiled_forward(in_turn, query_bnhd, key_bmhd, value_bmhe, bias_bm):
  keys = key_bmhd.shape[1]
  most, step = (STEP_QUERIES, STEP_KEYS) if in_turn else (_most_rows(keys), keys)

  def head(query_nd, *keys):
    return _over_tiles(lambda tile: attend_rows(tile, *keys, step), most, query_nd)

  arrays = query_bnhd, key_bmhd, value_bmhe
  out_bnhe, log_sum_bnh1 = _of_heads(head, in_turn)(arrays, bias_bm)
  return out_bnhe, (*arrays, bias_bm, out_bnhe, log_sum_bnh1)


def _tiled_backward(in_turn, residuals, d_out_bnhe):
  query_bnhd, key_bmhd, value_bmhe, bias_bm, out_bnhe, log_sum_bnh1 = residuals
  *gradients, d_bias_bmh = _of_heads(_head_backward, in_turn)(
      (query_bnhd, key_bmhd, value_bmhe, out_bnhe, log_sum_bnh1, d_out_bnhe), bias_bm)
  return *gradients, None if bias_bm is None else d_bias_bmh.sum(axis=-1)


def gradients_of_rows(key_md, value_me, bias_m, query_nd, log_sum_n1, shift_n1, d_out_ne):
  """Gradients of query, key, value and the bias (M,), from a sum of out d_out over channels."""
  weights_nm = jnp.exp(_scores(query_nd, key_md, bias_m) - log_sum_n1)
  d_weights_nm = jnp.matmul(d_out_ne, value_me.T, preferred_element_type=jnp.float32)
  d_scores_nm = weights_nm * (d_weights_nm - shift_n1)
  return (jnp.matmul(d_scores_nm, key_md).astype(query_nd.dtype),
          jnp.matmul(d_scores_nm.T, query_nd, preferred_element_type=jnp.float32),
          jnp.matmul(weights_nm.T, d_out_ne, preferred_element_type=jnp.float32),
          d_scores_nm.sum(axis=0))


def _head_backward(query_nd, key_md, value_me, out_ne, log_sum_n1, d_out_ne, bias_m):
  """Gradients of query, key, value and bias; those of the keys are summed tile by tile."""
  count, keys = query_nd.shape[0], (key_md, value_me, bias_m)
  shift_n1 = jnp.sum(out_ne.astype(jnp.float32) * d_out_ne, axis=-1, keepdims=True)

  def step(sums, tile):
    d_query_nd, *new = gradients_of_rows(*keys, *tile)
    return [None if total is None else total + d
            for total, d in zip(sums, new, strict=True)], d_query_nd

  sums = [None if x is None else jnp.zeros(x.shape, jnp.float32) for x in keys]
  arrays = (query_nd, log_sum_n1, shift_n1, d_out_ne)
  most = _most_rows(len(key_md))
  if count <= most:
    sums, d_query_nd = step(sums, arrays)
  else:
    sums, d_query_tnd = jax.lax.scan(step, sums, [_tiles(x, most) for x in arrays])
    d_query_nd = _joined(d_query_tnd, count)
  return d_query_nd, *(None if x is None else total.astype(x.dtype)
                       for x, total in zip(keys, sums, strict=True))


_tiled.defvjp(_tiled_forward, _tiled_backward)


def channels(query_width: int, value_width: int, biased: bool) -> int:
  """The one width of queries, keys and values that cuDNN is called with, a multiple of 8."""
  return -(-max(query_width + 2 * biased, value_width) // 8) * 8


def with_bias_channels(query_bnhd, key_bmhd, bias_bm):
  """Queries and keys whose scores, by the same scale, hold the bias: no map of it is formed.

  Two channels more: 1 of the queries meets the bias of the keys, and what its dtype cut off.
  """
  if bias_bm is None:
    return query_bnhd, key_bmhd
  unscaled_bm = bias_bm.astype(jnp.float32) * query_bnhd.shape[-1] ** 0.5
  high_bm = unscaled_bm.astype(key_bmhd.dtype)
  low_bm = (unscaled_bm - high_bm.astype(jnp.float32)).astype(key_bmhd.dtype)
  extra_bmh2 = jnp.broadcast_to(jnp.stack([high_bm, low_bm], axis=-1)[:, :, None],
                                (*key_bmhd.shape[:3], 2))
  ones_bnh2 = jnp.ones((*query_bnhd.shape[:3], 2), query_bnhd.dtype)
  return (jnp.concatenate([query_bnhd, ones_bnh2], axis=-1),
          jnp.concatenate([key_bmhd, extra_bmh2], axis=-1))


def _padded(x_bnhd, axis: int, size: int):
  return jnp.pad(x_bnhd, [(0, size - x_bnhd.shape[axis] if i == axis else 0) for i in range(4)])


def cudnn(query_bnhd, key_bmhd, value_bmhe, bias_bm=None):
  """cuDNN's, through jax.nn, which wants one width: the narrower arrays get channels of zeros."""
  scale, width = query_bnhd.shape[-1] ** -0.5, value_bmhe.shape[-1]
  common = channels(query_bnhd.shape[-1], width, bias_bm is not None)
  query, key = with_bias_channels(query_bnhd, key_bmhd, bias_bm)
  out = jax.nn.dot_product_attention(*(_padded(x, 3, common) for x in (query, key, value_bmhe)),
                                     scale=scale, implementation="cudnn")
  return out[..., :width]


def splash(query_bnhd, key_bmhd, value_bmhe, bias_bm=None, *, interpret: bool = False):
  """JAX's kernel for TPUs; lengths are padded to its blocks, and the padding is hidden."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  queries, keys, heads = *(x.shape[1] for x in (query_bnhd, key_bmhd)), query_bnhd.shape[2]
  scaled, key = with_bias_channels(query_bnhd, key_bmhd, bias_bm)
  scaled = scaled * query_bnhd.shape[-1] ** -0.5
  rows, columns = (-(-n // TPU_BLOCK) * TPU_BLOCK for n in (queries, keys))
  with jax.ensure_compile_time_eval():
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((rows, columns))] * heads), interpret=interpret)
  segments = kernel.SegmentIds(jnp.zeros(rows, jnp.int32),
                               (jnp.arange(columns) >= keys).astype(jnp.int32))
  arrays = [_padded(x, 1, n).swapaxes(1, 2) for x, n in
            ((scaled, rows), (key, columns), (value_bmhe, columns))]
  out_bhne = jax.vmap(lambda *one: attend(*one, segment_ids=segments))(*arrays)
  return out_bhne.swapaxes(1, 2)[:, :queries].astype(value_bmhe.dtype)


def tokamax(query_bnhd, key_bmhd, value_bmhe, bias_bm=None):
  """The tokamax library's, if it is installed."""
  try:
    import tokamax as library
  except ImportError:
    raise ValueError("attention backend 'tokamax': the package tokamax is not installed; "
                     "pip install tokamax, or choose another backend") from None
  bias = None if bias_bm is None else bias_bm[:, None, None]
  return library.dot_product_attention(query_bnhd, key_bmhd, value_bmhe, bias=bias,
                                       scale=math.sqrt(1 / query_bnhd.shape[-1]))
