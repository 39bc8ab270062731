"""What hierarchical models share: stages of shrinking grids, attention over spatially reduced keys.
"""
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import torch_names
from vitcompact.block import Block, method_entries
from vitcompact.layers import LayerNorm, weight_init
from vitcompact.methods.protocol import Site
from vitcompact.models.backbone import HIERARCHICAL, Backbone
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

# The published weights were trained with two different values.
EPSILON = 1e-6        # of the norms before attention and FFN, and of the last one
CONV_EPSILON = 1e-5   # of the norms after a convolution

RULES = [
    (r"patch_embed_\d+/proj/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r".*/reduce/proj/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"head/kernel", Leaf(("embed", "classes"), decay=True)),
]

# (kernel size, input channels, output channels) -> initialisers of kernel and bias
ConvInit = Callable[[int, int, int], tuple[Callable, Callable]]


class Stage(NamedTuple):
  """One stage at one image size. blocks: the numbers of its blocks, counted over all stages."""
  width: int
  heads: int
  hidden: int
  reduction: int
  grid: tuple[int, int]
  blocks: range


class Pyramid(Backbone):
  """Stages of shrinking grids. Images may have any size that fits, not only `image_size`."""
  widths: tuple[int, ...] = (64, 128, 320, 512)
  depths: tuple[int, ...] = (3, 4, 6, 3)
  heads: tuple[int, ...] = (1, 2, 5, 8)
  mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
  sr_ratios: tuple[int, ...] = (8, 4, 2, 1)

  prefix: ClassVar[int] = 0   # tokens before the grid of the last stage

  @property
  def depth(self) -> int:
    return sum(self.depths)

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    sizes = {name: getattr(self, name)
             for name in ("widths", "depths", "heads", "mlp_ratios", "sr_ratios")}
    if len({len(values) for values in sizes.values()}) > 1:
      raise ValueError(f"{sizes}: each needs one entry for each stage")
    for width, heads in zip(self.widths, self.heads, strict=True):
      if width % heads:
        raise ValueError(f"heads={self.heads} and widths={self.widths}: {heads} does not divide "
                         f"{width}; heads that do: {[h for h in range(1, 33) if width % h == 0]}")
    self.check_size(self.image_size, f"image_size={self.image_size}")
    super().check()

  @nn.nowrap
  def check_size(self, image_size, what: str):
    """Raises a one-line ValueError that begins with `what` if an image size does not fit."""
    raise NotImplementedError

  @nn.nowrap
  def grids(self, image_size) -> list[tuple[int, int]]:
    """Returns (height, width) of the map in each stage."""
    raise NotImplementedError

  @nn.nowrap
  def make_reduce(self, stage: Stage) -> Callable[..., nn.Module] | None:
    """Returns a function that makes the module which reduces the keys of a stage, or None."""
    raise NotImplementedError

  @nn.nowrap
  def ffn_fields(self, stage: Stage) -> dict[str, Any]:
    """Returns the fields of a Site that describe the FFN of a stage, except its width."""
    del stage
    return {}

  @nn.nowrap
  def checked_size(self, images_bhwc) -> tuple[int, int]:
    """Returns (height, width) of a batch; raises a one-line ValueError if it does not fit."""
    if images_bhwc.ndim != 4 or images_bhwc.shape[-1] != self.in_chans:
      raise ValueError(f"images of shape {images_bhwc.shape}: this model takes (B, height, width, "
                       f"{self.in_chans}); create it with in_chans=")
    size = images_bhwc.shape[1:3]
    self.check_size(size, f"images of shape {images_bhwc.shape}")
    return size

  @nn.nowrap
  def stages(self, image_size=None) -> list[Stage]:
    """Returns the stages at an image size, by default that of the model."""
    ends = np.cumsum(self.depths).tolist()
    rows = zip(self.widths, self.heads, self.mlp_ratios, self.sr_ratios,
               self.grids(image_size or self.image_size), self.depths, ends, strict=True)
    return [Stage(width, heads, int(width * ratio), reduction, grid, range(end - depth, end))
            for width, heads, ratio, reduction, grid, depth, end in rows]

  @nn.nowrap
  def sites(self, image_size=None) -> list[Site]:
    """Returns its blocks at an image size, as methods see them.

    Whether a method acts in a block depends only on the model's own image size.
    """
    out = []
    native = self.stages()
    for stage, native_stage in zip(self.stages(image_size), native, strict=True):
      prefix = self.prefix if native_stage is native[-1] else 0
      keys = [prefix + math.prod(self._key_grid(s)) for s in (stage, native_stage)]
      out += [Site(width=stage.width, ffn_width=stage.width, hidden=stage.hidden,
                   heads=stage.heads, tokens=keys[0], tokens_left=keys[1], prefix=prefix,
                   query_grid=stage.grid, key_grid=self._key_grid(stage), provides=HIERARCHICAL,
                   first=stage.blocks[0], **self.ffn_fields(stage), **self.site_fields(i))
              for i in stage.blocks]
    return out

  @nn.nowrap
  def submodules(self, image_size=None) -> dict[str, nn.Module]:
    """Returns {name: block}, the modules that a plan changes or that fold, not bound to a parent.
    """
    block = self.block_class(Block)
    reductions = [self.make_reduce(stage) for stage in self.stages(image_size)
                  for _ in stage.blocks]
    return {f"blocks_{site.block}": block(site, self.plan.at(site), drop_path=rate,
                                          epsilon=EPSILON, reduce=reduce, parent=None)
            for site, reduce, rate in zip(self.sites(image_size), reductions,
                                          self.drop_path_rates(), strict=True)}

  @nn.nowrap
  def _key_grid(self, stage: Stage) -> tuple[int, int]:
    """Returns the grid of the keys of a stage."""
    reduce = self.make_reduce(stage)
    return stage.grid if reduce is None else reduce(parent=None).key_grid


