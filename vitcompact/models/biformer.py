"""BiFormer: a hierarchical model with attention routed between regions, and local enhancement.

Zhu et al., CVPR 2023, arXiv 2303.08810; the authors' code is rayleizhu/BiFormer. If their code and
the paper differ, this follows the code, with which their weights were trained: scores are scaled by
1 / sqrt(width) in routed blocks; and the last stage has dense attention with 8 heads, scale
1 / sqrt(head width), no bias of queries, keys and values, and local enhancement of the block's
normed input.
"""
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from vitcompact import torch_names
from vitcompact.methods import surgery
from vitcompact.methods.protocol import Site
from vitcompact.models.backbone import HIERARCHICAL, Backbone, check_images, chunked
from vitcompact.models.biformer_blocks import Embed, RoutedBlock, Stem
from vitcompact.models.nextvit import Head
from vitcompact.models.pyramid import record_stage, to_map, to_tokens
from vitcompact.models.variant import Variant
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

# A routed block already restricts attention, to regions of the grid.
DENSE = HIERARCHICAL - {"paths"}
ROUTED = DENSE - {"full attention", "all scores", "token line"}

RULES = [
    (r"(stem/conv\d|downsample_\d)/conv/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r".*/(position|lce)/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"head/fc/kernel", Leaf(("embed", "classes"), decay=True)),
]


class Stage(NamedTuple):
  """One stage. top_k: number of regions to attend to; 0: dense attention. blocks: the numbers of
  its blocks, counted over all stages."""
  width: int
  heads: int
  grid: tuple[int, int]
  top_k: int
  blocks: range


