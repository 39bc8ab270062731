"""Next-ViT: groups of convolutional blocks, each ending in a transformer block.

Li et al., arXiv 2207.05501. Only batch norms and ReLU, no position embedding and no class token.
"""
from typing import NamedTuple

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
from vitcompact.models.nextvit_blocks import ConvBlock, TransformerBlock
from vitcompact.models.pyramid import record_stage
from vitcompact.models.variant import Variant
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

STEM_STRIDES = (2, 1, 1, 2)
STAGE_STRIDES = (1, 2, 2, 2)
POOLS = (64, 16, 4, 1)            # tokens that one key of a stage averages
CONV_MLP_RATIO, TRANSFORMER_MLP_RATIO = 3, 2

RULES = [
    (r"stem/conv\d/conv/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r".*/(patch_embed|projection|group_conv)/conv/kernel",
     Leaf((None, None, None, "embed"), decay=True)),
    (r".*/mhca/projection/kernel", Leaf((None, "embed"), decay=True)),
    (r"head/fc/kernel", Leaf(("embed", "classes"), decay=True)),
]


class BlockSpec(NamedTuple):
  """A block's stage, number in the stage, kind, input width and stride."""
  stage: int
  number: int
  transformer: bool
  in_width: int
  stride: int


class Stem(nn.Module):
  """Four 3x3 convolutions: (B, H, W, C) -> (B, H/4, W/4, widths[-1]), sizes rounded up."""
  widths: tuple[int, ...]
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    for i, (width, stride) in enumerate(zip(self.widths, STEM_STRIDES, strict=True)):
      conv = layers.ConvNorm(width, 3, stride, deploy=self.deploy, dtype=self.dtype,
                             name=f"conv{i}")
      x_bhwc = nn.relu(conv(x_bhwc, train))
    return x_bhwc

  @nn.nowrap
  def fold(self, params, stats):
    return {name: layers.fold_conv_norm(params[name], stats[name]) for name in params}, {}


class Head(nn.Module):
  """Batch norm, mean over the map, linear layer; without classes, returns the mean."""
  num_classes: int
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    # Without a linear layer into which it could fold, the norm stays when deployed.
    if not (self.deploy and self.num_classes):
      x_bhwc = layers.BatchNorm(dtype=self.dtype, name="norm")(
          x_bhwc, use_running_average=not train)
    x = x_bhwc.mean(axis=(1, 2))
    if self.num_classes:
      x = nn.Dense(self.num_classes, kernel_init=layers.weight_init, dtype=self.dtype,
                   name="fc")(x)
    return x.astype(jnp.float32)

  @nn.nowrap
  def fold(self, params, stats):
    """Folds the norm, which commutes with the mean, into the linear layer."""
    if not self.num_classes:
      return params, stats
    affine = layers.batch_affine(params["norm"], stats["norm"])
    return {"fc": layers.fold_into_linear(params["fc"], *affine)}, {}


