"""Fused attention from other libraries: cuDNN, JAX's splash kernel for TPUs, tokamax.

Each takes queries (B, N, h, d), keys (B, M, h, d), values (B, M, h, e) and a bias (B, M) of the
keys or None, and returns (B, N, h, e) in the values' dtype.
"""
import math

import jax
import jax.numpy as jnp

FORMS = ("cudnn", "splash", "tokamax")
LANES = 128   # of a TPU, and the length of splash's blocks


def channels(query_width: int, value_width: int, biased: bool) -> int:
  """Returns the common width of queries, keys and values for cuDNN, a multiple of 8."""
  return -(-max(query_width + 2 * biased, value_width) // 8) * 8


def with_bias_channels(query_bnhd, key_bmhd, bias_bm):
  """Adds two channels to queries and keys so that their scores, at the same scale, include the bias
  without forming a map of it.

  Queries have 1 in both; keys have the bias in one, and its rounding error in the other.
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


def _pad(x_bnhd, axis: int, size: int):
  return jnp.pad(x_bnhd, [(0, size - x_bnhd.shape[axis] if i == axis else 0) for i in range(4)])


def cudnn(query_bnhd, key_bmhd, value_bmhe, bias_bm=None):
  """Calls cuDNN through jax.nn, which needs a common width: narrower arrays are padded with zeros.
  """
  scale, width = query_bnhd.shape[-1] ** -0.5, value_bmhe.shape[-1]
  common = channels(query_bnhd.shape[-1], width, bias_bm is not None)
  query, key = with_bias_channels(query_bnhd, key_bmhd, bias_bm)
  out = jax.nn.dot_product_attention(*(_pad(x, 3, common) for x in (query, key, value_bmhe)),
                                     scale=scale, implementation="cudnn")
  return out[..., :width]


def splash(query_bnhd, key_bmhd, value_bmhe, bias_bm=None, *, interpret: bool = False):
  """Calls JAX's kernel for TPUs; lengths are padded to its blocks, and the padding is masked."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  queries, keys, heads = *(x.shape[1] for x in (query_bnhd, key_bmhd)), query_bnhd.shape[2]
  scaled, key = with_bias_channels(query_bnhd, key_bmhd, bias_bm)
  scaled = scaled * query_bnhd.shape[-1] ** -0.5
  rows, columns = (-(-n // LANES) * LANES for n in (queries, keys))
  with jax.ensure_compile_time_eval():
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((rows, columns))] * heads), interpret=interpret)
  segments = kernel.SegmentIds(jnp.zeros(rows, jnp.int32),
                               (jnp.arange(columns) >= keys).astype(jnp.int32))
  arrays = [_pad(x, 1, n).swapaxes(1, 2) for x, n in
            ((scaled, rows), (key, columns), (value_bmhe, columns))]
  out_bhne = jax.vmap(lambda *one: attend(*one, segment_ids=segments))(*arrays)
  return out_bhne.swapaxes(1, 2)[:, :queries].astype(value_bmhe.dtype)


def tokamax(query_bnhd, key_bmhd, value_bmhe, bias_bm=None):
  """Calls the tokamax library, if it is installed."""
  try:
    import tokamax as library
  except ImportError:
    raise ValueError("attention form 'tokamax': the package tokamax is not installed; "
                     "pip install tokamax, or choose another form") from None
  bias = None if bias_bm is None else bias_bm[:, None, None]
  return library.dot_product_attention(query_bnhd, key_bmhd, value_bmhe, bias=bias,
                                       scale=math.sqrt(1 / query_bnhd.shape[-1]))
