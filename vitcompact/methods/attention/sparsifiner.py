"""Sparsifiner: score only those pairs of tokens that a cheap predictor chooses (Wei et al., CVPR
2023, arXiv 2303.13755).

At token granularity a map of low rank ranks the keys of every query, and each query keeps its best:

    P = softmax(s Q (W_down^T K)^T),  P~ = its largest coefficients,  links = top-k(P~ U)

with W_down, W_up (M, r) tied to the positions of the M keys, shared by the heads of a block, and U
the sparse basis made of W_up^T. Attention is then dense attention, masked: the reference of the
method, not a faster one. Block granularity (`blocks.py`) is the fast one.
"""
import dataclasses
import math
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention
from vitcompact.attention import Core
from vitcompact.layers import weight_init
from vitcompact.trees import Leaf

# A name scope: products with the basis, of whose entries only the non-zero ones are needed.
BASIS_SCOPE = "vitcompact.basis"

# From here on gathering blocks is more than a tenth faster than dense attention, on a CPU at keep
# 0.25; it never is slower from about 100 on. `python -m experiments.links_speed` prints the times.
BLOCK_MIN_TOKENS = 197

LEAVES = [
    (r".*/links/(down|up)", Leaf((None, None), decay=True)),
    (r".*/links/(query|key|reduce_(query|key)/kernel)", Leaf((None, None), decay=True)),
]


@dataclasses.dataclass(frozen=True)
class Sparsifiner:
  """Links axis: each query is scored against a share `keep` of the keys.

  keep: in (0, 1]; a query has exactly ceil(keep * keys) links, ties go to the lowest index. Class
    tokens are linked to everything.
  variant: "paper", as drawn: scale 1 / sqrt(head width). "code", as released: queries and keys are
    first projected to half the head width, and the scale is 1 / sqrt(heads), of those computed.
  granularity: "token": a link joins two tokens; masked dense attention, a reference that is slower
    than dense. "block": a link joins two blocks of about `window` x `window` patches; a query block
    has max(1, round(keep * blocks)) of them, the one with itself included, and what is not linked
    is not computed. Behind DynamicViT, whose training only masks what it drops, the blocks of
    training are those of the whole grid; those of inference are cut from the survivors.
  masked: whether attention is restricted to the links. False is phase 1 of training: attention is
    dense while predictors learn. Whenever "attention" is a mutable collection, each predictor sows
    there its "score", the "target" to reconstruct (see `train.losses`) and what is "linked".
  min_tokens: blocks of the network with fewer keys have no predictor and stay dense; None: 0 for
    tokens, the measured crossover for blocks.
  window: block granularity: side of a block, in patches.

  Of the token predictor:
  reduce_n: its rank is keys // reduce_n, unless `rank` gives it (which lets weights move to another
    image size; at block granularity, it is the rank of the scores, None for all channels).
  coefficients: how many of the rank coefficients count: a whole number, the largest so many (the
    released configuration), or a threshold in (0, 1) (the paper's figure).
  basis_threshold: entries of W_up no larger than it in magnitude count as 0.
  basis: "signed" keeps the sign with which W_up was trained, "magnitude" drops it, as the released
    code does, so that strong negative weights become links; None: by variant, "magnitude" for code.
  fit: what reconstruction trains: "dense", all coefficients and the whole signed W_up, as
    published, though links are then chosen by other values; "used", the values that choose links,
    with the gradient passed straight through to the entries of W_up that the threshold cuts off.

  Of the released code are not followed: an unmasked copy of every map is kept (here on demand), the
  budget changes from call to call with the first image, pruned tokens still get mass from the class
  token (here they are gone), and equal scores are broken arbitrarily.
  """
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
    return BLOCK_MIN_TOKENS if self.granularity == "block" else 0

  def budget(self, keys: int) -> int:
    """Links of a query among so many keys; the rounding of 0.55 * 100 is not counted as one."""
    return math.ceil(self.keep * keys - 1e-9)

  def rank_of(self, keys: int) -> int:
    """Rank of the token predictor."""
    return self.rank or max(1, keys // self.reduce_n)


def _is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def largest(x, k: int):
  """True at the k largest entries along the last axis, exactly k; ties go to the lowest index."""
  if x.ndim > 2 and attention.loops_over_images():   # a map at a time stays in the cache
    maps = jax.lax.map(lambda rows: _largest(rows, k), x.reshape(-1, *x.shape[-2:]))
    return maps.reshape(x.shape)
  return _largest(x, k)


def _largest(x, k: int):
  order, kth = order_of(x), kth_largest(x, k)
  above, equal = order > kth, order == kth
  left = k - above.sum(axis=-1, keepdims=True)
  return above | (equal & (jnp.cumsum(equal, axis=-1) <= left))


def order_of(x):
  """int32 numbers in the order of these floats."""
  x = jax.lax.stop_gradient(x.astype(jnp.float32))
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)   # -0 is 0
  # Negative floats are sorted by magnitude, and lie below the positive ones.
  return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def kth_largest(x, k: int):
  """The k-th largest of `order_of(x)` along the last axis, bit by bit: a fifth of top_k's time.

  (..., M) -> (..., 1). The largest number that at least k entries reach.
  """
  order, lowest = order_of(x), jnp.iinfo(jnp.int32).min

  def bit(i, kth):
    more = kth + (jnp.int32(1) << (31 - i))
    reached = (order >= more).sum(axis=-1, keepdims=True) >= k
    return jnp.where(reached, more, kth)

  return jax.lax.fori_loop(0, 32, bit, jnp.full((*x.shape[:-1], 1), lowest))


