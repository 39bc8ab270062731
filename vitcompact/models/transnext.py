"""TransNeXt: aggregated attention in three stages, attention over all tokens in the last, ConvGLUs.

Shi, arXiv 2311.17132. The published network, with ConvGLUs as its FFNs, needs no plan.
"""
import functools
import math
from typing import Any

import flax.linen as nn
import numpy as np

from vitcompact import layers, torch_names
from vitcompact.depthwise import GateConv
from vitcompact.methods import protocol
from vitcompact.methods.protocol import Site
from vitcompact.models import pyramid
from vitcompact.models.backbone import WITHOUT_ATTENTION, chunked
from vitcompact.models.pvt_v2 import fan_out_init
from vitcompact.models.transnext_blocks import TransNeXtBlock
from vitcompact.models.variant import Variant
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

# There are no maps and no softmax that methods could share, mask or filter: each head has its own
# parameters for its scores, and each query has other keys, those of its neighbours.
PROVIDES = WITHOUT_ATTENTION | {"attention"}

RULES = [
    (r".*/pool/proj/kernel", Leaf((None, "embed"), decay=True)),
    (r".*/cosine/tokens", Leaf(("heads", None, None), decay=True)),
    (r".*/cosine/token_bias", Leaf(("heads", None, None), decay=True)),   # as in the authors' code
    (r".*/cosine/(temperature|query_embedding)", Leaf(("heads", None, None))),
    (r".*/cosine/local_bias", Leaf(("heads", None))),
    (r".*/cosine/position_1/kernel", Leaf((None, "mlp"))),
    (r".*/cosine/position_2/kernel", Leaf(("mlp", "heads"))),
    (r".*/cosine/positions", Leaf((None, None, "heads"))),
    (r".*/mlp/mixer/conv/kernel", Leaf((None, None, None, "mlp"), decay=True)),
    *pyramid.RULES,
]


