"""DaViT: alternates attention within windows and between channels (Ding et al., ECCV 2022, arXiv
2204.03645)."""
import functools
import re
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vitcompact import attention, block, layers, torch_names
from vitcompact.attention.channel import channel
from vitcompact.depthwise import Depthwise
from vitcompact.layers import DropPath, LayerNorm
from vitcompact.methods.protocol import Site
from vitcompact.models import pyramid
from vitcompact.models.backbone import HIERARCHICAL, WITHOUT_ATTENTION, Backbone, chunked
from vitcompact.models.variant import Variant
from vitcompact.plan import BlockMethods
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

EPSILON = 1e-5
STEM_STRIDE = 4   # each further stage halves the map
# Each window is a grid, but its tokens attend only to one another.
WINDOWS = HIERARCHICAL - {"full attention", "paths"}

RULES = [
    (r"(stem|downsample_\d+)/conv/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r".*/cpe\d/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"head/kernel", Leaf(("embed", "classes"), decay=True)),
]


class BlockSpec(NamedTuple):
  """A block's stage, and its number in the stage."""
  stage: int
  number: int

  @property
  def windows(self) -> bool:
    """Whether it attends within windows; the other block of a pair attends between channels."""
    return self.number % 2 == 0


def pad_to_multiple(x_bhwc, unit: int):
  """Pads a map with zeros below and to the right, to sides that are multiples of `unit`."""
  bottom, right = (-side % unit for side in x_bhwc.shape[1:3])
  return jnp.pad(x_bhwc, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x_bhwc


def to_windows(x_bhwc, side: int):
  """Cuts a zero-padded map into windows: (B, H, W, C) -> (B ceil(H / side) ceil(W / side), side^2,
  C)."""
  x_bhwc = pad_to_multiple(x_bhwc, side)
  batch, height, width, chans = x_bhwc.shape
  x = x_bhwc.reshape(batch, height // side, side, width // side, side, chans).swapaxes(2, 3)
  return x.reshape(-1, side * side, chans)


def from_windows(x_bnc, side: int, height: int, width: int):
  """Inverse of `to_windows`, for a map of this size: (B, height, width, C)."""
  rows, columns = -(-height // side), -(-width // side)
  x = x_bnc.reshape(-1, rows, columns, side, side, x_bnc.shape[-1]).swapaxes(2, 3)
  return x.reshape(-1, rows * side, columns * side, x.shape[-1])[:, :height, :width]


def position_conv(x_bhwc, dtype: str, name: str):
  """Encodes positions by x + conv(x), 3 x 3 and depthwise: (B, H, W, C) -> (B, H, W, C)."""
  init = layers.fan_in_uniform(9)
  return x_bhwc + Depthwise(3, init, init, dtype, name=name)(x_bhwc)


class Block(nn.Module):
  """x = cpe1 x;  x = x + attn(norm1 x);  x = cpe2 x;  x + mlp(norm2 x), of maps (B, H, W, C).

  Attention is within windows, or, if the site provides no attention, between channels.
  """
  site: Site
  methods: BlockMethods
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    site, drop = self.site, functools.partial(DropPath, self.drop_path)
    attend = self._within_windows if "attention" in site.provides else self._between_channels
    x = position_conv(x_bhwc, site.dtype, "cpe1")
    x = x + drop(name="drop1")(attend(x), train)
    x = position_conv(x, site.dtype, "cpe2")
    mlp = block.make_ffn(site, self.methods.ffn, name="mlp")
    normed = LayerNorm(EPSILON, site.dtype, name="norm2")(x)
    return x + drop(name="drop2")(mlp(normed, train), train)

  @nn.nowrap
  def _within_windows(self, x_bhwc):
    site, (batch, *size, chans) = self.site, x_bhwc.shape
    side = site.key_grid[0]
    # Partitioned before the norm, so that `calibration.observe` sees the stream in windows.
    tokens = LayerNorm(EPSILON, site.dtype, name="norm1")(to_windows(x_bhwc, side))
    if any(n % side for n in size):
      # As in timm, the zeros of the padding stay zeros, and are keys: they are not masked.
      real = to_windows(jnp.ones((1, *size, 1), tokens.dtype), side)
      tokens = (tokens.reshape(batch, *real.shape[:2], chans) * real[None]).reshape(tokens.shape)
    attn = block.Attention(site, self.methods.heads, name="attn")
    query, key = attn.queries_and_keys(tokens, tokens)
    core = block.restrict(site, self.methods.attention, attention.DENSE, query, key)
    out = attn.attend(query, key, attn.value(tokens), core, tokens)
    return from_windows(out, side, *size)

  @nn.nowrap
  def _between_channels(self, x_bhwc):
    tokens = pyramid.to_tokens(LayerNorm(EPSILON, self.site.dtype, name="norm1")(x_bhwc))
    attn = block.Attention(self.site, name="attn")
    out = channel(attn.query(tokens), attn.key(tokens), attn.value(tokens),
                  self.site.head_width ** -0.5)
    return attn.out(out).reshape(x_bhwc.shape)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, stats) of the deployed block."""
    return block.fold(self.site, self.methods, params, stats)


class Embed(nn.Module):
  """A strided convolution of the zero-padded map, with a norm after it (stem) or before it (between
  stages): (B, H, W, C) -> (B, h, w, width), sizes rounded up."""
  width: int
  stem: bool
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc):
    norm = LayerNorm(EPSILON, self.dtype, name="norm")
    size, stride, padding = (7, STEM_STRIDE, 3) if self.stem else (2, 2, 0)
    x_bhwc = pad_to_multiple(x_bhwc if self.stem else norm(x_bhwc), stride)
    init = layers.fan_in_uniform(size ** 2 * x_bhwc.shape[-1])
    x_bhwc = nn.Conv(self.width, (size, size), strides=stride, padding=padding, kernel_init=init,
                     bias_init=init, dtype=self.dtype, name="conv")(x_bhwc)
    return norm(x_bhwc) if self.stem else x_bhwc


class DaViT(Backbone):
  """Stages of pairs of blocks, mean of the last map, norm, linear head.

  Images (B, H, W, in_chans), normalised float, of any size, not only `image_size` -> logits
  (B, num_classes) in float32; num_classes=0 returns the normed mean (B, width). Sows "features":
  the output maps (B, h, w, C) of the stages, stage_1 ..

  depths: number of pairs of blocks in each stage. The first block of a pair attends within windows
  of `window_size` tokens per side; if the map does not fill them, it is padded with zeros, which
  are keys like all others (as in timm). Its attention maps are (B windows, heads, N, N). The second
  block attends between the channels of each head.
  The stochastic depth rate grows from block to block, as in the authors' training; in timm it is
  the same for both blocks of a pair.
  """
  widths: tuple[int, ...] = (96, 192, 384, 768)
  depths: tuple[int, ...] = (1, 1, 3, 1)
  heads: tuple[int, ...] = (3, 6, 12, 24)
  window_size: int = 7
  mlp_ratio: float = 4.0

  rules = RULES

  @property
  def depth(self) -> int:
    return 2 * sum(self.depths)

  @property
  def grids(self) -> list[tuple[int, int]]:
    """(height, width) of the map in each stage: a quarter of the image, then halves, rounded up."""
    sides = np.broadcast_to(self.image_size, 2)
    return [tuple((-(-sides // (STEM_STRIDE * 2 ** stage))).tolist())
            for stage in range(len(self.widths))]

  @nn.nowrap
  def block_specs(self) -> list[BlockSpec]:
    """Returns the specs of all blocks in order."""
    return [BlockSpec(stage, number) for stage, pairs in enumerate(self.depths)
            for number in range(2 * pairs)]

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    sizes = {name: getattr(self, name) for name in ("widths", "depths", "heads")}
    if len({len(values) for values in sizes.values()}) > 1:
      raise ValueError(f"{sizes}: each needs one entry for each stage")
    for width, heads in zip(self.widths, self.heads, strict=True):
      if width % heads:
        raise ValueError(f"heads={self.heads} and widths={self.widths}: {heads} does not divide "
                         f"{width}; heads that do: {[h for h in range(1, 33) if width % h == 0]}")
    super().check()

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks, as methods see them; all have an FFN, every second one attention between
    tokens."""
    window, count, out = (self.window_size,) * 2, self.window_size ** 2, []
    for i, spec in enumerate(self.block_specs()):
      width = self.widths[spec.stage]
      fields = {"tokens": count, "tokens_left": count, "query_grid": window, "key_grid": window,
                "provides": WINDOWS}
      if not spec.windows:
        fields = {"query_grid": self.grids[spec.stage], "provides": WITHOUT_ATTENTION}
      out.append(Site(width=width, ffn_width=width, hidden=int(width * self.mlp_ratio),
                      heads=self.heads[spec.stage], **fields, **self.site_fields(i)))
    return out

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """Returns {name: block}, the modules that a plan changes or that fold, not bound to a parent.
    """
    kind = self.block_class(Block)
    return {f"blocks_{site.block}": kind(site, self.plan.at(site), drop_path=rate, parent=None)
            for site, rate in zip(self.sites(), self.drop_path_rates(), strict=True)}

  @chunked
  @nn.compact
  def __call__(self, images_bhwc, train: bool = False):
    if images_bhwc.ndim != 4 or images_bhwc.shape[-1] != self.in_chans:
      raise ValueError(f"images of shape {images_bhwc.shape}: this model takes (B, height, width, "
                       f"{self.in_chans}); create it with in_chans=")
    x, blocks = images_bhwc, iter(self.submodules().items())
    for s, (width, pairs) in enumerate(zip(self.widths, self.depths, strict=True), 1):
      x = Embed(width, s == 1, self.dtype, name="stem" if s == 1 else f"downsample_{s}")(x)
      for _ in range(2 * pairs):
        name, module = next(blocks)
        x = module.clone(parent=self, name=name)(x, train)
      pyramid.record_stage(self, s, x)
    pooled = LayerNorm(EPSILON, self.dtype, name="norm")(x.mean(axis=(1, 2)))
    return pyramid.head(self, pooled)

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns entries of every tensor of timm's state dict; those of methods have our own names."""
    out = []
    for s in range(len(self.widths)):
      torch, ours = (f"stages.{s}.downsample", f"downsample_{s + 1}") if s else ("stem", "stem")
      out += torch_names.conv(f"{torch}.conv", f"{ours}/conv")
      out += torch_names.norm(f"{torch}.norm", f"{ours}/norm")
    for spec, (ours, module) in zip(self.block_specs(), self.submodules().items(), strict=True):
      torch = f"stages.{spec.stage}.blocks.{spec.number // 2}.{spec.number % 2}"
      out += block.block_entries(module, torch, ours)
      for name in ("cpe1", "cpe2"):
        out += torch_names.conv(f"{torch}.{name}.proj", f"{ours}/{name}")
    out += torch_names.norm("head.norm", "norm")
    return out + (torch_names.linear("head.fc", "head") if self.num_classes else [])

  @nn.nowrap
  def authors_name(self, name: str) -> str:
    """Converts timm's name of a tensor to the authors'."""
    for timm, authors in ((r"^stem\.", "stages.0.downsample."), (r"^head\.norm\.", "norms."),
                          (r"^head\.fc\.", "head."),
                          (r"^stages\.(\d+)\.downsample\.", r"patch_embeds.\1."),
                          (r"^patch_embeds\.(\d+)\.conv\.", r"patch_embeds.\1.proj."),
                          (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
                          (r"\.cpe1\.", ".cpe.0."), (r"\.cpe2\.", ".cpe.1.")):
      name = re.sub(timm, authors, name)
    return name


def _variant(depths, width: int) -> Variant:
  """Makes a variant with stages of doubling width and heads of 32 channels."""
  widths = tuple(width * 2 ** stage for stage in range(4))
  return Variant(DaViT, {"depths": depths, "widths": widths,
                         "heads": tuple(width // 32 for width in widths)}, crop=0.95)


VARIANTS = {
    "davit_tiny": _variant((1, 1, 3, 1), 96), "davit_small": _variant((1, 1, 9, 1), 96),
    "davit_base": _variant((1, 1, 9, 1), 128), "davit_large": _variant((1, 1, 9, 1), 192),
    "davit_huge": _variant((1, 1, 9, 1), 256), "davit_giant": _variant((1, 1, 12, 3), 384),
}
