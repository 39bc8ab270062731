"""Sparsifiner's mask predictor at token granularity: a low-rank map ranks the keys of each query.

    P = softmax(s Q (W_down^T K)^T),  P~ = its largest coefficients,  mask = top-k(P~ U)

where W_down, W_up (M, r) are tied to the positions of the M keys and shared by the heads of a
block, and U is the sparse basis, W_up^T without its small entries. Attention is then masked dense
attention.
"""
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from vitcompact import attention
from vitcompact.attention import Core
from vitcompact.layers import nonzero, weight_init
from vitcompact.tracing import param


def top_k_mask(x, k: int):
  """Returns True at exactly the k largest entries along the last axis; ties go to the lowest index.
  """
  if x.ndim > 2 and attention.loops_over_images():   # one map at a time fits the cache
    maps = jax.lax.map(lambda rows: _top_k_mask(rows, k), x.reshape(-1, *x.shape[-2:]))
    return maps.reshape(x.shape)
  return _top_k_mask(x, k)


def _top_k_mask(x, k: int):
  if attention.portable():   # other runtimes have a top_k, and run loops slowly
    order = jax.lax.stop_gradient(x.astype(jnp.float32))
    kth = jax.lax.top_k(order, k)[0][..., -1:]
  else:
    order, kth = sortable_bits(x), kth_largest(x, k)
  above, equal = order > kth, order == kth
  ties = k - above.sum(axis=-1, keepdims=True)
  return above | (equal & (jnp.cumsum(equal, axis=-1) <= ties))


def sortable_bits(x):
  """Maps floats to int32 numbers of the same order."""
  x = jax.lax.stop_gradient(x.astype(jnp.float32))
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)   # -0 is 0
  # The bits of negative floats order them by magnitude, so they are flipped.
  return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def kth_largest(x, k: int):
  """Returns the k-th largest of `sortable_bits(x)` along the last axis, in a fifth of top_k's time.

  (..., M) -> (..., 1). Finds, bit by bit, the largest number that at least k entries reach.
  """
  order, lowest = sortable_bits(x), jnp.iinfo(jnp.int32).min

  def bit(i, kth):
    more = kth + (jnp.int32(1) << (31 - i))
    reached = (order >= more).sum(axis=-1, keepdims=True) >= k
    return jnp.where(reached, more, kth)

  return jax.lax.fori_loop(0, 32, bit, jnp.full((*x.shape[:-1], 1), lowest))


def low_rank_maps(query_bnfd, key_bmfd, down, scale: float):
  """Returns P = softmax over r of scale * Q (W_down^T K)^T, (B, f, N, r); down: (M, r) or
  (B, M, r)."""
  rows = "bmr" if down.ndim == 3 else "mr"
  with jax.named_scope(attention.SCOPE):
    key_brfd = jnp.einsum(f"bmfd,{rows}->brfd", key_bmfd, down)
    logits_bfnr = jnp.einsum("bnfd,brfd->bfnr", query_bnfd * scale, key_brfd)
  return jax.nn.softmax(logits_bfnr, axis=-1)


def sparse_coefficients(maps_bfnr, coefficients: int | float):
  """Returns P with all but its largest entries, or those above a threshold, set to 0; the rest is
  not renormalised."""
  if isinstance(coefficients, float):
    return jnp.where(maps_bfnr > coefficients, maps_bfnr, 0)
  return jnp.where(top_k_mask(maps_bfnr, min(coefficients, maps_bfnr.shape[-1])), maps_bfnr, 0)


def sparse_basis(spec, up):
  """Returns W_up, or its magnitudes, with small entries set to 0."""
  return jnp.where(jnp.abs(up) > spec.basis_threshold, up if spec.signed_basis else jnp.abs(up), 0)


def basis_scores(maps_bfnr, up, share=1):
  """Returns scores P U, (B, f, N, M), for up = U^T, (M, r) or (B, M, r)."""
  rows = "bmr" if up.ndim == 3 else "mr"
  with jax.named_scope(attention.SCOPE), nonzero("links.up"), attention.share(share):
    return jnp.einsum(f"bfnr,{rows}->bfnm", maps_bfnr, up)


