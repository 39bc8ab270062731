"""The language in which a model tells the names and layouts of its PyTorch weights."""
from typing import NamedTuple

import jax
import numpy as np

from vitcompact.methods.attention.sparsifiner import TokenLinks
from vitcompact.methods.ffn.cffn import CompactDense


class Positions(NamedTuple):
  """Learned positions (1, prefix + h * w, D), which an image of another size has others of.

  grid: (h, w) of this model; prefix: rows before the grid's; method: "bicubic" or "bilinear", the
  authors' rule for a grid of another size.
  """
  grid: tuple[int, int]
  prefix: int = 0
  method: str = "bicubic"


class Entry(NamedTuple):
  """One tensor of a PyTorch state dict and the leaves of ours that it holds.

  torch: its name, timm's where timm has the model, else the authors'.
  leaves: names in our variables, collection first: "params/blocks_0/attn/query/kernel". More than
    one where PyTorch fuses what we keep apart; then in the order of the fused rows.
  layout: how the arrays correspond:
    "same"        vectors, tokens, positions: equal shape
    "linear"      (out, in) <-> (in, out)
    "conv"        (O, I/groups, kh, kw) <-> (kh, kw, I/groups, O), or (O, I, 1, 1) <-> (I, O)
    "heads"       rows (heads * d, in), fused leaves below one another <-> each (in, heads, d)
    "heads_bias"  (heads * d,), fused likewise <-> each (heads, d)
    "out"         (out, heads * d) <-> (heads, d, out)
  positions: what to know to resize it, if it holds positions of a grid.
  patches: it is the kernel that patches are embedded with, which other patch sizes can be made of.
  """
  torch: str
  leaves: tuple[str, ...]
  layout: str = "same"
  positions: Positions | None = None
  patches: bool = False


def linear(torch: str, ours: str, *, use_bias: bool = True) -> list[Entry]:
  """Entries of a linear layer; `ours` is the path of its module, without the collection."""
  return _layer(torch, ours, "linear", use_bias)


def conv(torch: str, ours: str, *, use_bias: bool = True) -> list[Entry]:
  """Entries of a convolution, or of a 1x1 convolution that we keep as a Dense."""
  return _layer(torch, ours, "conv", use_bias)


def patches(torch: str, ours: str) -> list[Entry]:
  """Entries of the convolution that embeds patches."""
  kernel, bias = conv(torch, ours)
  return [kernel._replace(patches=True), bias]


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


def heads(torch: str, ours: str, names: tuple[str, ...], *, use_bias: bool = True) -> list[Entry]:
  """Entries of a projection to heads that fuses modules `names` of `ours`, as qkv does."""
  kernels = tuple(f"params/{ours}/{name}/kernel" for name in names)
  biases = tuple(f"params/{ours}/{name}/bias" for name in names)
  bias = [Entry(f"{torch}.bias", biases, "heads_bias")] if use_bias else []
  return [Entry(f"{torch}.weight", kernels, "heads"), *bias]


def out(torch: str, ours: str) -> list[Entry]:
  """Entries of the projection of joined heads."""
  return [Entry(f"{torch}.weight", (f"params/{ours}/kernel",), "out"),
          Entry(f"{torch}.bias", (f"params/{ours}/bias",))]


def block(torch: str, ours: str, module) -> list[Entry]:
  """Entries of a `block.Block`, timm's names. Those of its compact layers, once folded, are ours:

    attn.qkv               rows of the real heads' queries and keys, then all heads' values
    attn.hallucinate.NAME  taps and gains, as they are
    attn.mask_predictor    Sparsifiner's, under its authors' names; those of blocks are ours
    mlp.fc2.a, mlp.fc2.b   the factors, as linear layers; only b has a bias

  DynamicViT's predictors are numbered, as the authors do.
  """
  attn = module.attn
  entries = norm(f"{torch}.norm1", f"{ours}/norm1")
  entries += heads(f"{torch}.attn.qkv", f"{ours}/attn", ("query", "key", "value"),
                   use_bias=attn.qkv_bias)
  entries += out(f"{torch}.attn.proj", f"{ours}/attn/out")
  entries += [Entry(f"{torch}.attn.hallucinate.{name}",
                    (f"params/{ours}/attn/hallucinate/{name}",)) for name in _filters(attn)]
  entries += links_predictor(f"{torch}.attn.mask_predictor", f"{ours}/links", module.links)
  entries += norm(f"{torch}.norm2", f"{ours}/norm2")
  for name in ("fc1", "fc2"):
    path = f"{torch}.mlp.{name}", f"{ours}/mlp/{name}"
    layer = getattr(module.mlp, name)
    if isinstance(layer, CompactDense) and layer.deploy:
      entries += linear(f"{path[0]}.a", f"{path[1]}/a", use_bias=False)
      entries += linear(f"{path[0]}.b", f"{path[1]}/b")
    else:
      entries += linear(*path)
  if module.reduce_tokens.predict is not None:
    stage = module.reduce_tokens.predict().stage
    entries += predictor(f"score_predictor.{stage}", f"{ours}/predict_tokens")
  return entries


