"""Values in other programs' checkpoints: tells weights from records, and converts them to NumPy."""
import jax.numpy as jnp
import numpy as np


def is_tensor(value) -> bool:
  """Whether a value is an array with at least one dimension: no parameter is a single number, but
  records are, such as an epoch, an accuracy or the decay of an average."""
  return hasattr(value, "dtype") and bool(getattr(value, "shape", ()))


def is_float(value) -> bool:
  """Whether a value is a tensor of floating point numbers, NumPy's, JAX's or PyTorch's."""
  if not is_tensor(value):
    return False
  if hasattr(value, "is_floating_point"):
    return bool(value.is_floating_point())
  return jnp.issubdtype(value.dtype, jnp.floating)


def to_float32(name: str, value) -> np.ndarray:
  """A tensor as a float32 array; ValueError, one line, if it is not a plain floating point tensor.
  """
  if not is_tensor(value):
    raise ValueError(f"{name} is a {type(value).__name__}, not an array of floating point numbers")
  if getattr(value, "is_quantized", False):
    raise ValueError(f"{name} is quantized, not an array of floating point numbers; pass "
                     "{name: tensor.dequantize()}")
  if "sparse" in str(getattr(value, "layout", "")):
    raise ValueError(f"{name} is sparse; pass {{name: tensor.to_dense()}}")
  if getattr(value, "is_meta", False):
    raise ValueError(f"{name} is on the meta device, without values; load them first")
  if not is_float(value):
    raise ValueError(f"{name} is {value.dtype}, not an array of floating point numbers; quantized "
                     "weights have to be dequantized first")
  try:
    # NumPy cannot read PyTorch's bfloat16, nor tensors with gradients or on another device.
    if hasattr(value, "detach"):
      value = value.detach().cpu().float().numpy()
    with np.errstate(over="ignore"):   # overflow gives infinity, which is checked later
      return np.asarray(value).astype(np.float32, copy=False)
  except Exception as error:  # the tensor may be from any library
    reason = str(error).split("\n")[0]
    raise ValueError(f"{name}, a {type(value).__name__} of {value.dtype}, cannot become a NumPy "
                     f"array: {reason}") from error