def gather_rows(rows_sr, source_bs, tokens: int):
  """Returns sums and means, (B, tokens, r) each, of the rows of the source tokens that each token
  holds."""
  batch = source_bs.shape[0]
  # The -1 of a dropped token would count from the end.
  place_bs = jnp.where(source_bs < 0, tokens, source_bs)
  at = (jnp.arange(batch)[:, None], place_bs)
  spread = jnp.broadcast_to(rows_sr, (batch, *rows_sr.shape))
  sums = jnp.zeros((batch, tokens, rows_sr.shape[-1])).at[at].add(spread, mode="drop")
  counts = jnp.zeros((batch, tokens, 1)).at[at].add(1.0, mode="drop")
  return sums, sums / jnp.maximum(counts, 1)


class TokenMaskPredictor(nn.Module):
  """The predictor of one block: adds a mask to its attention.

  Leaves: down, up (tokens, rank); variant "code" also has reduce_query, reduce_key.
  tokens: number of keys before any token reduction; the first `prefix` are not patches.
  """
  spec: Any   # a Sparsifiner
  tokens: int
  prefix: int = 0
  deploy: bool = False

  @nn.compact
  def __call__(self, core: Core, query_bnfd, key_bmfd, source_bs=None, fused: bool = False) -> Core:
    """Returns `core` with a mask (B, f, N, M). source_bs, fused: as in `token_state.Tokens`."""
    # The mask has no gradient, and the reconstruction loss trains only the predictor.
    query, key = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (query_bnfd, key_bmfd))
    patches_bnfd = query[:, self.prefix:]
    down, up = self._weights(key.shape[1], source_bs)
    keep_bm = None if core.keep_mask is None else jax.lax.stop_gradient(core.keep_mask) > 0
    low_query, low_key = self._projections(patches_bnfd, key)
    if keep_bm is not None:   # excludes what inference drops from the sums
      low_key = jnp.where(keep_bm[:, :, None, None], low_key, 0)
    maps_bfnr = low_rank_maps(low_query, low_key, down, self._scale(query))
    if attention.wants_predictions(self):
      self.sow("attention", "score", self._reconstruction(maps_bfnr, up))
      own_n = jnp.arange(self.prefix, query.shape[1])
      self.sow("attention", "target",
               jax.lax.stop_gradient(core.maps(patches_bnfd, key, own_n=own_n)))
    if not self.spec.masked:
      return core
    # After a reduction, the tokens that are not patches are always kept.
    always = 0 if source_bs is None and keep_bm is None else self.prefix + int(fused)
    score_bfnm = self._score(maps_bfnr, up)
    if keep_bm is not None:   # and from the budget
      score_bfnm = jnp.where(keep_bm[:, None, None], score_bfnm, -jnp.inf)
    return self._restrict(core, score_bfnm, always, int(fused))

  def _restrict(self, core: Core, score_bfnm, always: int, fused: int) -> Core:
    batch, heads, queries, keys = score_bfnm.shape
    budget = max(min(self.spec.budget(self.tokens), keys), always)
    if always:
      place = jnp.arange(keys)[None, None, None]
      no_patch = (place < self.prefix) | (place >= keys - fused)
      score_bfnm = jnp.where(no_patch, jnp.inf, score_bfnm)
    dense = jnp.ones((batch, heads, self.prefix, keys), bool)
    kept_bfnm = top_k_mask(score_bfnm, budget)
    if attention.wants_predictions(self):
      self.sow("attention", "kept", kept_bfnm)
    mask = jnp.concatenate([dense, kept_bfnm], axis=2)
    scored = Fraction(self.prefix * keys + queries * budget, (self.prefix + queries) * keys)
    return core._replace(mask=mask, scored=scored)

  def _score(self, maps_bfnr, up):
    """Returns the scores by which the mask is chosen."""
    spec, rank = self.spec, maps_bfnr.shape[-1]
    used = rank if isinstance(spec.coefficients, float) else min(spec.coefficients, rank)
    maps, up = jax.lax.stop_gradient((maps_bfnr, up))
    basis = up if self.deploy else sparse_basis(spec, up)
    return basis_scores(sparse_coefficients(maps, spec.coefficients), basis,
                        share=Fraction(used, rank))

  def _reconstruction(self, maps_bfnr, up):
    """Returns the scores that the reconstruction loss compares with attention."""
    if self.spec.fit == "dense":
      return basis_scores(maps_bfnr, up)
    straight_through = up + jax.lax.stop_gradient(sparse_basis(self.spec, up) - up)
    return basis_scores(sparse_coefficients(maps_bfnr, self.spec.coefficients), straight_through)

  def _scale(self, query_bnfd) -> float:
    _, _, heads, width = query_bnfd.shape
    return (heads if self.spec.variant == "code" else width) ** -0.5

  def _projections(self, query, key):
    """Returns queries and keys of the predictor: those of attention, or projections of half their
    width."""
    if self.spec.variant == "paper":
      return query, key
    with jax.named_scope(attention.SCOPE):
      return [nn.Dense(x.shape[-1] // 2, kernel_init=weight_init, name=f"reduce_{name}")(x)
              for name, x in (("query", query), ("key", key))]

  def _weights(self, keys: int, source_bs):
    """Returns W_down and W_up for the present keys: (M, r), or (B, M, r) after a reduction."""
    shape = (self.tokens, self.spec.rank_of(self.tokens))
    for name in ("down", "up"):
      check_tied(self.get_variable("params", name), shape)
    down, up = (param(self, name, weight_init, shape) for name in ("down", "up"))
    if source_bs is None:
      return down, up
    return gather_rows(down, source_bs, keys)[0], gather_rows(up, source_bs, keys)[1]


def check_tied(stored, shape: tuple[int, int]):
  """Raises ValueError if stored weights belong to another number of tokens."""
  if stored is not None and stored.shape != shape:
    raise ValueError(
        f"mask predictor: its weights are {stored.shape}, for {stored.shape[0]} tokens at rank "
        f"{stored.shape[1]}, but this model has {shape[0]} at rank {shape[1]}; resize them with "
        f"vitcompact.convert.resized, and give Sparsifiner(rank={stored.shape[1]})")


def fit_predictor(spec, site, own, data):
  """Fits a predictor in closed form, without training, and returns its parameters.

  W_down averages clusters of keys that get attention from the same queries; W_up is the ridge
  regression of the dense maps on P, scaled up if the threshold would cut most of it (masks depend
  only on the order of scores and do not change). Ours, not the authors'.

  own: fresh parameters; data: a `calibration.Calibration`.
  """
  rank, (maps_hnm, _) = own["down"].shape[1], data.sums(_sum_maps)
  if maps_hnm.shape[-1] != site.tokens:   # after a reduction, some of the tied tokens are gone
    return own
  columns_mn = maps_hnm.reshape(-1, maps_hnm.shape[-1]).T
  down = cluster_means(columns_mn, rank)
  reduced = [own.get(f"reduce_{name}") for name in ("query", "key")]
  arguments = reduced, jnp.asarray(down, jnp.float32), jnp.zeros(site.prefix)
  scale = jnp.float32((site.heads if spec.variant == "code" else site.head_width) ** -0.5)
  gram, cross = data.sums(_basis_sums, scale, *arguments)[0]
  up = np.linalg.solve(gram + 1e-4 * np.trace(gram) / rank * np.eye(rank), cross).T
  size = np.median(np.abs(up))
  if size < 2 * spec.basis_threshold:
    up = up * (2 * spec.basis_threshold / max(size, 1e-30))
  return {**own, "down": jnp.asarray(down, jnp.float32), "up": jnp.asarray(up, jnp.float32)}


def cluster_means(rows_mn: np.ndarray, rank: int) -> np.ndarray:
  """Clusters the rows by deterministic k-means; returns (M, rank), a column that averages each
  cluster."""
  jittered = rows_mn + 1e-9 * np.random.default_rng(0).standard_normal(rows_mn.shape)
  labels = scipy.cluster.vq.kmeans2(jittered, rank, minit="++", seed=0, missing="raise")[1]
  members = np.eye(rank)[labels]
  return members / members.sum(axis=0)


def _sum_maps(seen):
  """Returns the maps (h, N, M), summed over images."""
  return seen.maps.sum(axis=0)


def _basis_sums(seen, scale, reduced, down, prefix):
  """Returns P^T P and P^T A, summed over images, heads and queries of patches."""
  q, k = seen.query, seen.key
  if reduced[0] is not None:
    q, k = (x @ layer["kernel"] + layer["bias"][None, None, None]
            for x, layer in zip((q, k), reduced, strict=True))
  maps_bfnr = low_rank_maps(q[:, prefix.shape[0]:], k, down, scale)
  return (jnp.einsum("bfnr,bfns->rs", maps_bfnr, maps_bfnr),
          jnp.einsum("bfnr,bfnm->rm", maps_bfnr, seen.maps[:, :, prefix.shape[0]:]))