class TransNeXt(pyramid.Pyramid):
  """Four stages of overlapping patches, blocks and a norm; then the mean of the last map.

  Images (B, H, W, in_chans), normalised float, of any size that fits, not only `image_size` ->
  logits (B, num_classes) in float32; num_classes=0 returns the mean of the tokens (B, width). A
  folded model only takes images of its `image_size`, for which it stores the position biases.
  sr_ratios: side of the window of cells that a pooled key averages; 1: attention over all tokens.
  mlp_ratios: of an ungated FFN of the same cost; the hidden layer has two thirds of that width.
  pretrain_size: size of the images with which positions were trained; for other sizes, distances
    are scaled.
  Sows "features": the normed output maps (B, h, w, C) of the stages, stage_1 ..
  """
  widths: tuple[int, ...] = (72, 144, 288, 576)
  depths: tuple[int, ...] = (2, 2, 15, 2)
  heads: tuple[int, ...] = (3, 6, 12, 24)
  pretrain_size: int | tuple[int, int] = 224

  rules = RULES

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    super().check()
    smallest = 2 * self._strides()[-1]
    for side in np.broadcast_to(self.pretrain_size, 2).tolist():
      if side < smallest:
        raise ValueError(f"pretrain_size={self.pretrain_size}: {side} is too small: its last stage "
                         f"needs two tokens on a side, which are {smallest} pixels")
    for site, factorised in zip(self.sites(), self.plan.mergeable(self.sites()), strict=True):
      self._check_methods(site, factorised)

  @nn.nowrap
  def _check_methods(self, site: Site, factorised):
    methods, where = self.plan.at(site), f"block {site.block} of {self.variant or 'this model'}"
    heads = methods.heads
    if heads is not None and {protocol.scored_heads(heads, site),
                              protocol.value_heads(heads, site)} != {site.heads}:
      raise ValueError(f"{where} has its own parameters for each of its {site.heads} heads, and "
                       f"{heads} would remove heads; use heads=None")
    if "fc1" in factorised:
      raise ValueError(f"{where} has a gated FFN: only fc2 may be factorised, since gate and value "
                       "would share the rank of fc1; use factor='output'")

  @nn.nowrap
  def check_size(self, image_size, what: str):
    """Raises ValueError unless every patch and every window of a pooled key is filled."""
    strides = self._strides()
    unit = math.lcm(*(s * ratio for s, ratio in zip(strides, self.sr_ratios, strict=True)))
    for side in np.broadcast_to(image_size, 2).tolist():
      if side < unit or side % unit:
        raise ValueError(f"{what}: {side} is not a multiple of {unit} (stages of {strides} pixels "
                         f"a token, keys pooled by {self.sr_ratios}); the nearest multiple: "
                         f"{max(1, round(side / unit)) * unit}")

  @nn.nowrap
  def _strides(self) -> list[int]:
    return [4 * 2 ** s for s in range(len(self.widths))]

  @nn.nowrap
  def grids(self, image_size) -> list[tuple[int, int]]:
    """Returns (height, width) of the map in each stage."""
    height, width = np.broadcast_to(image_size, 2).tolist()
    return [(height // s, width // s) for s in self._strides()]

  @nn.nowrap
  def ffn_fields(self, stage: pyramid.Stage) -> dict[str, Any]:
    """Returns the fields of a Site that describe the FFN of a stage, except its width."""
    mixer = functools.partial(GateConv, stage.grid, dtype=self.dtype)
    return {"hidden": int(2 * stage.hidden / 3), "act": layers.geglu, "mixer": mixer,
            "mixer_gain": 2}

  @nn.nowrap
  def sites(self, image_size=None) -> list[Site]:
    """Returns its blocks at an image size, as methods see them; keys are those of the grid, then
    the pooled ones."""
    out = []
    for stage, native_stage in zip(self.stages(image_size), self.stages(), strict=True):
      keys = [math.prod(s.grid) + (math.prod(pooled_grid(s)) if s.reduction > 1 else 0)
              for s in (stage, native_stage)]
      out += [Site(width=stage.width, ffn_width=stage.width, heads=stage.heads, tokens=keys[0],
                   tokens_left=keys[1], query_grid=stage.grid,
                   key_grid=stage.grid if stage.reduction == 1 else None, provides=PROVIDES,
                   **self.ffn_fields(stage), **self.site_fields(i)) for i in stage.blocks]
    return out

  @nn.nowrap
  def submodules(self, image_size=None) -> dict[str, nn.Module]:
    """Returns {name: block}, the modules that a plan changes or that fold, not bound to a parent.
    """
    kind = self.block_class(TransNeXtBlock)
    places = [(stage, reference.grid) for stage, reference in zip(
        self.stages(image_size), self.stages(self.pretrain_size), strict=True)
              for _ in stage.blocks]
    return {f"blocks_{site.block}": kind(
        site, self.plan.at(site), reference, pooled_grid(stage) if stage.reduction > 1 else None,
        drop_path=rate, parent=None) for site, (stage, reference), rate in zip(
            self.sites(image_size), places, self.drop_path_rates(), strict=True)}

  @chunked
  @nn.compact
  def __call__(self, images_bhwc, train: bool = False):
    image_size = self.checked_size(images_bhwc)
    self._check_deployed(images_bhwc)
    blocks = self.submodules(image_size)
    x = images_bhwc
    for s, stage in enumerate(self.stages(image_size), 1):
      size, stride = (7, 4) if s == 1 else (3, 2)
      x = pyramid.PatchEmbed(stage.width, size=size, stride=stride, padding=size // 2,
                             conv_init=fan_out_init, dtype=self.dtype, name=f"patch_embed_{s}")(x)
      x = pyramid.to_tokens(x)
      for i in stage.blocks:
        x = blocks[f"blocks_{i}"].clone(parent=self, name=f"blocks_{i}")(x, train)
      x = layers.LayerNorm(epsilon=pyramid.EPSILON, dtype=self.dtype, name=f"norm_{s}")(x)
      x = pyramid.to_map(x, stage.grid)
      pyramid.record_stage(self, s, x)
    return pyramid.head(self, x.mean(axis=(1, 2)))

  def _check_deployed(self, images_bhwc):
    size = np.broadcast_to(self.image_size, 2).tolist()
    if self.deploy and list(images_bhwc.shape[1:3]) != size:
      raise ValueError(f"images of shape {images_bhwc.shape}: this folded model stores position "
                       f"biases for {size[0]} x {size[1]} pixels; fold a model with the "
                       "image_size= of these images, or run the unfolded one")

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns entries of its tensors under the authors' names (timm does not have TransNeXt)."""
    entries, blocks = [], self.submodules()
    for s, stage in enumerate(self.stages(), 1):
      entries += pyramid.conv_norm_entries(f"patch_embed{s}.proj", f"patch_embed{s}.norm",
                                           f"patch_embed_{s}")
      for i in stage.blocks:
        entries += blocks[f"blocks_{i}"].torch_entries(f"block{s}.{i - stage.blocks[0]}",
                                                       f"blocks_{i}")
      entries += torch_names.norm(f"norm{s}", f"norm_{s}")
    return entries + (torch_names.linear("head", "head") if self.num_classes else [])


def pooled_grid(stage: pyramid.Stage) -> tuple[int, int]:
  """Returns the grid of a stage's pooled keys."""
  return tuple(side // stage.reduction for side in stage.grid)


def _variant(rate: float, width: int, depths) -> Variant:
  widths = tuple(width * 2 ** s for s in range(4))
  # At 384 pixels, the authors' evaluation warps the whole image.
  return Variant(TransNeXt, {"widths": widths, "depths": depths,
                             "heads": tuple(width // 24 for width in widths),
                             "drop_path_rate": rate}, crop=0.875, crop_384=1.0)


VARIANTS = {
    "transnext_micro": _variant(0.15, 48, (2, 2, 15, 2)),
    "transnext_tiny": _variant(0.25, 72, (2, 2, 15, 2)),
    "transnext_small": _variant(0.45, 72, (5, 5, 22, 5)),
    "transnext_base": _variant(0.6, 96, (5, 5, 23, 5)),
}
