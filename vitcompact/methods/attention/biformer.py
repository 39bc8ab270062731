"""Bi-level routing attention (BiFormer): regions of queries attend to the few regions of keys that
they score best (Zhu et al., CVPR 2023, arXiv 2303.08810)."""
import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention
from vitcompact.attention import Core, tuning
from vitcompact.attention.block_sparse import routing
from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.windows import Windows, on_grid
from vitcompact.depthwise import LocalConv
from vitcompact.layers import fan_in_uniform
from vitcompact.methods.attention.block_predictor import block_mass
from vitcompact.methods.protocol import Site
from vitcompact.torch_names import Entry, conv
from vitcompact.trees import Leaf

LCE_SIZE = 5     # a side of the local enhancement's kernel
WINDOW = 8       # patches on a side of a region, about, where their number follows the grid
KEEP = 0.25


@dataclasses.dataclass(frozen=True)
class BiFormer:
  """Attention axis: the patches of a region attend to those of the k regions that its mean query
  scores best against their mean keys, one choice for all heads.

  keep: k as a share of the regions, in (0, 1], rounded, at least one; top_k: k itself. One of the
    two; neither is keep=0.25. With all regions attention is dense, and nothing is routed.
  regions: how many on each side of the grid, 7 in the paper; where they do not divide it, the last
    ones are padded, and the padding is masked. None: as many as have about 8 x 8 patches, which is
    what block-sparse attention runs fastest with.
  lce: whether a depthwise 5 x 5 convolution of the values, with bias, is added to what the heads
    give; it starts at zero where the weights come from a dense block.
  min_tokens: blocks of the network with fewer keys stay dense; None: the measured crossover.

  Ours: the class token and other prefix tokens attend to all and are seen by all; they are in no
  region and have no local enhancement. Scores keep the scale 1 / sqrt(head width) of the model; the
  paper's own network has 1 / sqrt(width). A region need not attend to itself, as in the paper.
  """
  axis: ClassVar[str] = "attention"
  scope: ClassVar[str] = "bra"
  rules: ClassVar = [(r".*/bra/lce/kernel", Leaf((None, None, None, "embed"), decay=True))]
  collections: ClassVar = ("attention",)

  keep: float | None = None
  top_k: int | None = None
  regions: int | None = 7
  lce: bool = False
  min_tokens: int | None = None

  def __post_init__(self):
    def refuse(field, rule):
      raise ValueError(f"BiFormer({field}={getattr(self, field)!r}): must be {rule}")

    number = isinstance(self.keep, (int, float)) and not isinstance(self.keep, bool)
    if self.keep is not None and not (number and 0 < self.keep <= 1):
      refuse("keep", "a share of the regions in (0, 1], such as 0.25")
    for field in ("top_k", "regions"):
      if getattr(self, field) is not None and not _is_count(getattr(self, field)):
        refuse(field, "a whole number of at least 1, or None")
    if self.keep is not None and self.top_k is not None:
      raise ValueError(f"BiFormer(keep={self.keep}, top_k={self.top_k}): both say how many regions "
                       "are kept; give one of them")
    if not isinstance(self.lce, bool):
      refuse("lce", "True or False")
    if self.min_tokens is not None and self.min_tokens != 0 and not _is_count(self.min_tokens):
      refuse("min_tokens", "a whole number of tokens, 0 or more, or None")

  @property
  def least_tokens(self) -> int:
    """`min_tokens`, resolved."""
    if self.min_tokens is not None:
      return self.min_tokens
    return tuning.BLOCK_MIN_TOKENS if self.regions is None else tuning.REGION_MIN_TOKENS

  def at_keep(self, keep: float) -> "BiFormer":
    """The same with this share of the regions."""
    return dataclasses.replace(self, keep=keep, top_k=None)

  def windows(self, grid: tuple[int, int]) -> Windows:
    """The regions of a grid."""
    return on_grid(grid, WINDOW) if self.regions is None else routing.regions(grid, self.regions)

  def count(self, keys: Windows) -> int:
    """Regions of keys that a region of queries attends to."""
    if self.top_k is not None:
      return self.top_k
    return max(1, round((self.keep or KEEP) * keys.blocks))

  def acts(self, site: Site) -> bool:
    return site.tokens_left >= self.least_tokens

  def check(self, site: Site):
    if site.key_grid is None:
      raise ValueError(f"BiFormer: the keys of block {site.block} are runs of tokens and have no "
                       f"grid to cut into regions; use blocks={{{site.block}: {{'attention': None"
                       "}}")
    if self.lce and site.key_grid != site.query_grid:
      raise ValueError(f"BiFormer(lce=True): in block {site.block} values lie on a grid of "
                       f"{site.key_grid}, queries on one of {site.query_grid}; use lce=False there")
    keys = self.windows(site.key_grid)
    if self.top_k is not None and self.top_k > keys.blocks:
      raise ValueError(f"BiFormer(top_k={self.top_k}): block {site.block} has only {keys.blocks} "
                       "regions of keys; give at most so many, or keep=")

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"softmax": "use attention=None there",
            "grid": "its regions are of the grid; use attention=None there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("full attention", "all scores", "token line")

  def make(self, site: Site, **kwargs) -> nn.Module:
    return BiLevelRouting(self, site, **kwargs)

  @classmethod
  def options(cls, site: Site) -> list["BiFormer"]:
    """Shares of the regions, where these are faster than dense attention."""
    found = [cls(keep=keep, regions=None) for keep in (0.25, 0.5, 0.75)]
    grids = None not in (site.query_grid, site.key_grid)
    return [method for method in found if grids and method.acts(site)]

  def from_dense(self, site: Site, params, stats, data):
    """Queries, keys, values and outputs are the dense block's; the local enhancement is zero."""
    del data
    if not self.lce:
      return params, stats
    width = site.heads * site.head_width
    own = {"kernel": jnp.zeros((LCE_SIZE, LCE_SIZE, 1, width)), "bias": jnp.zeros(width)}
    return {**params, self.scope: {"lce": own}}, stats

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """The local enhancement under the authors' name."""
    del site
    return conv(f"{torch}.attn.lepe", f"{ours}/{self.scope}/lce") if self.lce else []

  def facts(self, collections) -> dict[str, float]:
    """"attention_kept": share of the pairs of regions, or of tokens, that are scored; of all blocks
    that score fewer than all."""
    return attention.share_kept(collections)