class NextViT(Backbone):
  """Stem, four stages of convolutional and transformer blocks, batch norm, mean, linear head.

  Images (B, H, W, in_chans), normalised float -> logits (B, num_classes) in float32; num_classes=0
  returns the pooled features. Sows "features": the maps (B, h, w, C) of `stage_1` .. `stage_4`.

  widths: for each stage, the width of convolutional blocks and of attention; a transformer block
  adds a convolutional branch with a third of it, so its output is 4/3 as wide. periods: for each
  stage, p if every p-th block is a transformer block; 0 if none is.
  """
  stem_widths: tuple[int, ...] = (64, 32, 64, 64)
  widths: tuple[int, ...] = (96, 192, 384, 768)
  depths: tuple[int, ...] = (3, 4, 10, 3)
  periods: tuple[int, ...] = (0, 4, 5, 3)
  head_dim: int = 32

  rules = RULES

  @property
  def depth(self) -> int:
    return sum(self.depths)

  @property
  def grids(self) -> list[tuple[int, int]]:
    """(height, width) of the map in each stage: a quarter of the image, then halves, rounded up."""
    sides = np.broadcast_to(self.image_size, 2)
    return [tuple((-(-sides // 2 ** (2 + stage))).tolist()) for stage in range(4)]

  @nn.nowrap
  def block_specs(self) -> list[BlockSpec]:
    """Returns the specs of all blocks in order."""
    out, in_width = [], self.stem_widths[-1]
    for stage, (depth, period) in enumerate(zip(self.depths, self.periods, strict=True)):
      for i in range(depth):
        transformer = period > 0 and (i + 1) % period == 0
        stride = STAGE_STRIDES[stage] if i == 0 else 1
        out.append(BlockSpec(stage, i, transformer, in_width, stride))
        in_width = self.widths[stage] * 4 // 3 if transformer else self.widths[stage]
    return out

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    for field in ("stem_widths", "widths", "depths", "periods"):
      if len(getattr(self, field)) != 4:
        raise ValueError(f"{field}={getattr(self, field)}: must have 4 entries")
    specs = self.block_specs()
    for stage in range(4):
      hybrid = any(spec.transformer for spec in specs if spec.stage == stage)
      divisor = self.head_dim * (3 if hybrid else 1)
      if self.widths[stage] % divisor:
        raise ValueError(f"widths={self.widths}: {self.widths[stage]}, of stage {stage + 1}, must "
                         f"be a multiple of {divisor}, for heads of head_dim={self.head_dim}" +
                         (" on three quarters of a block's channels" if hybrid else ""))
      height, width = self.grids[stage]
      if hybrid and (min(height, width) < 1 or height * width < POOLS[stage]):
        raise ValueError(f"image_size={self.image_size}: stage {stage + 1} has {height} x {width} "
                         f"tokens, and a key there averages {POOLS[stage]}; the smallest side of a "
                         f"square image that fits is {self._smallest_side(specs)}")
    super().check()

  @nn.nowrap
  def _smallest_side(self, specs) -> int:
    # The smallest image with w x w tokens in a stage has side (w - 1) * stride + 1: sizes round up.
    return max((int(np.ceil(POOLS[spec.stage] ** 0.5)) - 1) * 2 ** (2 + spec.stage) + 1
               for spec in specs if spec.transformer)

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks, as methods see them; all have an FFN, transformer blocks attention."""
    out = []
    for i, spec in enumerate(self.block_specs()):
      width, grid = self.widths[spec.stage], self.grids[spec.stage]
      # "first" is the block itself, as consecutive blocks differ in width.
      fields = {"query_grid": grid, "act": nn.relu, "first": i, "batch_norm": True,
                **self.site_fields(i)}
      if not spec.transformer:
        out.append(Site(width=width, ffn_width=width, hidden=width * CONV_MLP_RATIO,
                        provides=WITHOUT_ATTENTION, **fields))
        continue
      # Pooled keys average consecutive tokens, and so have no grid.
      pool, ffn_width = POOLS[spec.stage], width + width // 3
      keys = max(1, grid[0] * grid[1] // pool)
      out.append(Site(width=width, ffn_width=ffn_width, hidden=ffn_width * TRANSFORMER_MLP_RATIO,
                      heads=width // self.head_dim, tokens=keys, tokens_left=keys,
                      key_grid=grid if pool == 1 else None, provides=HIERARCHICAL, **fields))
    return out

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """Returns {name: module}, all of which a plan or folding changes; not bound to a parent."""
    out = {"stem": Stem(self.stem_widths, self.deploy, self.dtype, parent=None)}
    for site, spec, rate in zip(self.sites(), self.block_specs(), self.drop_path_rates(),
                                strict=True):
      kind = self.block_class(TransformerBlock if spec.transformer else ConvBlock)
      pool = {"pool": POOLS[spec.stage]} if spec.transformer else {}
      out[f"blocks_{site.block}"] = kind(site, self.plan.at(site), spec.stride, self.head_dim,
                                         drop_path=rate, parent=None, **pool)
    out["head"] = Head(self.num_classes, self.deploy, self.dtype, parent=None)
    return out

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns entries of every tensor of timm's state dict; those of methods have our own names."""
    out = []
    for i in range(4):
      out += torch_names.conv_norm(f"stem.{i}.conv", f"stem.{i}.norm", f"stem/conv{i}")
    for site, spec in zip(self.sites(), self.block_specs(), strict=True):
      out += self._block_entries(f"stages.{spec.stage}.blocks.{spec.number}",
                                 f"blocks_{site.block}", spec, site)
    out += torch_names.norm("norm", "head/norm", running=True)
    return out + (torch_names.linear("head.fc", "head/fc") if self.num_classes else [])

  def _block_entries(self, torch: str, ours: str, spec: BlockSpec, site: Site) -> list[Entry]:
    out = torch_names.conv_norm(f"{torch}.mhca.group_conv3x3", f"{torch}.mhca.norm",
                                f"{ours}/mhca/group_conv")
    out += torch_names.conv(f"{torch}.mhca.projection", f"{ours}/mhca/projection", use_bias=False)
    if spec.stride == 2 or spec.in_width != self.widths[spec.stage]:
      out += torch_names.conv_norm(f"{torch}.patch_embed.conv", f"{torch}.patch_embed.norm",
                                   f"{ours}/patch_embed")
    methods = self.plan.at(site)
    for method in methods.present():
      out += surgery.torch_entries(method, site, torch, ours)
    for fc in ("fc1", "fc2") if methods.ffn is None else ():
      out += torch_names.conv(f"{torch}.mlp.{fc}", f"{ours}/mlp/{fc}")
    norms = {"norm": "norm"}
    if spec.transformer:
      for theirs, name in (("q", "query"), ("k", "key"), ("v", "value")):
        out += torch_names.heads(f"{torch}.e_mhsa.{theirs}", f"{ours}/attn", (name,))
      out += torch_names.out(f"{torch}.e_mhsa.proj", f"{ours}/attn/out")
      out += torch_names.conv_norm(f"{torch}.projection.conv", f"{torch}.projection.norm",
                                   f"{ours}/projection")
      norms = {"norm1": "norm1", "norm2": "norm2"}
      if POOLS[spec.stage] > 1:
        norms["e_mhsa.norm"] = "key_norm"
    for theirs, name in norms.items():
      out += torch_names.norm(f"{torch}.{theirs}", f"{ours}/{name}", running=True)
    return out

  @nn.nowrap
  def authors_name(self, name: str) -> str:
    """Converts timm's name to the authors', who number blocks over all stages."""
    first, *rest = name.split(".")
    if first == "head":
      return ".".join(["proj_head", "0", *rest[1:]])
    if first != "stages":
      return name
    stage, _, number, *rest = rest
    block = ".".join(["features", str(sum(self.depths[:int(stage)]) + int(number)), *rest])
    return block.replace(".mlp.fc", ".mlp.conv")

  def setup(self):
    for name, module in self.submodules().items():
      setattr(self, name, module)

  @chunked
  def __call__(self, images_bhwc, train: bool = False):
    check_images(self, images_bhwc)
    x = self.stem(images_bhwc, train)
    ends = np.cumsum(self.depths).tolist()
    for i in range(self.depth):
      x = getattr(self, f"blocks_{i}")(x, train)
      if i + 1 in ends:
        record_stage(self, ends.index(i + 1) + 1, x)
    return self.head(x, train)


VARIANTS = {
    f"nextvit_{size}": Variant(NextViT, {"depths": (3, 4, depth, 3), "drop_path_rate": rate},
                               crop=0.95, crop_384=1.0)
    for size, depth, rate in (("small", 10, 0.1), ("base", 20, 0.2), ("large", 30, 0.2))
}
