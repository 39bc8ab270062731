"""Sparsifiner: score only those pairs of tokens that a cheap mask predictor chooses (Wei et al.,
CVPR 2023, arXiv 2303.13755).

Token granularity (`token_predictor.py`) is the paper's method and a reference: dense attention,
masked, no faster than dense. Block granularity (`block_predictor.py`, ours) is the fast one.
"""
import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention
from vitcompact.attention import tuning
from vitcompact.methods import surgery
from vitcompact.methods.attention.block_predictor import BlockMaskPredictor
from vitcompact.methods.attention.token_predictor import (
  TokenMaskPredictor,
  fitted,
  sparse_basis,
)
from vitcompact.methods.protocol import FirstPhase, Site
from vitcompact.settings import Setting, weight
from vitcompact.torch_names import Entry, Positions, linear
from vitcompact.trees import Leaf


def attention_reconstruction(predictions) -> jax.Array:
  """(1 / L) sum over L blocks, heads, queries, keys of (score - target)^2: (B,).

  predictions: {block: {"links": {"score": (array,), "target": (array,)}}}, the collection
    "attention" of `model.apply(..., mutable=["attention"])`: what each predictor would restore of
    the block's own dense attention, both (B, heads, N, M), of tokens or of blocks of them.
  """
  pairs = [block["links"] for block in predictions.values() if "links" in block]
  if not pairs:
    raise ValueError("no block of this model has a mask predictor: give its plan "
                     "attention=Sparsifiner(...), with min_tokens below the tokens of its blocks")
  errors = [jnp.sum((pair["score"][0] - pair["target"][0]) ** 2, axis=(1, 2, 3)) for pair in pairs]
  return sum(errors) / len(errors)


