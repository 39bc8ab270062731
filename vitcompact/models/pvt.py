"""PVT v1: a pyramid of four stages with attention over reduced keys (Wang et al., 2102.12122)."""
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import layers, torch_names
from vitcompact.models import pyramid
from vitcompact.models.backbone import chunked
from vitcompact.models.variant import Variant
from vitcompact.token_state import Tokens
from vitcompact.torch_names import Entry, Positions
from vitcompact.tracing import param
from vitcompact.trees import Leaf

# Position embeddings have weight decay, as in the authors' training; the class token has none.
RULES = [
    (r"cls_token", Leaf((None, None, "embed"))),
    (r"pos_embed_\d+", Leaf((None, None, "embed"), decay=True)),
    *pyramid.RULES,
]


class PyramidVisionTransformer(pyramid.Pyramid):
  """Four stages of patches, positions and blocks; the last one has a class token.

  Images (B, H, W, in_chans), normalised float -> logits (B, num_classes) in float32;
  num_classes=0 returns the class token (B, width). Without a class token, the mean over the last
  stage is used instead, without a norm. Positions are stored for `image_size`, and resized
  (bilinear) for images of another size that fits.
  Sows "features": the output maps (B, h, w, C) of the stages, stage_1 ..
  """
  patch_size: int = 4
  class_token: bool = True

  rules = RULES

  @property
  def prefix(self) -> int:
    """Number of tokens before the grid of the last stage."""
    return int(self.class_token)

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    if self.class_token and self.sr_ratios[-1:] != (1,):
      raise ValueError(f"sr_ratios={self.sr_ratios}: must end in 1, because the class token of the "
                       "last stage is not on the grid that would be reduced")
    super().check()

  @nn.nowrap
  def check_size(self, image_size, what: str):
    """Raises ValueError unless every patch and every window of every reduction is filled."""
    strides = self._strides()
    unit = math.lcm(*(s * ratio for s, ratio in zip(strides, self.sr_ratios, strict=True)))
    for side in np.broadcast_to(image_size, 2).tolist():
      if side < unit or side % unit:
        raise ValueError(f"{what}: {side} is not a multiple of {unit} (stages of {strides} pixels "
                         f"a token, keys reduced by {self.sr_ratios}); the nearest multiple: "
                         f"{max(1, round(side / unit)) * unit}")

  @nn.nowrap
  def _strides(self) -> list[int]:
    return [self.patch_size * 2 ** s for s in range(len(self.widths))]

  @nn.nowrap
  def grids(self, image_size) -> list[tuple[int, int]]:
    """Returns (height, width) of the map in each stage."""
    height, width = np.broadcast_to(image_size, 2).tolist()
    return [(height // s, width // s) for s in self._strides()]

  @nn.nowrap
  def make_reduce(self, stage: pyramid.Stage) -> Callable[..., nn.Module] | None:
    """Returns a function that makes the module which reduces the keys of a stage, or None."""
    if stage.reduction == 1:
      return None
    return functools.partial(pyramid.Reduce, stage.grid, stage.reduction, conv_init=fan_in_init,
                             dtype=self.dtype)

  @chunked
  @nn.compact
  def __call__(self, images_bhwc, train: bool = False):
    image_size = self.checked_size(images_bhwc)
    blocks = self.submodules(image_size)
    stages, native = self.stages(image_size), self.stages()
    x = images_bhwc
    for s, stage in enumerate(stages):
      prefix = self.prefix if stage is stages[-1] else 0
      tokens = Tokens(self._embed(x, s, stage, native[s].grid, prefix))
      for i in stage.blocks:
        tokens = blocks[f"blocks_{i}"].clone(parent=self, name=f"blocks_{i}")(tokens, train)
      token, x = tokens.x[:, :prefix], pyramid.to_map(tokens.x[:, prefix:], stage.grid)
      pyramid.record_stage(self, s + 1, x)
    if not self.class_token:
      return pyramid.head(self, x.mean(axis=(1, 2)))
    norm = layers.LayerNorm(epsilon=pyramid.EPSILON, dtype=self.dtype, name="norm")
    return pyramid.head(self, norm(token[:, 0]))

  def _embed(self, map_bhwc, s: int, stage: pyramid.Stage, stored_grid, prefix: int):
    """Returns the tokens of stage s: patches plus positions, after a class token if prefix is 1."""
    stride = 2 if s else self.patch_size
    x = pyramid.to_tokens(pyramid.PatchEmbed(
        stage.width, size=stride, stride=stride, padding=0, conv_init=fan_in_init,
        dtype=self.dtype, name=f"patch_embed_{s + 1}")(map_bhwc))
    if prefix:
      token = param(self, "cls_token", layers.weight_init, (1, 1, stage.width))
      token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, stage.width))
      x = jnp.concatenate([token, x], axis=1)
    shape = (1, prefix + math.prod(stored_grid), stage.width)
    positions = param(self, f"pos_embed_{s + 1}", layers.weight_init, shape)
    return x + resize_positions(positions, stored_grid, stage.grid, prefix).astype(x.dtype)

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns entries of its tensors under the authors' names (timm does not have PVT v1)."""
    entries = [Entry("cls_token", ("params/cls_token",))] if self.class_token else []
    stages, blocks = self.stages(), self.submodules()
    for s, stage in enumerate(stages, 1):
      positions = Positions(stage.grid, self.prefix if stage is stages[-1] else 0, "bilinear")
      entries.append(Entry(f"pos_embed{s}", (f"params/pos_embed_{s}",), positions=positions))
      entries += pyramid.conv_norm_entries(f"patch_embed{s}.proj", f"patch_embed{s}.norm",
                                           f"patch_embed_{s}")
      for i in stage.blocks:
        entries += pyramid.block_entries(blocks[f"blocks_{i}"], f"block{s}.{i - stage.blocks[0]}",
                                         f"blocks_{i}")
    entries += torch_names.norm("norm", "norm") if self.class_token else []
    return entries + (torch_names.linear("head", "head") if self.num_classes else [])


def fan_in_init(size: int, chans: int, features: int):
  """Returns PyTorch's default initialisers of kernel and bias of a convolution."""
  del features
  init = layers.fan_in_uniform(size ** 2 * chans)
  return init, init


def resize_positions(positions_1nw, stored: tuple[int, int], grid: tuple[int, int], prefix: int):
  """Resizes the position embeddings of a grid to another grid; those of the prefix are unchanged.

  Bilinear between cell centres, without antialiasing, as in the authors' model. (Their model skips
  it whenever the number of tokens is that of the stored first stage, even if the shape differs;
  this one does not.)
  """
  if stored == grid:
    return positions_1nw
  plane = pyramid.to_map(positions_1nw[:, prefix:], stored)
  plane = jax.image.resize(plane, (1, *grid, plane.shape[-1]), "bilinear", antialias=False)
  return jnp.concatenate([positions_1nw[:, :prefix], pyramid.to_tokens(plane)], axis=1)


VARIANTS = {
    f"pvt_{size}": Variant(PyramidVisionTransformer, {"depths": depths, "drop_path_rate": rate},
                           crop=0.875)
    for size, depths, rate in (("tiny", (2, 2, 2, 2), 0.1), ("small", (3, 4, 6, 3), 0.1),
                               ("medium", (3, 4, 18, 3), 0.3), ("large", (3, 8, 27, 3), 0.3))
}