def low_rank_maps(query_bnfd, key_bmfd, down, scale: float):
  """P = softmax over r of scale * Q (W_down^T K)^T: (B, f, N, r); down: (M, r) or (B, M, r)."""
  rows = "bmr" if down.ndim == 3 else "mr"
  with jax.named_scope(attention.SCOPE):
    key_brfd = jnp.einsum(f"bmfd,{rows}->brfd", key_bmfd, down)
    logits_bfnr = jnp.einsum("bnfd,brfd->bfnr", query_bnfd * scale, key_brfd)
  return jax.nn.softmax(logits_bfnr, axis=-1)


def sparse_coefficients(maps_bfnr, coefficients: int | float):
  """P with its other entries at 0, and not renormalised: the largest so many, or those above."""
  if isinstance(coefficients, float):
    return jnp.where(maps_bfnr > coefficients, maps_bfnr, 0)
  return jnp.where(largest(maps_bfnr, min(coefficients, maps_bfnr.shape[-1])), maps_bfnr, 0)


def sparse_basis(spec: Sparsifiner, up):
  """W_up with its small entries at 0."""
  return jnp.where(jnp.abs(up) > spec.basis_threshold, up if spec.signed_basis else jnp.abs(up), 0)


def expand(maps_bfnr, up, share=1):
  """Scores P U: (B, f, N, M), for up = U^T: (M, r) or (B, M, r)."""
  rows = "bmr" if up.ndim == 3 else "mr"
  with jax.named_scope(attention.SCOPE), jax.named_scope(BASIS_SCOPE), attention.share(share):
    return jnp.einsum(f"bfnr,{rows}->bfnm", maps_bfnr, up)


def gather_rows(rows_sr, source_bs, tokens: int):
  """Sums and means, (B, tokens, r) each, of the rows whose source tokens are one token now."""
  batch = source_bs.shape[0]
  # -1, a dropped token, would count from the end.
  place_bs = jnp.where(source_bs < 0, tokens, source_bs)
  at = (jnp.arange(batch)[:, None], place_bs)
  spread = jnp.broadcast_to(rows_sr, (batch, *rows_sr.shape))
  sums = jnp.zeros((batch, tokens, rows_sr.shape[-1])).at[at].add(spread, mode="drop")
  counts = jnp.zeros((batch, tokens, 1)).at[at].add(1.0, mode="drop")
  return sums, sums / jnp.maximum(counts, 1)


def density(spec: Sparsifiner, params, deploy: bool) -> float:
  """Share of the basis that is not 0; a folded one has lost its small entries already."""
  up = params["up"] if deploy else sparse_basis(spec, params["up"])
  return float(jnp.mean(up != 0))