class BiLevelRouting(nn.Module):
  """The routing of one block: gives the attention of a call its layout of regions, and the local
  enhancement. Leaves: lce/kernel (5, 5, 1, width), lce/bias (width,), where there is one."""
  spec: Any   # a BiFormer
  site: Site

  def setup(self):
    if self.spec.lce:
      self.lce = LocalConv(self.site.key_grid, LCE_SIZE, fan_in_uniform(LCE_SIZE ** 2),
                           self.site.prefix, self.site.dtype)

  def __call__(self, core: Core, query_bnfd, key_bmfd, source_bs=None, fused: bool = False) -> Core:
    """`core` that scores the chosen regions. Tokens are those of the whole grid."""
    del source_bs, fused
    site, windows = self.site, self.spec.windows
    layout = BlockLayout(None, windows(site.query_grid), windows(site.key_grid),
                         prefix=site.prefix)
    count = self.spec.count(layout.keys)
    if self.spec.lce:
      core = core._replace(local=_added(core.local, self._enhanced))
    whole = count == layout.keys.blocks
    if not whole:
      layout = routing.route(layout, query_bnfd, key_bmfd, count)
    if attention.wants_predictions(self):
      query, key = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (query_bnfd, key_bmfd))
      own_bn = layout.inner(jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2]))
      maps = core.maps(layout.inner(query), key, own_n=own_bn)
      self.sow("attention", "target", block_mass(maps, layout))
      self.sow("attention", "kept",
               jnp.ones((1, 1, 1, 1), bool) if whole else layout.scored_blocks())
    return core if whole else core._replace(layout=layout)

  def _enhanced(self, value_bmhd, x_bnw):
    if value_bmhd.shape[2] != self.site.heads:
      raise ValueError(f"BiFormer(lce=True): block {self.site.block} has values of "
                       f"{value_bmhd.shape[2]} heads of {self.site.heads}; use lce=False there, or "
                       "a method of the heads axis that keeps all values")
    return self.lce.of_heads(value_bmhd, x_bnw)


def _added(first, second):
  """Both local terms, or the only one."""
  return second if first is None else lambda value, x: first(value, x) + second(value, x)


def _is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1
