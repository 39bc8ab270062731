"""PVT v2: overlapping patches, depthwise convolutions in the FFN (Wang et al., 2106.13797)."""
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vitcompact import layers, torch_names
from vitcompact.depthwise import Depthwise, over_grid
from vitcompact.models import pyramid
from vitcompact.models.backbone import chunked
from vitcompact.models.variant import Variant
from vitcompact.token_state import Tokens
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

POOLED = 7   # side of the linear variant's key grid, for every image size

RULES = [
    (r".*/mlp/mixer/conv/kernel", Leaf((None, None, None, "mlp"), decay=True)),
    *pyramid.RULES,
]


class PyramidVisionTransformerV2(pyramid.Pyramid):
  """Four stages of overlapping patches, blocks and a norm; then the mean of the last map.

  Images (B, H, W, in_chans), normalised float, of any size that fits, not only `image_size` ->
  logits (B, num_classes) in float32; num_classes=0 returns the mean of the tokens (B, width).
  linear: pools keys to 7 x 7 in every stage, so that the cost of attention is linear in the number
    of tokens.
  Sows "features": the normed output maps (B, h, w, C) of the stages, stage_1 ..
  """
  linear: bool = False

  rules = RULES

  @nn.nowrap
  def check_size(self, image_size, what: str):
    """Raises ValueError unless the grid of every stage holds a window of its reduction."""
    ratios = [1] * len(self.widths) if self.linear else self.sr_ratios
    smallest = max(4 * 2 ** s * (ratio - 1) + 1 for s, ratio in enumerate(ratios))
    for side in np.broadcast_to(image_size, 2).tolist():
      if side < smallest:
        raise ValueError(f"{what}: {side} is too small for sr_ratios={self.sr_ratios}, whose "
                         f"windows need sides of at least {smallest}")

  @nn.nowrap
  def grids(self, image_size) -> list[tuple[int, int]]:
    """Returns (height, width) of the map in each stage, rounded up, as convolutions are padded."""
    sides = np.broadcast_to(image_size, 2)
    return [tuple((-(-sides // (4 * 2 ** s))).tolist()) for s in range(len(self.widths))]

  @nn.nowrap
  def ffn_fields(self, stage: pyramid.Stage) -> dict[str, Any]:
    """Returns the fields of a Site that describe the FFN of a stage, except its width."""
    mixer = functools.partial(DepthwiseConv, stage.grid, relu=self.linear, dtype=self.dtype)
    # mixer_gain: the factor on the variance of centred, independent inputs with initial weights.
    return {"mixer": mixer, "mixer_gain": 1 if self.linear else 2}

  @nn.nowrap
  def make_reduce(self, stage: pyramid.Stage) -> Callable[..., nn.Module] | None:
    """Returns a function that makes the module which reduces the keys of a stage, or None."""
    if self.linear:
      return functools.partial(PoolReduce, stage.grid, dtype=self.dtype)
    if stage.reduction == 1:
      return None
    return functools.partial(pyramid.Reduce, stage.grid, stage.reduction, conv_init=fan_out_init,
                             dtype=self.dtype)

  @chunked
  @nn.compact
  def __call__(self, images_bhwc, train: bool = False):
    image_size = self.checked_size(images_bhwc)
    blocks = self.submodules(image_size)
    x = images_bhwc
    for s, stage in enumerate(self.stages(image_size), 1):
      size, stride = (7, 4) if s == 1 else (3, 2)
      x = pyramid.PatchEmbed(stage.width, size=size, stride=stride, padding=size // 2,
                             conv_init=fan_out_init, dtype=self.dtype, name=f"patch_embed_{s}")(x)
      tokens = Tokens(pyramid.to_tokens(x))
      for i in stage.blocks:
        tokens = blocks[f"blocks_{i}"].clone(parent=self, name=f"blocks_{i}")(tokens, train)
      x = layers.LayerNorm(epsilon=pyramid.EPSILON, dtype=self.dtype, name=f"norm_{s}")(tokens.x)
      x = pyramid.to_map(x, stage.grid)
      pyramid.record_stage(self, s, x)
    return pyramid.head(self, x.mean(axis=(1, 2)))

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns entries of its tensors under timm's names."""
    entries, blocks = [], self.submodules()
    for s, stage in enumerate(self.stages()):
      embed = f"stages.{s}.downsample" if s else "patch_embed"
      entries += pyramid.conv_norm_entries(f"{embed}.proj", f"{embed}.norm",
                                           f"patch_embed_{s + 1}")
      for i in stage.blocks:
        torch, ours = f"stages.{s}.blocks.{i - stage.blocks[0]}", f"blocks_{i}"
        entries += pyramid.block_entries(blocks[ours], torch, ours)
        entries += torch_names.conv(f"{torch}.mlp.dwconv", f"{ours}/mlp/mixer/conv")
      entries += torch_names.norm(f"stages.{s}.norm", f"norm_{s + 1}")
    return entries + (torch_names.linear("head", "head") if self.num_classes else [])

  @nn.nowrap
  def authors_name(self, name: str) -> str:
    """Converts timm's name of a tensor to the authors'."""
    name = re.sub(r"^patch_embed\.", "patch_embed1.", name)
    for timm, authors in ((r"downsample\.", "patch_embed{}."), (r"blocks\.", "block{}."),
                          (r"norm\.", "norm{}.")):
      name = re.sub(rf"^stages\.(\d+)\.{timm}",
                    lambda found, to=authors: to.format(int(found[1]) + 1), name)
    return name.replace(".dwconv.", ".dwconv.dwconv.")


class DepthwiseConv(nn.Module):
  """3 x 3 depthwise convolution over the grid: (B, N, C) -> (B, N, C).

  relu: applies a ReLU before it. places: (B, k), the places of tokens (B, k, C), if these are only
  some of the grid; the others count as 0.
  """
  grid: tuple[int, int]
  relu: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, tokens_bnc, places_bk=None):
    conv = Depthwise(3, *fan_out_init(3, 1, 1), dtype=self.dtype, name="conv")
    return over_grid(conv, nn.relu(tokens_bnc) if self.relu else tokens_bnc, self.grid, places_bk)


class PoolReduce(nn.Module):
  """Reduces the keys of the linear variant: mean over 7 x 7 windows, 1 x 1 convolution, norm, GELU.
  """
  grid: tuple[int, int]
  dtype: str = "float32"

  @property
  def key_grid(self) -> tuple[int, int]:
    return POOLED, POOLED

  @nn.compact
  def __call__(self, tokens_bnc):
    map_bhwc = adaptive_average(pyramid.to_map(tokens_bnc, self.grid), POOLED)
    return layers.gelu(pyramid.to_tokens(pyramid.conv_norm(
        map_bhwc, map_bhwc.shape[-1], 1, stride=1, padding=0, conv_init=fan_out_init,
        dtype=self.dtype)))


def adaptive_average(map_bhwc, side: int):
  """Averages over side x side windows that cover the map: (B, H, W, C) -> (B, side, side, C).

  Window i of an axis of n cells is floor(i n / side) to ceil((i + 1) n / side): windows overlap if
  `side` does not divide n.
  """
  batch, height, width, chans = map_bhwc.shape
  if height % side == 0 and width % side == 0:
    return map_bhwc.reshape(batch, side, height // side, side, width // side, chans).mean((2, 4))
  for axis in (1, 2):
    n = map_bhwc.shape[axis]
    windows = [slice(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    map_bhwc = jnp.stack([jnp.take(map_bhwc, np.arange(n)[window], axis).mean(axis)
                          for window in windows], axis)
  return map_bhwc


def fan_out_init(size: int, chans: int, features: int):
  """Returns initialisers of kernel and bias of a convolution: N(0, 2 / fan_out), zeros.

  features: output channels of one group.
  """
  del chans
  return nn.initializers.normal((2 / (size ** 2 * features)) ** 0.5), nn.initializers.zeros


_DEPTHS = {"b0": (2, 2, 2, 2), "b1": (2, 2, 2, 2), "b2": (3, 4, 6, 3), "b3": (3, 4, 18, 3),
           "b4": (3, 8, 27, 3), "b5": (3, 6, 40, 3)}
_FIELDS = {"b0": {"widths": (32, 64, 160, 256)}, "b5": {"mlp_ratios": (4, 4, 4, 4)}}

VARIANTS = {
    **{f"pvt_v2_{size}": Variant(PyramidVisionTransformerV2, {
        "depths": depths, "drop_path_rate": 0.3 if size in ("b3", "b4", "b5") else 0.1,
        **_FIELDS.get(size, {})}) for size, depths in _DEPTHS.items()},
    "pvt_v2_b2_li": Variant(PyramidVisionTransformerV2, {"depths": _DEPTHS["b2"], "linear": True}),
}
