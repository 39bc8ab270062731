"""Bi-level routing attention (BiFormer): each region of queries attends to the regions of keys with
the highest scores (Zhu et al., CVPR 2023, arXiv 2303.08810)."""
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

LCE_SIZE = 5     # side of the kernel of the local context enhancement
WINDOW = 8       # about the side of a region in patches, with regions=None
KEEP = 0.25


@dataclasses.dataclass(frozen=True)
class BiFormer:
  """Attention axis: the patches of a region attend to the patches of k regions, those whose mean
  keys have the highest scores with its mean query; one choice for all heads.

  keep: k as a share of the regions, in (0, 1], rounded, at least one region; top_k: k itself. Give
    at most one of them; the default is keep=0.25. If k is all regions, attention is dense and
    nothing is routed.
  regions: number of regions per side of the grid, 7 in the paper; if it does not divide the grid,
    the last regions are padded, and the padding is masked. None: regions of about 8 x 8 patches,
    with which block-sparse attention is fastest.
  lce: whether to add a depthwise 5 x 5 convolution of the values, with bias, to the heads' outputs
    (local context enhancement); it starts at zero if the weights come from a dense block.
  min_tokens: blocks of the network with fewer keys stay dense; None: the measured crossover.

  Ours: prefix tokens such as the class token attend to all tokens, and all attend to them; they are
  in no region and have no local enhancement. Scores keep the scale 1 / sqrt(head width) of the
  model; the paper's own network has 1 / sqrt(width). As in the paper, a region need not attend to
  itself.
  """
  axis: ClassVar[str] = "attention"
  provenance: ClassVar = ("arXiv 2303.08810", "`regions=None` and prefix tokens are ours")
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
      raise ValueError(f"BiFormer(keep={self.keep}, top_k={self.top_k}): both set the number of "
                       "kept regions; give one of them")
    if not isinstance(self.lce, bool):
      refuse("lce", "True or False")
    if self.min_tokens is not None and self.min_tokens != 0 and not _is_count(self.min_tokens):
      refuse("min_tokens", "a whole number of tokens, 0 or more, or None")

  @property
  def token_threshold(self) -> int:
    """`min_tokens`, with None replaced by its default."""
    if self.min_tokens is not None:
      return self.min_tokens
    return tuning.BLOCK_MIN_TOKENS if self.regions is None else tuning.REGION_MIN_TOKENS

  def at_keep(self, keep: float | None = None) -> "BiFormer":
    """Returns the method with another share of the regions."""
    return self if keep is None else dataclasses.replace(self, keep=keep, top_k=None)

  def windows(self, grid: tuple[int, int]) -> Windows:
    """Returns the regions of a grid."""
    return on_grid(grid, WINDOW) if self.regions is None else routing.regions(grid, self.regions)

  def count(self, keys: Windows) -> int:
    """Returns how many regions of keys a region of queries attends to."""
    if self.top_k is not None:
      return self.top_k
    return max(1, round((self.keep or KEEP) * keys.blocks))

  def acts(self, site: Site) -> bool:
    return site.tokens_left >= self.token_threshold

  def check(self, site: Site):
    if site.key_grid is None:
      raise ValueError(f"BiFormer: the keys of block {site.block} have no grid to cut into "
                       f"regions; use blocks={{{site.block}: {{'attention': None}}}}")
    if self.lce and site.key_grid != site.query_grid:
      raise ValueError(f"BiFormer(lce=True): in block {site.block} the grid of values is "
                       f"{site.key_grid}, that of queries {site.query_grid}; use lce=False there")
    keys = self.windows(site.key_grid)
    if self.top_k is not None and self.top_k > keys.blocks:
      raise ValueError(f"BiFormer(top_k={self.top_k}): block {site.block} has only {keys.blocks} "
                       "regions of keys; give at most that, or keep=")

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"softmax": "use attention=None there",
            "grid": "its regions are parts of the grid; use attention=None there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("full attention", "all scores", "token line")

  def make(self, site: Site, **kwargs) -> nn.Module:
    return BiLevelRouting(self, site, **kwargs)

  @classmethod
  def options(cls, site: Site) -> list["BiFormer"]:
    """Returns several shares of the regions, if they are faster than dense attention here."""
    candidates = [cls(keep=keep, regions=None) for keep in (0.25, 0.5, 0.75)]
    grids = None not in (site.query_grid, site.key_grid)
    return [method for method in candidates if grids and method.acts(site)]

  def from_dense(self, site: Site, params, stats, data):
    """Keeps the dense block's queries, keys, values and outputs; the local enhancement is zero."""
    del data
    if not self.lce:
      return params, stats
    width = site.heads * site.head_width
    leaves = {"kernel": jnp.zeros((LCE_SIZE, LCE_SIZE, 1, width)), "bias": jnp.zeros(width)}
    return {**params, self.scope: {"lce": leaves}}, stats

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries of the local enhancement, under the authors' name."""
    del site
    return conv(f"{torch}.attn.lepe", f"{ours}/{self.scope}/lce") if self.lce else []

  def facts(self, collections) -> dict[str, float]:
    """Returns "attention_kept": the share of pairs of regions, or of tokens, that are scored, mean
    over the blocks with sparse attention."""
    return attention.share_kept(collections)


class BiLevelRouting(nn.Module):
  """The routing of one block: adds the layout of regions and the local enhancement to its
  attention. Leaves, with local enhancement: lce/kernel (5, 5, 1, width), lce/bias (width,)."""
  spec: Any   # a BiFormer
  site: Site

  def setup(self):
    if self.spec.lce:
      self.lce = LocalConv(self.site.key_grid, LCE_SIZE, fan_in_uniform(LCE_SIZE ** 2),
                           self.site.prefix, self.site.dtype)

  def __call__(self, core: Core, query_bnfd, key_bmfd, source_bs=None, fused: bool = False) -> Core:
    """Returns `core` restricted to the chosen regions. Needs the tokens of the whole grid."""
    del source_bs, fused
    site, windows = self.site, self.spec.windows
    layout = BlockLayout(None, windows(site.query_grid), windows(site.key_grid),
                         prefix=site.prefix)
    count = self.spec.count(layout.keys)
    if self.spec.lce:
      core = core._replace(local=_sum_terms(core.local, self._local_enhancement))
    dense = count == layout.keys.blocks
    if not dense:
      layout = routing.route(layout, query_bnfd, key_bmfd, count)
    if attention.wants_predictions(self):
      query, key = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (query_bnfd, key_bmfd))
      own_bn = layout.inner(jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2]))
      maps = core.maps(layout.inner(query), key, own_n=own_bn)
      self.sow("attention", "target", block_mass(maps, layout))
      self.sow("attention", "kept",
               jnp.ones((1, 1, 1, 1), bool) if dense else layout.scored_blocks())
    return core if dense else core._replace(layout=layout)

  def _local_enhancement(self, value_bmhd, x_bnw):
    if value_bmhd.shape[2] != self.site.heads:
      raise ValueError(f"BiFormer(lce=True): block {self.site.block} has values of "
                       f"{value_bmhd.shape[2]} heads of {self.site.heads}; use lce=False there, or "
                       "a method of the heads axis that keeps all values")
    return self.lce.filter_heads(value_bmhd, x_bnw)


def _sum_terms(first, second):
  """Returns the sum of two local terms, the first of which may be None."""
  return second if first is None else lambda value, x: first(value, x) + second(value, x)


def _is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1