def record_stage(model, stage: int, map_bhwc):
  """Sows the output of a stage in "features"."""
  # In init every collection is mutable, and features would end up among the variables.
  if not model.is_initializing():
    model.sow("features", f"stage_{stage}", map_bhwc)


def to_map(tokens_bnc, grid: tuple[int, int]):
  return tokens_bnc.reshape(tokens_bnc.shape[0], *grid, tokens_bnc.shape[-1])


def to_tokens(map_bhwc):
  return jax.lax.collapse(map_bhwc, 1, 3)


def conv_norm(map_bhwc, width: int, size: int, *, stride: int, padding: int, conv_init: ConvInit,
              dtype: str):
  """Applies submodules `proj`, a convolution, and `norm` of the calling module: (B, H, W, C) ->
  (B, h, w, width).

  Pads by `padding` on every side, as PyTorch does ("SAME" is not symmetric at stride 2).
  """
  kernel_init, bias_init = conv_init(size, map_bhwc.shape[-1], width)
  out = nn.Conv(width, (size, size), strides=stride, padding=padding, kernel_init=kernel_init,
                bias_init=bias_init, dtype=dtype, name="proj")(map_bhwc)
  return LayerNorm(epsilon=CONV_EPSILON, dtype=dtype, name="norm")(out)


class PatchEmbed(nn.Module):
  """Embeds images, or the map of the previous stage, as the normed map of a stage."""
  width: int
  size: int
  stride: int
  padding: int
  conv_init: ConvInit
  dtype: str = "float32"

  @nn.compact
  def __call__(self, map_bhwc):
    return conv_norm(map_bhwc, self.width, self.size, stride=self.stride, padding=self.padding,
                     conv_init=self.conv_init, dtype=self.dtype)


class Reduce(nn.Module):
  """Reduces keys by a strided convolution, `ratio` per side: (B, N, C) -> (B, N/ratio^2, C).

  Rows and columns that do not fill a window are dropped, as in PyTorch.
  """
  grid: tuple[int, int]
  ratio: int
  conv_init: ConvInit
  dtype: str = "float32"

  @property
  def key_grid(self) -> tuple[int, int]:
    return self.grid[0] // self.ratio, self.grid[1] // self.ratio

  @nn.compact
  def __call__(self, tokens_bnc):
    map_bhwc = to_map(tokens_bnc, self.grid)
    return to_tokens(conv_norm(map_bhwc, map_bhwc.shape[-1], self.ratio, stride=self.ratio,
                               padding=0, conv_init=self.conv_init, dtype=self.dtype))


def head(model: nn.Module, pooled_bc):
  """Returns logits in float32, or the pooled features if the model has no classes."""
  if model.num_classes:
    pooled_bc = nn.Dense(model.num_classes, kernel_init=weight_init, dtype=model.dtype,
                         name="head")(pooled_bc)
  return pooled_bc.astype(jnp.float32)


def conv_norm_entries(conv: str, norm: str, ours: str) -> list[Entry]:
  """Returns entries of the tensors of a `conv_norm` in module `ours`."""
  return torch_names.conv(conv, f"{ours}/proj") + torch_names.norm(norm, f"{ours}/norm")


def block_entries(block: Block, torch: str, ours: str) -> list[Entry]:
  """Returns entries of the tensors of a block; PVT v2 also has a depthwise convolution."""
  entries = torch_names.norm(f"{torch}.norm1", f"{ours}/norm1")
  entries += torch_names.heads(f"{torch}.attn.q", f"{ours}/attn", ("query",))
  entries += torch_names.heads(f"{torch}.attn.kv", f"{ours}/attn", ("key", "value"))
  entries += torch_names.out(f"{torch}.attn.proj", f"{ours}/attn/out")
  if block.reduce is not None:
    entries += conv_norm_entries(f"{torch}.attn.sr", f"{torch}.attn.norm", f"{ours}/reduce")
  entries += torch_names.norm(f"{torch}.norm2", f"{ours}/norm2")
  return entries + method_entries(block.site, block.methods, torch, ours)