class RoutedPyramid(Backbone):
  """Stem, stages of routed blocks, batch norm, mean, linear head.

  Images (B, H, W, in_chans), normalised float -> logits (B, num_classes) in float32; num_classes=0
  returns the pooled features. Sows "features": the maps (B, h, w, C) of `stage_1` .. `stage_4`.

  regions: number per side of a routed stage's grid. top_ks: for each of the first stages, how many
  regions a region attends to; later stages have dense attention, with `dense_heads` heads.
  head_dim: of routed blocks. swin_layout: the layout of the authors' ablations, with patches of
  4 x 4 pixels, then 2 x 2 cells, and no convolution for positions.
  """
  widths: tuple[int, ...] = (64, 128, 256, 512)
  depths: tuple[int, ...] = (2, 2, 8, 2)
  mlp_ratio: float = 3.0
  head_dim: int = 32
  regions: int = 7
  top_ks: tuple[int, ...] = (1, 4, 16)
  dense_heads: int = 8
  swin_layout: bool = False

  rules = RULES

  @property
  def depth(self) -> int:
    return sum(self.depths)

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    if len(self.depths) != len(self.widths):
      raise ValueError(f"depths={self.depths} and widths={self.widths}: each needs one entry for "
                       "each stage")
    if len(self.top_ks) > len(self.widths) or any(k > self.regions ** 2 for k in self.top_ks):
      raise ValueError(f"top_ks={self.top_ks}: at most one for each of {len(self.widths)} stages, "
                       f"none above regions ** 2 = {self.regions ** 2}")
    for stage, width in enumerate(self.widths):
      routed = stage < len(self.top_ks)
      if routed and width % self.head_dim:
        raise ValueError(f"widths={self.widths}: {width} must be a multiple of "
                         f"head_dim={self.head_dim}")
      if not routed and width % self.dense_heads:
        raise ValueError(f"widths={self.widths}: {width}, of a dense stage, must be a multiple of "
                         f"dense_heads={self.dense_heads}")
    for side in np.broadcast_to(self.image_size, 2).tolist():
      if not self._fits(side):
        unit = 4 * 2 ** len(self.widths) * self.regions   # its multiples fit
        fit = next(other for step in range(1, unit + 1) for other in (side + step, side - step)
                   if other > 0 and self._fits(other))
        raise ValueError(f"image_size={self.image_size}: {side} pixels make grids of "
                         f"{self._sides(side)} in the stages, the first {len(self.top_ks)} of "
                         f"which must be multiples of regions={self.regions}; the nearest size "
                         f"that fits: {fit}")
    super().check()

  @nn.nowrap
  def _sides(self, side: int) -> list[int]:
    """Returns the side of the grid in each stage: 3 x 3 convolutions are padded, those of side 4
    and 2 are not."""
    first = side // 4 if self.swin_layout else -(-side // 4)
    out = [first]
    for _ in self.widths[1:]:
      out.append(out[-1] // 2 if self.swin_layout else -(-out[-1] // 2))
    return out

  @nn.nowrap
  def _fits(self, side: int) -> bool:
    sides = self._sides(side)
    return min(sides) > 0 and all(n % self.regions == 0 for n in sides[:len(self.top_ks)])

  @nn.nowrap
  def stages(self) -> list[Stage]:
    grids = zip(*(self._sides(side) for side in np.broadcast_to(self.image_size, 2).tolist()),
                strict=True)
    ends = np.cumsum(self.depths).tolist()
    top_ks = [*self.top_ks, *(0 for _ in self.widths[len(self.top_ks):])]
    return [Stage(width, width // self.head_dim if top_k else self.dense_heads, grid, top_k,
                  range(end - depth, end))
            for width, depth, end, top_k, grid in zip(self.widths, self.depths, ends, top_ks, grids,
                                                      strict=True)]

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks, as methods see them."""
    out = []
    for stage in self.stages():
      tokens, routed = stage.grid[0] * stage.grid[1], bool(stage.top_k)
      out += [Site(width=stage.width, ffn_width=stage.width,
                   hidden=int(stage.width * self.mlp_ratio), heads=stage.heads, tokens=tokens,
                   tokens_left=tokens, query_grid=stage.grid, key_grid=stage.grid,
                   query_scale=stage.heads ** -0.5 if routed else 1.0, qkv_bias=routed,
                   local=True, provides=ROUTED if routed else DENSE, **self.site_fields(i))
              for i in stage.blocks]
    return out

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """Returns {name: module}, all of which a plan or folding changes; not bound to a parent."""
    fields = {"deploy": self.deploy, "dtype": self.dtype, "parent": None}
    out = {"stem": Stem(self.widths[0], self.swin_layout, **fields)}
    size = 2 if self.swin_layout else 3
    for stage, width in enumerate(self.widths[1:], 1):
      out[f"downsample_{stage}"] = Embed(width, size, 2, norm_first=self.swin_layout, **fields)
    kind, rates, sites = self.block_class(RoutedBlock), self.drop_path_rates(), self.sites()
    for stage in self.stages():
      for i in stage.blocks:
        out[f"blocks_{i}"] = kind(sites[i], self.plan.at(sites[i]), self.regions, stage.top_k,
                                  not self.swin_layout, drop_path=rates[i], parent=None)
    out["head"] = Head(self.num_classes, **fields)
    return out

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns entries of every tensor of the authors' state dict; those of methods have our own
    names."""
    out, sites = [], self.sites()
    for i in range(1 if self.swin_layout else 2):
      out += _embed_entries(f"downsample_layers.0.{3 * i}", f"downsample_layers.0.{3 * i + 1}",
                            f"stem/conv{i}")
    for stage in range(1, len(self.widths)):
      places = [f"downsample_layers.{stage}.{i}" for i in (0, 1)]
      conv, norm = places[::-1] if self.swin_layout else places
      out += _embed_entries(conv, norm, f"downsample_{stage}")
    for number, stage in enumerate(self.stages()):
      blocks = f"stages.{number}.blocks" if self.swin_layout else f"stages.{number}"
      for i in stage.blocks:
        out += self._block_entries(f"{blocks}.{i - stage.blocks[0]}", f"blocks_{i}", sites[i],
                                   bool(stage.top_k))
    out += torch_names.norm("norm", "head/norm", running=True)
    return out + (torch_names.linear("head", "head/fc") if self.num_classes else [])

  def _block_entries(self, torch: str, ours: str, site: Site, routed: bool) -> list[Entry]:
    out = [] if self.swin_layout else torch_names.conv(f"{torch}.pos_embed", f"{ours}/position")
    out += torch_names.norm(f"{torch}.norm1", f"{ours}/norm1")
    out += torch_names.heads(f"{torch}.attn.qkv" + ".qkv" * routed, f"{ours}/attn",
                             ("query", "key", "value"), use_bias=site.qkv_bias)
    out += torch_names.out(f"{torch}.attn." + ("wo" if routed else "proj"), f"{ours}/attn/out")
    out += torch_names.conv(f"{torch}.attn.lepe", f"{ours}/lce")
    out += torch_names.norm(f"{torch}.norm2", f"{ours}/norm2")
    methods = self.plan.at(site)
    for method in methods.present():
      out += surgery.torch_entries(method, site, torch, ours)
    if methods.ffn is None:
      for fc, place in (("fc1", 0), ("fc2", 2 if self.swin_layout else 3)):
        out += torch_names.linear(f"{torch}.mlp.{place}", f"{ours}/mlp/{fc}")
    return out

  def setup(self):
    for name, module in self.submodules().items():
      setattr(self, name, module)

  @chunked
  def __call__(self, images_bhwc, train: bool = False):
    check_images(self, images_bhwc)
    x_bhwc = images_bhwc
    for number, stage in enumerate(self.stages()):
      embed = getattr(self, f"downsample_{number}") if number else self.stem
      tokens = to_tokens(embed(x_bhwc, train))
      for i in stage.blocks:
        tokens = getattr(self, f"blocks_{i}")(tokens, train)
      x_bhwc = to_map(tokens, stage.grid)
      record_stage(self, number + 1, x_bhwc)
    return self.head(x_bhwc, train)


def _embed_entries(conv: str, norm: str, ours: str) -> list[Entry]:
  return [*torch_names.conv(conv, f"{ours}/conv"),
          *torch_names.norm(norm, f"{ours}/norm", running=True)]


_DEEP = (4, 4, 18, 4)
_FIELDS = {
    "tiny": {"drop_path_rate": 0.1},
    "small": {"depths": _DEEP, "drop_path_rate": 0.15},
    "base": {"depths": _DEEP, "widths": (96, 192, 384, 768), "drop_path_rate": 0.4},
    "stl": {"depths": (2, 2, 6, 2), "widths": (96, 192, 384, 768), "mlp_ratio": 4.0,
            "swin_layout": True, "drop_path_rate": 0.1},
}
VARIANTS = {f"biformer_{size}": Variant(RoutedPyramid, fields, crop=0.875)
            for size, fields in _FIELDS.items()}
