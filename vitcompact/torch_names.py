"""Describes the names and layouts of a model's PyTorch weights, and converts between layouts."""
from typing import NamedTuple

import jax
import numpy as np


class Positions(NamedTuple):
  """How to resize rows (1, prefix + h * w, D) or (prefix + h * w, D), one for each position, to the
  grid of another image size.

  grid: (h, w) of this model; prefix: number of rows before the grid's; method: interpolation,
  "bicubic", "bilinear" or "antialiased" (bicubic, as in timm). summed: the rows are weights of a
  sum over tokens, and shrink as the number of tokens grows. tied: the original grid cannot be
  inferred from a state dict; they are resized only if their original model is known.
  """
  grid: tuple[int, int]
  prefix: int = 0
  method: str = "bicubic"
  summed: bool = False
  tied: bool = False


class Entry(NamedTuple):
  """One tensor of a PyTorch state dict and the leaves of ours that it holds.

  torch: its name: timm's if timm has the model, else the authors'.
  leaves: names in our variables, collection first: "params/blocks_0/attn/query/kernel". Several if
    PyTorch fuses what we keep separate, in the order of the fused rows.
  layout: how the arrays correspond:
    "same"        vectors, tokens, positions: equal shape
    "linear"      (out, in) <-> (in, out)
    "conv"        (O, I/groups, kh, kw) <-> (kh, kw, I/groups, O), or (O, I, 1, 1) <-> (I, O), or
                  (O, I/groups, k) <-> (k, I/groups, O)
    "heads"       rows (heads * d, in), fused leaves stacked by rows <-> each (in, heads, d)
    "heads_bias"  (heads * d,), fused likewise <-> each (heads, d)
    "out"         (out, heads * d) <-> (heads, d, out)
  positions: how to resize it, if it holds one row per position of a grid.
  patches: whether it is the patch embedding's kernel, which can be resampled to other patch sizes.
  part: (i, n): it holds the i-th of n equal parts of its leaf, along the last axis.
  """
  torch: str
  leaves: tuple[str, ...]
  layout: str = "same"
  positions: Positions | None = None
  patches: bool = False
  part: tuple[int, int] | None = None

  def shape(self, shapes) -> tuple[int, ...]:
    """The tensor's shape, from {leaf: shape}."""
    leaf_shapes = [tuple(shapes[leaf]) for leaf in self.leaves]
    if self.part is not None:
      leaf_shapes = [(*shape[:-1], shape[-1] // self.part[1]) for shape in leaf_shapes]
    return torch_shape(self.layout, leaf_shapes)

  def tensor(self, arrays) -> np.ndarray:
    """The tensor, from {leaf: array}."""
    leaves = [np.asarray(arrays[leaf]) for leaf in self.leaves]
    if self.part is not None:
      leaves = [np.split(array, self.part[1], axis=-1)[self.part[0]] for array in leaves]
    return np.ascontiguousarray(to_tensor(self.layout, leaves))


def leaves_of(entries: list[Entry], tensors, shapes) -> dict[str, np.ndarray]:
  """{leaf: array}, inverse of `Entry.tensor`; tensors: {PyTorch's name: array}, shapes: {leaf:
  shape}."""
  out, parts = {}, {}
  for entry in entries:
    count = 1 if entry.part is None else entry.part[1]
    part_shapes = [(*shapes[leaf][:-1], shapes[leaf][-1] // count) for leaf in entry.leaves]
    arrays = to_leaves(entry.layout, tensors[entry.torch], part_shapes)
    for leaf, array in zip(entry.leaves, arrays, strict=True):
      parts.setdefault(leaf, []).append(array)
  for leaf, arrays in parts.items():
    out[leaf] = np.ascontiguousarray(arrays[0] if len(arrays) == 1
                                     else np.concatenate(arrays, axis=-1))
  return out


def linear(torch: str, ours: str, *, use_bias: bool = True) -> list[Entry]:
  """Entries of a linear layer; `ours` is the path of its module, without the collection."""
  return _layer(torch, ours, "linear", use_bias)


def linear_in_parts(torch: list[str], ours: str) -> list[Entry]:
  """Entries of one linear layer of ours that is several in PyTorch, joined along their outputs."""
  if len(torch) == 1:
    return linear(torch[0], ours)
  return [entry._replace(part=(i, len(torch))) for i, name in enumerate(torch)
          for entry in linear(name, ours)]


def conv(torch: str, ours: str, *, use_bias: bool = True) -> list[Entry]:
  """Entries of a convolution, or of a 1x1 convolution that we keep as a Dense."""
  return _layer(torch, ours, "conv", use_bias)


def patches(torch: str, ours: str, *, use_bias: bool = True) -> list[Entry]:
  """Entries of the patch embedding's convolution."""
  kernel, *bias = conv(torch, ours, use_bias=use_bias)
  return [kernel._replace(patches=True), *bias]


def _layer(torch, ours, layout, use_bias):
  bias = [Entry(f"{torch}.bias", (f"params/{ours}/bias",))] if use_bias else []
  return [Entry(f"{torch}.weight", (f"params/{ours}/kernel",), layout), *bias]


def norm(torch: str, ours: str, *, running: bool = False) -> list[Entry]:
  """Entries of a norm, with running statistics if it is a batch norm."""
  entries = [Entry(f"{torch}.weight", (f"params/{ours}/scale",)),
             Entry(f"{torch}.bias", (f"params/{ours}/bias",))]
  if running:
    entries += [Entry(f"{torch}.running_{name}", (f"batch_stats/{ours}/{name}",))
                for name in ("mean", "var")]
  return entries


def conv_norm(conv_torch: str, norm_torch: str, ours: str) -> list[Entry]:
  """The tensors of a `layers.ConvNorm`."""
  return [*conv(conv_torch, f"{ours}/conv", use_bias=False),
          *norm(norm_torch, f"{ours}/norm", running=True)]


def heads(torch: str, ours: str, names: tuple[str, ...], *, use_bias: bool = True) -> list[Entry]:
  """Entries of a projection to heads that fuses the modules `names` of `ours`, as qkv does."""
  kernels = tuple(f"params/{ours}/{name}/kernel" for name in names)
  biases = tuple(f"params/{ours}/{name}/bias" for name in names)
  bias = [Entry(f"{torch}.bias", biases, "heads_bias")] if use_bias else []
  return [Entry(f"{torch}.weight", kernels, "heads"), *bias]


def qkv(torch: str, ours: str, *, fused: bool = True, use_bias: bool = True,
        key_bias: bool = True) -> list[Entry]:
  """Entries of the projections to queries, keys and values, under timm's names: one fused tensor,
  or (fused=False) three. If keys have no bias, the other biases are separate tensors."""
  names = ("query", "key", "value")
  if not fused:
    return [entry for name in names
            for entry in heads(f"{torch}.{name[0]}_proj", ours, (name,),
                               use_bias=use_bias and (key_bias or name != "key"))]
  entries = heads(f"{torch}.qkv", ours, names, use_bias=use_bias and key_bias)
  if use_bias and not key_bias:
    entries += [Entry(f"{torch}.{name[0]}_bias", (f"params/{ours}/{name}/bias",), "heads_bias")
                for name in ("query", "value")]
  return entries


def out(torch: str, ours: str) -> list[Entry]:
  """Entries of the output projection of attention."""
  return [Entry(f"{torch}.weight", (f"params/{ours}/kernel",), "out"),
          Entry(f"{torch}.bias", (f"params/{ours}/bias",))]


def torch_shape(layout: str, shapes) -> tuple[int, ...]:
  """Shape of the tensor that holds leaves of these shapes."""
  first = tuple(shapes[0])
  if layout == "linear":
    return first[::-1]
  if layout == "conv":
    return (first[-1], first[-2], *(first[:-2] or (1, 1)))
  if layout == "heads":
    return (sum(n * d for _, n, d in shapes), first[0])
  if layout == "heads_bias":
    return (sum(n * d for n, d in shapes),)
  if layout == "out":
    return (first[2], first[0] * first[1])
  assert layout == "same", layout
  return first


def to_tensor(layout: str, leaves: list[np.ndarray]) -> np.ndarray:
  """The tensor that holds `leaves`."""
  first = leaves[0]
  if layout == "linear":
    return first.T
  if layout == "conv":
    first = first[None, None] if first.ndim == 2 else first
    return np.moveaxis(first, (-1, -2), (0, 1))
  if layout == "heads":
    return np.concatenate([leaf.reshape(len(leaf), -1).T for leaf in leaves])
  if layout == "heads_bias":
    return np.concatenate([leaf.reshape(-1) for leaf in leaves])
  if layout == "out":
    return first.reshape(-1, first.shape[2]).T
  return first


def to_leaves(layout: str, tensor: np.ndarray, shapes) -> list[np.ndarray]:
  """Inverse of `to_tensor`: leaves of these shapes from a tensor of `torch_shape`."""
  if layout in ("linear", "out"):
    return [tensor.T.reshape(shapes[0])]
  if layout == "conv":
    return [np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(shapes[0])]
  if layout in ("heads", "heads_bias"):
    rows = np.cumsum([np.prod(shape[-2:]) for shape in shapes])[:-1]
    return [part.T.reshape(shape)
            for part, shape in zip(np.split(tensor, rows), shapes, strict=True)]
  return [tensor]


def resize_positions(rows: np.ndarray, stored: tuple[int, int], positions: Positions):
  """(..., prefix + H * W, D) -> (..., prefix + h * w, D): rows of the `stored` grid (H, W) resized.

  As torch's interpolate with align_corners=False: "bicubic" (a = -0.75, edges clamped) or
  "bilinear" without antialiasing, "antialiased" with it (bicubic, a = -0.5). Prefix rows are kept.
  """
  grid, prefix = positions.grid, positions.prefix
  lines, columns = (resize_matrix(old, new, positions.method)
                    for old, new in zip(stored, grid, strict=True))
  plane = rows[..., prefix:, :].astype(np.float64).reshape(*stored, -1)
  plane = np.einsum("hi,wj,ijd->hwd", lines, columns, plane, optimize=True)
  plane = plane.reshape(*rows.shape[:-2], grid[0] * grid[1], -1).astype(rows.dtype)
  out = np.concatenate([rows[..., :prefix, :], plane], axis=-2)
  if positions.summed:
    out = out * rows.dtype.type(stored[0] * stored[1] / (grid[0] * grid[1]))
  return out


def resize_patches(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """(O, I, h, w) -> (O, I, *size): the kernel resampled for patches of another size.

  Its response to a resized patch is closest, in least squares over all patches, to that of the old
  kernel to the original patch: pinv(B^T) w for the resizing matrix B (bicubic, antialiased).
  FlexiViT, arXiv 2212.08013, section 3.4.
  """
  rows, columns = (np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (new, old), "cubic"),
                              np.float64)
                   for old, new in zip(kernel.shape[2:], size, strict=True))
  new = np.einsum("hi,wj,ocij->ochw", np.linalg.pinv(rows.T), np.linalg.pinv(columns.T),
                  kernel.astype(np.float64), optimize=True)
  return new.astype(kernel.dtype)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
  """(O, 3, h, w) -> (O, channels, h, w): an RGB kernel adapted to another number of channels.

  As in timm: for one channel, the sum over RGB (a grey image gives the same output as in RGB); for
  others, RGB repeated and scaled by 3 / channels.
  """
  if channels == 1:
    return kernel.sum(axis=1, keepdims=True)
  return kernel[:, np.arange(channels) % 3] * np.float32(3 / channels)


def resize_matrix(old: int, new: int, method: str) -> np.ndarray:
  """(new, old) weights that resample a line of `old` points to `new`."""
  if method == "antialiased":
    return _antialiased(old, new)
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  reach = {"bicubic": 2, "bilinear": 1}[method]
  kernel = _cubic if method == "bicubic" else lambda x: np.maximum(0, 1 - np.abs(x))
  out = np.zeros((new, old))
  for step in range(1 - reach, reach + 1):
    point = np.floor(centre).astype(int) + step
    np.add.at(out, (np.arange(new), np.clip(point, 0, old - 1)), kernel(centre - point))
  return out


def _antialiased(old: int, new: int) -> np.ndarray:
  """As `resize_matrix`, with a kernel that widens when downsampling, normalised at the edges."""
  step = old / new
  distance = np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * step
  weights = _cubic(distance / max(step, 1), a=-0.5)
  return weights / weights.sum(axis=1, keepdims=True)


def _cubic(x, a=-0.75):
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0))
