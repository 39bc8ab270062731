"""Sparsifiner: score only the pairs of tokens that a cheap mask predictor chooses (Wei et al., CVPR
2023, arXiv 2303.13755).

Token granularity (`token_predictor.py`) is the paper's method and a reference: masked dense
attention, no faster than dense. Block granularity (`block_predictor.py`, ours) is the fast one.
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
  fit_predictor,
  sparse_basis,
)
from vitcompact.methods.protocol import FirstPhase, Site
from vitcompact.settings import Setting, weight
from vitcompact.torch_names import Entry, Positions, linear
from vitcompact.trees import Leaf


def attention_reconstruction(predictions) -> jax.Array:
  """(1 / L) sum over L blocks, heads, queries, keys of (score - target)^2: (B,).

  predictions: {block: {"links": {"score": (array,), "target": (array,)}}}, the collection
    "attention" of `model.apply(..., mutable=["attention"])`. score is each predictor's estimate of
    the block's dense attention, target; both (B, heads, N, M), over tokens or blocks of tokens.
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

  keep: in (0, 1]; a query keeps exactly ceil(keep * keys) keys; ties go to the lowest index. Class
    tokens attend to everything.
  variant: "paper" follows the paper: scale 1 / sqrt(head width). "code" follows the released code:
    queries and keys are first projected to half the head width, and the scale is 1 / sqrt(heads),
    counting the scored heads.
  granularity: "token": chooses pairs of tokens by masking dense attention, a reference slower than
    dense. "block": chooses pairs of blocks of about `window` x `window` patches; a query block
    keeps max(1, round(keep * blocks)) of them, its own included, and the others are not computed.
    With DynamicViT, which in training masks the tokens that it drops, training uses blocks of the
    whole grid, and inference uses blocks of the remaining tokens.
  masked: whether attention is restricted. False in the first phase of training: attention is dense
    while predictors learn. Whenever "attention" is a mutable collection, each predictor sows there
    its "score", the "target" to reconstruct and which pairs are "kept".
  min_tokens: blocks of the network with fewer keys have no predictor and stay dense; None: 0 at
    token granularity, the measured crossover at block granularity.
  window: at block granularity, the side of a block in patches.

  Fields of the token predictor:
  reduce_n: its rank is keys // reduce_n, unless `rank` is given, so that weights fit another image
    size. At block granularity, `rank` is the rank of the scores; None uses all channels.
  coefficients: how many of the rank coefficients are used: a whole number of the largest (as in the
    released configuration), or those above a threshold in (0, 1) (as in the paper's figure).
  basis_threshold: entries of W_up no larger than this in magnitude count as 0.
  basis: "signed" keeps the sign with which W_up was trained; "magnitude" drops it, as the released
    code does, so that large negative weights count as large; None: "magnitude" for variant="code",
    else "signed".
  fit: which values the reconstruction loss trains. "dense": all coefficients and the whole signed
    W_up, as published, although other values choose the mask. "used": the values that choose the
    mask, with a straight-through gradient to the entries of W_up below the threshold.

  Differences from the released code. There, an unmasked copy of every map is kept (here on demand),
  the budget depends on the first image of each call, pruned tokens still get mass from the class
  token (here they are removed), and ties are broken arbitrarily.
  """
  axis: ClassVar[str] = "attention"
  provenance: ClassVar = ("arXiv 2303.13755",
                          'granularity="block" and fitting from images are ours')
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
  def token_threshold(self) -> int:
    """`min_tokens`, with None replaced by its default."""
    if self.min_tokens is not None:
      return self.min_tokens
    return tuning.BLOCK_MIN_TOKENS if self.granularity == "block" else 0

  def at_keep(self, keep: float | None = None) -> "Sparsifiner":
    """Returns the method with masks at a keep rate; the same weights fit every keep rate."""
    return dataclasses.replace(self, keep=keep or self.keep, masked=True)

  def budget(self, keys: int) -> int:
    """Returns how many of `keys` a query keeps; the rounding error of 0.55 * 100 adds no key."""
    return math.ceil(self.keep * keys - 1e-9)

  def rank_of(self, keys: int) -> int:
    """Returns the rank of the token predictor."""
    return self.rank or max(1, keys // self.reduce_n)

  def acts(self, site: Site) -> bool:
    return site.tokens_left >= self.token_threshold

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"softmax": "use attention=None there",
            # An image has many windows, but the losses of predictors are per image.
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
    """Returns keep rates at block granularity, if that is faster than dense attention here."""
    candidates = [cls(keep=keep, granularity="block") for keep in (0.25, 0.5, 0.75)]
    return [method for method in candidates if method.acts(site)]

  def from_dense(self, site: Site, params, stats, data):
    """Adds a fresh predictor. With calibration images, a token predictor is fitted to the dense
    maps, see `fit_predictor`. A block predictor always starts from the scores of the
    blocks' means."""
    predictor = surgery.fresh(self, site)[1]["params"]
    if data is not None and self.granularity == "token":
      predictor = fit_predictor(self, site, predictor, data)
    return {**params, self.scope: predictor}, stats

  def fold(self, site: Site, params, stats):
    """Replaces the basis by the one that inference uses, in which small entries are 0."""
    links = params["links"]
    if site.deploy or self.granularity == "block":
      return params, stats
    return {**params, "links": {**links, "up": sparse_basis(self, links["up"])}}, stats

  def at_size(self, site: Site) -> "Sparsifiner":
    """Fixes the rank at that of this site, whatever the number of tokens becomes."""
    if self.granularity == "block":
      return self
    return dataclasses.replace(self, rank=self.rank_of(site.tokens))

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries under the authors' names; for block granularity, under our own."""
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
    """Returns "attention_kept": the share of pairs of tokens, or blocks of tokens, that are scored.
    """
    return attention.share_kept(collections)


def _is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