@dataclasses.dataclass(frozen=True)
class Sparsifiner:
  """Attention axis: each query is scored against a share `keep` of the keys.

  keep: in (0, 1]; a query keeps exactly ceil(keep * keys) of them, ties go to the lowest index.
    Class tokens attend to everything.
  variant: "paper", as drawn: scale 1 / sqrt(head width). "code", as released: queries and keys are
    first projected to half the head width, and the scale is 1 / sqrt(heads), of those computed.
  granularity: "token": pairs of tokens; masked dense attention, a reference that is slower than
    dense. "block": pairs of blocks of about `window` x `window` patches; a query block keeps
    max(1, round(keep * blocks)) of them, its own included, and what is not kept is not computed.
    After DynamicViT, whose training only masks what it drops, the blocks of training are those of
    the whole grid; those of inference are cut from the survivors.
  masked: whether attention is restricted. False is the first phase of training: attention is dense
    while predictors learn. Whenever "attention" is a mutable collection, each predictor sows there
    its "score", the "target" to reconstruct and what is "kept".
  min_tokens: blocks of the network with fewer keys have no predictor and stay dense; None: 0 for
    tokens, the measured crossover for blocks.
  window: block granularity: side of a block, in patches.

  Of the token predictor:
  reduce_n: its rank is keys // reduce_n, unless `rank` gives it (which lets weights move to another
    image size; at block granularity, it is the rank of the scores, None for all channels).
  coefficients: how many of the rank coefficients count: a whole number of the largest (the
    released configuration), or a threshold in (0, 1) (the paper's figure).
  basis_threshold: entries of W_up no larger than it in magnitude count as 0.
  basis: "signed" keeps the sign with which W_up was trained, "magnitude" drops it, as the released
    code does, so that strong negative weights are kept; None: by variant, "magnitude" for code.
  fit: what reconstruction trains: "dense", all coefficients and the whole signed W_up, as
    published, though the mask is then chosen by other values; "used", the values that choose it,
    with the gradient passed straight through to the entries of W_up that the threshold cuts off.

  Of the released code are not followed: an unmasked copy of every map is kept (here on demand), the
  budget changes from call to call with the first image, pruned tokens still get mass from the class
  token (here they are gone), and equal scores are broken arbitrarily.
  """
  axis: ClassVar[str] = "attention"
  scope: ClassVar[str] = "links"
  rules: ClassVar = [
      (r".*/links/(down|up)", Leaf((None, None), decay=True)),
      (r".*/links/(query|key|reduce_(query|key)/kernel)", Leaf((None, None), decay=True)),
  ]
  settings: ClassVar = {
      "reconstruct.steps": Setting(0, low=0, unit="of steps"),
      "reconstruct.weight": weight(0.01),
      "reconstruct.learning_rate": Setting(3e-4, low=0),
      "reconstruct.warmup_steps": Setting(0, low=0),
      "reconstruct.warmup_learning_rate": Setting(0.0, low=0),
      "reconstruct.final_learning_rate": Setting(2e-4, low=0),
  }
  first_phase: ClassVar = FirstPhase(
      section="reconstruct", parameters=r"(.*/)?links/.*",
      method=lambda method: dataclasses.replace(method, masked=False),
      loss=lambda collections: attention_reconstruction(collections.get("attention", {})))
  collections: ClassVar = ("attention",)

  keep: float = 0.25
  variant: str = "paper"
  granularity: str = "token"
  reduce_n: int = 6
  coefficients: int | float = 8
  basis_threshold: float = 0.02
  basis: str | None = None
  fit: str = "dense"
  rank: int | None = None
  window: int = 8
  min_tokens: int | None = None
  masked: bool = True

  def __post_init__(self):
    def refuse(field, rule):
      raise ValueError(f"Sparsifiner({field}={getattr(self, field)!r}): must be {rule}")

    if not _is_number(self.keep) or not 0 < self.keep <= 1:
      refuse("keep", "a share of the keys in (0, 1], such as 0.25")
    for field, allowed in (("variant", ("paper", "code")), ("granularity", ("token", "block")),
                           ("basis", (None, "signed", "magnitude")), ("fit", ("dense", "used")),
                           ("masked", (True, False))):
      if getattr(self, field) not in allowed:
        refuse(field, f"one of {allowed}")
    for field in ("reduce_n", "window") + (() if self.rank is None else ("rank",)):
      if not _is_count(getattr(self, field)):
        refuse(field, "a whole number of at least 1")
    if not _is_count(self.coefficients) and not (
        isinstance(self.coefficients, float) and 0 < self.coefficients < 1):
      refuse("coefficients", "a whole number of at least 1, or a threshold in (0, 1)")
    if not _is_number(self.basis_threshold) or not 0 <= self.basis_threshold < math.inf:
      refuse("basis_threshold", "a number of at least 0")
    if self.min_tokens is not None and self.min_tokens != 0 and not _is_count(self.min_tokens):
      refuse("min_tokens", "a whole number of tokens, 0 or more, or None")
    if self.granularity == "block" and self.variant == "code":
      raise ValueError("Sparsifiner(granularity='block', variant='code'): the released code knows "
                       "no blocks; use variant='paper'")

  @property
  def signed_basis(self) -> bool:
    return (self.basis or {"paper": "signed", "code": "magnitude"}[self.variant]) == "signed"

  @property
  def least_tokens(self) -> int:
    """`min_tokens`, resolved."""
    if self.min_tokens is not None:
      return self.min_tokens
    return tuning.BLOCK_MIN_TOKENS if self.granularity == "block" else 0

  def at_keep(self, keep: float) -> "Sparsifiner":
    """The same with another keep rate. Its weights fit all of them."""
    return dataclasses.replace(self, keep=keep)

  def budget(self, keys: int) -> int:
    """Keys kept by a query among `keys`; the rounding of 0.55 * 100 is not counted as one."""
    return math.ceil(self.keep * keys - 1e-9)

  def rank_of(self, keys: int) -> int:
    """Rank of the token predictor."""
    return self.rank or max(1, keys // self.reduce_n)

  def acts(self, site: Site) -> bool:
    return site.tokens_left >= self.least_tokens

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"softmax": "use attention=None there",
            # Of windows there are many in an image, and the losses of predictors are an image's.
            "full attention": "use attention=None there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("full attention", "all scores") if self.granularity == "block" else ("full attention",)

  def make(self, site: Site, **kwargs) -> nn.Module:
    if self.granularity == "block":
      return BlockMaskPredictor(self, site.tokens, site.prefix, site.query_grid, site.key_grid,
                                **kwargs)
    return TokenMaskPredictor(self, site.tokens, site.prefix, deploy=site.deploy, **kwargs)

  @classmethod
  def options(cls, site: Site) -> list["Sparsifiner"]:
    """Shares of the blocks, where these are faster than dense attention."""
    found = [cls(keep=keep, granularity="block") for keep in (0.25, 0.5, 0.75)]
    return [method for method in found if method.acts(site)]

  def from_dense(self, site: Site, params, stats, data):
    """A fresh predictor; with calibration images, one of tokens that restores the dense maps as
    well as it can without training: see `token_predictor.fitted`. Blocks start at the scores of
    their means all the same."""
    own = surgery.fresh(self, site)[1]["params"]
    if data is not None and self.granularity == "token":
      own = fitted(self, site, own, data)
    return {**params, self.scope: own}, stats

  def fold(self, site: Site, params, stats):
    """The basis as it is used: its small entries are 0."""
    links = params["links"]
    if site.deploy or self.granularity == "block":
      return params, stats
    return {**params, "links": {**links, "up": sparse_basis(self, links["up"])}}, stats

  def at_size(self, site: Site) -> "Sparsifiner":
    """Itself with the rank that it has here, whatever the number of tokens becomes."""
    if self.granularity == "block":
      return self
    return dataclasses.replace(self, rank=self.rank_of(site.tokens))

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Under the authors' names; those of blocks, which they do not have, are ours."""
    torch, ours = f"{torch}.attn.mask_predictor", f"{ours}/links"
    if self.granularity == "block":
      return [Entry(f"{torch}.{name}", (f"params/{ours}/{name}",)) for name in ("query", "key")]
    positions = Positions(site.key_grid or (site.tokens - site.prefix, 1), site.prefix, "bilinear",
                          tied=True)
    entries = [Entry(f"{torch}.proj_n", (f"params/{ours}/down",),
                     positions=positions._replace(summed=True)),
               Entry(f"{torch}.proj_back_n", (f"params/{ours}/up",), positions=positions)]
    if self.variant == "code":
      for theirs, name in (("proj_c_q", "reduce_query"), ("proj_c_k", "reduce_key")):
        entries += linear(f"{torch}.{theirs}", f"{ours}/{name}")
    return entries

  def facts(self, collections) -> dict[str, float]:
    """"attention_kept": share of the pairs of tokens, or of blocks of them, that are scored."""
    return attention.share_kept(collections)


def _is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
