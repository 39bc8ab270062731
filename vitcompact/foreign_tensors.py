"""Values in others' checkpoints: which are weights, and as which arrays we take them."""
import jax.numpy as jnp
import numpy as np


def is_tensor(value) -> bool:
  """Whether a value is an array, not a record such as an epoch, an accuracy or the decay of an
  average: no parameter of a model is a single number."""
  return hasattr(value, "dtype") and bool(getattr(value, "shape", ()))


def is_float(value) -> bool:
  """Whether a value is a tensor of floating point numbers, NumPy's, JAX's or PyTorch's."""
  if not is_tensor(value):
    return False
  if hasattr(value, "is_floating_point"):
    return bool(value.is_floating_point())
  return jnp.issubdtype(value.dtype, jnp.floating)


def to_float32(name: str, value) -> np.ndarray:
  """A tensor's values; ValueError, one line, where it is none or has to be converted first."""
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
    # NumPy has no bfloat16 of PyTorch's, and takes nothing with a gradient or from another device.
    if hasattr(value, "detach"):
      value = value.detach().cpu().float().numpy()
    with np.errstate(over="ignore"):   # to infinity, which is looked for
      return np.asarray(value).astype(np.float32, copy=False)
  except Exception as error:  # of whatever library the tensor is
    reason = str(error).split("\n")[0]
    raise ValueError(f"{name}, a {type(value).__name__} of {value.dtype}, cannot become a NumPy "
                     f"array: {reason}") from error
