"""Pallas kernels for block-sparse attention.

A kernel is imported only when it is needed: on most machines none is.
"""
from collections.abc import Callable

HOPPER = "9.0"
LIST_BYTES = 2 ** 19  # of scalar memory, for the lists of chosen blocks of an image


def refusal(device, query_bfqad, key_bfkcd, value_bfkce, chosen_bfqs) -> str:
  """Returns why no kernel can compute block-sparse attention of these arrays; empty if one can.

  device: an `attention.Device`. The arrays may be `jax.ShapeDtypeStruct`s.
  """
  dtypes = {str(x.dtype) for x in (query_bfqad, key_bfkcd, value_bfkce)}
  if device.platform == "tpu":
    if device.count > 1:
      return f"the compiler of TPUs cannot split a kernel over {device.count} devices"
    return _tpu_refusal(query_bfqad, key_bfkcd, value_bfkce, chosen_bfqs, dtypes)
  if device.platform != "gpu" or device.capability != HOPPER:
    return ("kernels are for TPUs and for GPUs of compute capability "
            f"{HOPPER}, not for {device.platform} {device.capability}".rstrip())
  if dtypes != {"bfloat16"}:
    return f"the GPU kernel is for bfloat16, not for {sorted(dtypes)}"
  if (areas := (query_bfqad.shape[3], key_bfkcd.shape[3])) != (64, 64):
    return f"the GPU kernel is for blocks of 64 tokens, not for {areas}"
  if query_bfqad.shape[4] != 64 or value_bfkce.shape[4] not in (64, 128):
    return ("the GPU kernel is for heads of width 64 and values of width 64 or 128, not for "
            f"{query_bfqad.shape[4]} and {value_bfkce.shape[4]}")
  return ""


def _tpu_refusal(query, key, value, chosen, dtypes):
  from vitcompact.kernels import block_sparse_tpu
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"the TPU kernel is for bfloat16 or float32, not for {sorted(dtypes)}"
  tokens = max(x.shape[2] * x.shape[3] for x in (query, key))
  widths = query.shape[4], value.shape[4]
  need = block_sparse_tpu.resident_bytes(tokens, *widths, query.dtype.itemsize)
  if need > (most := block_sparse_tpu.RESIDENT_BYTES):
    return f"the TPU kernel holds a head in {most} bytes; {tokens} tokens of it need {need}"
  if (need := chosen.dtype.itemsize * chosen.size // chosen.shape[0]) > LIST_BYTES:
    return f"the TPU kernel holds an image's lists in {LIST_BYTES} bytes; these have {need}"
  return ""


def block_attention(platform: str) -> Callable:
  """Returns the platform's kernel, for arrays without a `refusal`; see `block_sparse.attention`."""
  if platform == "tpu":
    from vitcompact.kernels import block_sparse_tpu as kernels
  else:
    from vitcompact.kernels import block_sparse_gpu as kernels
  return kernels.attend
