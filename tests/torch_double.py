"""Stand-ins for PyTorch tensors as NumPy sees them; PyTorch itself is not installed."""
import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


class Tensor:
  """dtype: PyTorch's name; the other fields are as PyTorch's attributes of these names."""

  def __init__(self, array, dtype="float32", *, requires_grad=False, device="cpu",
               layout="torch.strided", is_quantized=False):
    self.array = np.asarray(array).astype(DTYPES.get(dtype, dtype))
    self.kind, self.requires_grad, self.device = dtype, requires_grad, device
    self.layout, self.is_quantized, self.is_meta = layout, is_quantized, device == "meta"

  @property
  def shape(self):
    return self.array.shape

  @property
  def dtype(self):
    return f"torch.{self.kind}"

  def is_floating_point(self):
    return "float" in self.kind

  def _changed(self, **changes):
    kept = {name: getattr(self, name) for name in
            ("requires_grad", "device", "layout", "is_quantized")}
    return Tensor(self.array, **{"dtype": self.kind, **kept, **changes})

  def detach(self):
    return self._changed(requires_grad=False)

  def cpu(self):
    if self.is_meta:
      raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    return self._changed(device="cpu")

  def float(self):
    return self._changed(dtype="float32")

  def numpy(self):
    if self.requires_grad:
      raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
    if self.device != "cpu":
      raise TypeError(f"can't convert {self.device} device type tensor to numpy.")
    if self.kind in DTYPES or self.layout != "torch.strided" or self.is_quantized:
      raise TypeError(f"Got unsupported ScalarType {self.kind}")
    return self.array

  def __array__(self, dtype=None, copy=None):
    return self.numpy()
