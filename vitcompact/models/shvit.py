"""SHViT: 16 x 16 patches, three stages, single-head attention over some of the channels.

Yun and Ro, arXiv 2401.16456. Batch norms and ReLU, no position embedding and no class token.
"""
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vitcompact import layers, torch_names
from vitcompact.methods import surgery
from vitcompact.methods.protocol import Site
from vitcompact.models.backbone import (
  HIERARCHICAL,
  WITHOUT_ATTENTION,
  Backbone,
  check_images,
  chunked,
)
from vitcompact.models.pyramid import record_stage
from vitcompact.models.shvit_blocks import Downsample, SHViTBlock, fold_layers
from vitcompact.models.variant import Variant
from vitcompact.plan import describe_method
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

PATCH_STRIDES = 4    # convolutions of stride 2 in the stem

RULES = [
    (r"stem/conv\d/conv/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"downsample_\d/merge/conv1/kernel", Leaf(("embed", "mlp"), decay=True)),
    (r"downsample_\d/merge/conv2/conv/kernel", Leaf((None, None, None, "mlp"), decay=True)),
    (r"downsample_\d/merge/conv3/kernel", Leaf(("mlp", "embed"), decay=True)),
    (r".*/conv\d?/conv/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r".*/attn/(qkv|proj)/kernel", Leaf(("embed", None), decay=True)),
    (r"head/fc/kernel", Leaf(("embed", "classes"), decay=True)),
]


class Stem(nn.Module):
  """Four 3x3 convolutions of stride 2 with ReLU in between: (B, H, W, C) -> (B, H/16, W/16, width),
  sides rounded up."""
  width: int
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    for i in range(PATCH_STRIDES):
      x_bhwc = nn.relu(x_bhwc) if i else x_bhwc
      x_bhwc = layers.ConvNorm(
          self.width >> (PATCH_STRIDES - 1 - i), 3, 2, kernel_init=layers.torch_conv_init,
          deploy=self.deploy, dtype=self.dtype, name=f"conv{i}")(x_bhwc, train)
    return x_bhwc

  @nn.nowrap
  def fold(self, params, stats):
    return fold_layers(params, stats), {}


class Head(nn.Module):
  """Batch norm of the pooled features, linear: (B, C) -> (B, num_classes)."""
  num_classes: int
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bc, train: bool = False):
    if not self.deploy:
      x_bc = layers.BatchNorm(dtype=self.dtype, name="norm")(x_bc, use_running_average=not train)
    return nn.Dense(self.num_classes, kernel_init=layers.weight_init, dtype=self.dtype,
                    name="fc")(x_bc)

  @nn.nowrap
  def fold(self, params, stats):
    affine = layers.batch_affine(params["norm"], stats["norm"])
    return {"fc": layers.fold_into_linear(params["fc"], *affine)}, {}


class SHViT(Backbone):
  """Stem, three stages of blocks with downsampling in between, mean, batch norm, linear head.

  Images (B, H, W, in_chans) of any size, normalised float -> logits (B, num_classes) in float32;
  num_classes=0 returns the pooled features, before the norm. Sows "features": the maps (B, h, w, C)
  of `stage_1` .. `stage_3`.

  partial_widths: number of channels that attention acts on in stages 2 and 3; stage 1 has no
  attention. qk_width: of queries and keys. drop_path_rate: the authors use 0.
  """
  widths: tuple[int, ...] = (128, 224, 320)
  depths: tuple[int, ...] = (2, 4, 5)
  partial_widths: tuple[int, ...] = (48, 68)
  qk_width: int = 16

  rules = RULES

  @property
  def depth(self) -> int:
    return sum(self.depths)

  @property
  def grids(self) -> list[tuple[int, int]]:
    """(height, width) of the map in each stage: a 16th of the image, then halves, rounded up."""
    sides = np.broadcast_to(self.image_size, 2)
    return [tuple((-(-sides // 2 ** (PATCH_STRIDES + stage))).tolist()) for stage in range(3)]

  @nn.nowrap
  def block_numbers(self) -> list[tuple[int, int]]:
    """Returns (stage, number in the stage) of every block in order."""
    return [(stage, i) for stage, depth in enumerate(self.depths) for i in range(depth)]

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    for field, entries in (("widths", 3), ("depths", 3), ("partial_widths", 2)):
      if len(getattr(self, field)) != entries:
        raise ValueError(f"{field}={getattr(self, field)}: must have {entries} entries")
    if self.widths[0] % 8:
      nearest = max(1, round(self.widths[0] / 8)) * 8
      raise ValueError(f"widths={self.widths}: {self.widths[0]}, of stage 1, must be a multiple of "
                       "8, as the stem begins with an eighth of it; the nearest multiple: "
                       f"{nearest}")
    for stage, (part, width) in enumerate(zip(self.partial_widths, self.widths[1:], strict=True)):
      if part > width:
        raise ValueError(f"partial_widths={self.partial_widths} and widths={self.widths}: "
                         f"attention in stage {stage + 2} would act on {part} channels, and there "
                         f"are only {width}")
    self._check_attention()
    super().check()

  @nn.nowrap
  def _check_attention(self):
    """Raises ValueError if a method would change attention; a default that does not act is ignored.
    """
    for site in self.sites():
      named, acting = self.plan.blocks.get(site.block, {}), self.plan.at(site)
      for axis in ("heads", "attention") if "attention" in site.provides else ():
        method = named.get(axis) or getattr(acting, axis)
        if method is not None:
          raise ValueError(
              f"{describe_method(method)} in block {site.block}: {self.variant or 'this model'} "
              f"has a single head there, with queries and keys of width {self.qk_width} and values "
              f"of width {site.width}, which takes no method of the axis {axis}; use {axis}=None")

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks, as methods see them; all have an FFN, those of stages 2 and 3 attention.
    """
    out = []
    for i, (stage, _) in enumerate(self.block_numbers()):
      width, grid = self.widths[stage], self.grids[stage]
      fields = {"ffn_width": width, "hidden": 2 * width, "query_grid": grid, "act": nn.relu,
                "ffn_batch_norm": True, **self.site_fields(i)}
      if stage == 0:
        out.append(Site(width=width, provides=WITHOUT_ATTENTION, **fields))
      else:
        tokens = grid[0] * grid[1]
        out.append(Site(width=self.partial_widths[stage - 1], tokens=tokens, tokens_left=tokens,
                        key_grid=grid, provides=HIERARCHICAL - {"paths"}, **fields))
    return out

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """Returns {name: module}, all of which a plan or folding changes; not bound to a parent."""
    fields = {"deploy": self.deploy, "dtype": self.dtype, "parent": None}
    out = {"stem": Stem(self.widths[0], **fields)}
    blocks, rates = self.sites(), self.drop_path_rates()
    kind = self.block_class(SHViTBlock)
    for stage, depth in enumerate(self.depths):
      if stage:
        out[f"downsample_{stage + 1}"] = Downsample(self.widths[stage], **fields)
      for site in blocks[sum(self.depths[:stage]):][:depth]:
        out[f"blocks_{site.block}"] = kind(site, self.plan.at(site), self.qk_width,
                                           drop_path=rates[site.block], parent=None)
    if self.num_classes:
      out["head"] = Head(self.num_classes, **fields)
    return out

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns entries of every tensor of timm's state dict, or of its fused form when deployed;
    those of methods have our own names."""
    out = []
    for i in range(PATCH_STRIDES):
      out += self._conv(f"patch_embed.{2 * i}", f"stem/conv{i}", "conv/")
    for stage in (1, 2):
      out += self._downsample(f"stages.{stage}.downsample", f"downsample_{stage + 1}")
    for site, (stage, number) in zip(self.sites(), self.block_numbers(), strict=True):
      out += self._block(f"stages.{stage}.blocks.{number}", f"blocks_{site.block}", site)
    if not self.num_classes:
      return out
    if self.deploy:
      return out + torch_names.linear("head", "head/fc")
    return [*out, *torch_names.norm("head.bn", "head/norm", running=True),
            *torch_names.linear("head.l", "head/fc")]

  def _conv(self, torch: str, ours: str, inner: str = "") -> list[Entry]:
    """Returns entries of a convolution and its norm. inner: the part of our names before kernel."""
    kernel = f"{ours}/{inner}".rstrip("/")
    if self.deploy:
      return torch_names.conv(torch, kernel)
    return [*torch_names.conv(f"{torch}.c", kernel, use_bias=False),
            *torch_names.norm(f"{torch}.bn", f"{ours}/norm", running=True)]

  def _residual(self, torch: str, ours: str) -> list[Entry]:
    """Returns entries of a depthwise convolution with a skip; one convolution when deployed."""
    return self._conv(torch if self.deploy else f"{torch}.m", ours, "conv/")

  def _mlp(self, torch: str, ours: str) -> list[Entry]:
    return [entry for i in (1, 2) for entry in self._conv(f"{torch}.m.pw{i}", f"{ours}/fc{i}")]

  def _downsample(self, torch: str, ours: str) -> list[Entry]:
    out = []
    for i in (1, 2):
      out += self._residual(f"{torch}.{3 * (i - 1)}", f"{ours}/conv{i}")
      out += self._mlp(f"{torch}.{3 * (i - 1) + 1}", f"{ours}/mlp{i}")
    for i in (1, 2, 3):
      out += self._conv(f"{torch}.2.conv{i}", f"{ours}/merge/conv{i}", "conv/" if i == 2 else "")
    for i in (1, 2):
      out += torch_names.conv(f"{torch}.2.se.fc{i}", f"{ours}/merge/se/fc{i}")
    return out

  def _block(self, torch: str, ours: str, site: Site) -> list[Entry]:
    out = self._residual(f"{torch}.conv", f"{ours}/conv")
    if "attention" in site.provides:
      out += torch_names.norm(f"{torch}.mixer.m.pre_norm", f"{ours}/attn/norm")
      out += self._conv(f"{torch}.mixer.m.qkv", f"{ours}/attn/qkv")
      out += self._conv(f"{torch}.mixer.m.proj.1", f"{ours}/attn/proj")
    methods = self.plan.at(site)
    for method in methods.present():
      out += surgery.torch_entries(method, site, torch, ours)
    return out + (self._mlp(f"{torch}.ffn", f"{ours}/mlp") if methods.ffn is None else [])

  @nn.nowrap
  def authors_name(self, name: str) -> str:
    """Converts timm's name to the authors', who count the parts of a downsampling as blocks."""
    first, *rest = name.split(".")
    if first != "stages":
      return name
    stage, part, number, *rest = rest
    if part == "downsample":
      place = ("0.0", "0.1", "1", "2.0", "2.1")[int(number)]
    else:
      place = str(int(number) + (3 if int(stage) else 0))
    return ".".join([f"blocks{int(stage) + 1}", place, *rest])

  def setup(self):
    for name, module in self.submodules().items():
      setattr(self, name, module)

  @chunked
  def __call__(self, images_bhwc, train: bool = False):
    check_images(self, images_bhwc)
    x, block = self.stem(images_bhwc, train), 0
    for stage, depth in enumerate(self.depths, 1):
      if stage > 1:
        x = getattr(self, f"downsample_{stage}")(x, train)
      for i in range(block, block + depth):
        x = getattr(self, f"blocks_{i}")(x, train)
      block += depth
      record_stage(self, stage, x)
    x = x.mean(axis=(1, 2))
    return (self.head(x, train) if self.num_classes else x).astype(jnp.float32)


_ROWS = {"s1": ((128, 224, 320), (2, 4, 5), (48, 68), 224),
         "s2": ((128, 308, 448), (2, 4, 5), (66, 96), 224),
         "s3": ((192, 352, 448), (3, 5, 5), (75, 96), 224),
         "s4": ((224, 336, 448), (4, 7, 6), (72, 96), 256)}

VARIANTS = {
    f"shvit_{size}": Variant(SHViT, {"widths": widths, "depths": depths, "partial_widths": parts,
                                     "image_size": side, "drop_path_rate": 0.0}, crop=0.875)
    for size, (widths, depths, parts, side) in _ROWS.items()
}