def predictor(torch: str, ours: str) -> list[Entry]:
  """Entries of a DynamicViT predictor, the authors' names."""
  return [*norm(f"{torch}.in_conv.0", f"{ours}/norm"),
          *linear(f"{torch}.in_conv.1", f"{ours}/in_proj"),
          *linear(f"{torch}.out_conv.0", f"{ours}/out1"),
          *linear(f"{torch}.out_conv.2", f"{ours}/out2"),
          *linear(f"{torch}.out_conv.4", f"{ours}/out3")]


def links_predictor(torch: str, ours: str, links) -> list[Entry]:
  """Entries of a predictor of links, or none."""
  if links is None:
    return []
  entries = []
  if isinstance(links, TokenLinks):
    entries = [Entry(f"{torch}.{theirs}", (f"params/{ours}/{name}",))
               for theirs, name in (("proj_n", "down"), ("proj_back_n", "up"))]
  else:
    entries = [Entry(f"{torch}.{name}", (f"params/{ours}/{name}",)) for name in ("query", "key")]
  for theirs, name in (("proj_c_q", "reduce_query"), ("proj_c_k", "reduce_key")):
    if links.spec.variant == "code":
      entries += linear(f"{torch}.{theirs}", f"{ours}/{name}")
  return entries


def _filters(attn) -> list[str]:
  """Names of the leaves of an attention's filters."""
  if attn.real_heads == attn.heads:
    return []
  if attn.spec.site == "logits":
    return ["mix", "taps"]
  on_grid = attn.spec.layout == "grid" and attn.prefix > 0
  gains = [f"{side}_gain" for side, grid in (("key", attn.key_grid), ("query", attn.query_grid))
           if on_grid and grid]
  return ["key_taps", "query_taps", *gains]


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
    return first.T[:, :, None, None] if first.ndim == 2 else first.transpose(3, 2, 0, 1)
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
    return [tensor.transpose(2, 3, 1, 0).reshape(shapes[0])]
  if layout in ("heads", "heads_bias"):
    rows = np.cumsum([np.prod(shape[-2:]) for shape in shapes])[:-1]
    return [part.T.reshape(shape)
            for part, shape in zip(np.split(tensor, rows), shapes, strict=True)]
  return [tensor]


def resize_positions(positions: np.ndarray, prefix: int, stored: tuple[int, int],
                     grid: tuple[int, int], method: str):
  """(1, prefix + H * W, D) -> (1, prefix + h * w, D): prefix rows kept, the stored grid resized.

  As torch's interpolate with align_corners=False and no antialiasing: "bicubic" (a = -0.75, edges
  clamped) or "bilinear".
  """
  rows, columns = (resize_matrix(old, new, method) for old, new in zip(stored, grid, strict=True))
  plane = positions[0, prefix:].astype(np.float64).reshape(*stored, -1)
  plane = np.einsum("hi,wj,ijd->hwd", rows, columns, plane, optimize=True)
  plane = plane.reshape(1, grid[0] * grid[1], -1).astype(positions.dtype)
  return np.concatenate([positions[:, :prefix], plane], axis=1)


def resize_patches(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """(O, I, h, w) -> (O, I, *size): the kernel for patches of another size.

  The one whose response to a resized patch is, in least squares over all patches, that of the old
  kernel to the patch itself: pinv(B^T) w for the matrix B that resizes (bicubic, antialiased).
  FlexiViT, arXiv 2212.08013, section 3.4.
  """
  rows, columns = (np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (new, old), "cubic"),
                              np.float64)
                   for old, new in zip(kernel.shape[2:], size, strict=True))
  new = np.einsum("hi,wj,ocij->ochw", np.linalg.pinv(rows.T), np.linalg.pinv(columns.T),
                  kernel.astype(np.float64), optimize=True)
  return new.astype(kernel.dtype)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
  """(O, 3, h, w) -> (O, channels, h, w): a kernel of RGB for images of other channels.

  As timm: of one, the sum over RGB (a grey image gives what it gives as RGB); of others, RGB over
  and over, scaled by 3 / channels.
  """
  if channels == 1:
    return kernel.sum(axis=1, keepdims=True)
  return kernel[:, np.arange(channels) % 3] * np.float32(3 / channels)


def resize_matrix(old: int, new: int, method: str) -> np.ndarray:
  """(new, old) weights that resample a line of points."""
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  reach = {"bicubic": 2, "bilinear": 1}[method]
  kernel = _cubic if method == "bicubic" else lambda x: np.maximum(0, 1 - np.abs(x))
  out = np.zeros((new, old))
  for step in range(1 - reach, reach + 1):
    point = np.floor(centre).astype(int) + step
    np.add.at(out, (np.arange(new), np.clip(point, 0, old - 1)), kernel(centre - point))
  return out


def _cubic(x, a=-0.75):
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0))