class TokenLinks(nn.Module):
  """The predictor of one block: gives the attention of a call its mask.

  Leaves: down, up (tokens, rank); variant "code" also reduce_query, reduce_key.
  tokens: keys at the start, before any token is reduced; the first `prefix` are no patches.
  """
  spec: Sparsifiner
  tokens: int
  prefix: int = 0
  deploy: bool = False

  @nn.compact
  def __call__(self, core: Core, query_bnfd, key_bmfd, source_bs=None, fused: bool = False) -> Core:
    """`core` with a mask (B, f, N, M). source_bs, fused: as in `tokens.token_state.Tokens`."""
    # The mask has no gradient, and reconstruction trains nothing but the predictor.
    query, key = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (query_bnfd, key_bmfd))
    rest_bnfd = query[:, self.prefix:]
    down, up = self._weights(key.shape[1], source_bs)
    keep_bm = None if core.keep_mask is None else jax.lax.stop_gradient(core.keep_mask) > 0
    low_query, low_key = self._reduced(rest_bnfd, key)
    if keep_bm is not None:   # what inference drops is in no sum
      low_key = jnp.where(keep_bm[:, :, None, None], low_key, 0)
    maps_bfnr = low_rank_maps(low_query, low_key, down, self._scale(query))
    if attention.wants_predictions(self):
      self.sow("attention", "score", self._fitted(maps_bfnr, up))
      own_n = jnp.arange(self.prefix, query.shape[1])
      self.sow("attention", "target", jax.lax.stop_gradient(core.maps(rest_bnfd, key, own_n=own_n)))
    if not self.spec.masked:
      return core
    # After a reduction the tokens that are no patches stay linked.
    always = 0 if source_bs is None and keep_bm is None else self.prefix + int(fused)
    score_bfnm = self._score(maps_bfnr, up)
    if keep_bm is not None:   # nor does it take a link from the others
      score_bfnm = jnp.where(keep_bm[:, None, None], score_bfnm, -jnp.inf)
    return self._restrict(core, score_bfnm, always, int(fused))

  def _restrict(self, core: Core, score_bfnm, always: int, fused: int) -> Core:
    batch, heads, queries, keys = score_bfnm.shape
    budget = max(min(self.spec.budget(self.tokens), keys), always)
    if always:
      place = jnp.arange(keys)[None, None, None]
      outside = (place < self.prefix) | (place >= keys - fused)
      score_bfnm = jnp.where(outside, jnp.inf, score_bfnm)
    dense = jnp.ones((batch, heads, self.prefix, keys), bool)
    linked_bfnm = largest(score_bfnm, budget)
    if attention.wants_predictions(self):
      self.sow("attention", "linked", linked_bfnm)
    mask = jnp.concatenate([dense, linked_bfnm], axis=2)
    linked = Fraction(self.prefix * keys + queries * budget, (self.prefix + queries) * keys)
    return core._replace(mask=mask, scored=linked)

  def _score(self, maps_bfnr, up):
    """What links are chosen by."""
    spec, rank = self.spec, maps_bfnr.shape[-1]
    used = rank if isinstance(spec.coefficients, float) else min(spec.coefficients, rank)
    maps, up = jax.lax.stop_gradient((maps_bfnr, up))
    basis = up if self.deploy else sparse_basis(spec, up)
    return expand(sparse_coefficients(maps, spec.coefficients), basis, share=Fraction(used, rank))

  def _fitted(self, maps_bfnr, up):
    """What reconstruction compares with attention."""
    if self.spec.fit == "dense":
      return expand(maps_bfnr, up)
    straight_through = up + jax.lax.stop_gradient(sparse_basis(self.spec, up) - up)
    return expand(sparse_coefficients(maps_bfnr, self.spec.coefficients), straight_through)

  def _scale(self, query_bnfd) -> float:
    _, _, heads, width = query_bnfd.shape
    return (heads if self.spec.variant == "code" else width) ** -0.5

  def _reduced(self, query, key):
    """Queries and keys of the predictor: those of attention, or half as wide."""
    if self.spec.variant == "paper":
      return query, key
    with jax.named_scope(attention.SCOPE):
      return [nn.Dense(x.shape[-1] // 2, kernel_init=weight_init, name=f"reduce_{name}")(x)
              for name, x in (("query", query), ("key", key))]

  def _weights(self, keys: int, source_bs):
    """W_down and W_up for the keys that there are: (M, r), or (B, M, r) after a reduction."""
    shape = (self.tokens, self.spec.rank_of(self.tokens))
    for name in ("down", "up"):
      check_tied(self.get_variable("params", name), shape)
    down, up = (self.param(name, weight_init, shape) for name in ("down", "up"))
    if source_bs is None:
      return down, up
    return gather_rows(down, source_bs, keys)[0], gather_rows(up, source_bs, keys)[1]

  @nn.nowrap
  def fold(self, params):
    """Parameters of the deployed predictor: the basis as it is used."""
    return params if self.deploy else {**params, "up": sparse_basis(self.spec, params["up"])}


def check_tied(stored, shape: tuple[int, int]):
  """Raises ValueError where stored weights belong to another number of tokens."""
  if stored is not None and stored.shape != shape:
    raise ValueError(
        f"links predictor: its weights are {stored.shape}, for {stored.shape[0]} tokens at rank "
        f"{stored.shape[1]}, but this model has {shape[0]} at rank {shape[1]}; resize them with "
        f"vitcompact.methods.attention.resize.resize_links, and give Sparsifiner(rank={stored.shape[1]})")
