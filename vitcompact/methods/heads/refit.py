"""Chooses which heads stay real and which one each other head copies, then refits values and
outputs to the dense attention: in closed form, from calibration images.

Our own work. Head i can stand in for head j if the error *after* the values and outputs of head j
is small. On small trained models, choosing by the similarity of the maps themselves gave two to
three times the KL of the logits.
"""
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from vitcompact.regression import (
  Regression,
  Sums,
  balance_factors,
  choose_ridge,
  closest_factors,
  fit_held_out_and_all,
  product,
  solver,
  sums_of,
)

MAX_SETS = 20_000     # with more sets of real heads than this, heads are removed greedily
SWEEPS = 3
MAX_FEATURES = 4608   # largest heads x width for which filters are fitted; the sums are its square


class Arrangement(NamedTuple):
  """order: the old number of the head at each new place. The f real heads come first; place f + g
  copies place g mod f. cost: E |error|^2 of the attention's output."""
  order: tuple[int, ...]
  cost: float


def head_costs(seen, value, bias, out):
  """Returns (costs (h, h), number of tokens), both summed over tokens. costs[i, j] is the error if
  head j used the map of head i, |(A_i - A_j) V_j O_j|^2; the diagonal holds |A_j V_j O_j|^2.

  value (D, h, d), bias (h, d), out (h, d, D): of the dense block.
  """
  high = jax.lax.Precision.HIGHEST
  seen, heads = seen.with_fewer_images(), value.shape[1]

  def costs_of_copies(j):
    """Returns (h,), the error of head j's output with the map of each head instead of its own."""
    values_bmd = seen.keys @ value[:, j] + bias[j][None, None]
    outputs_bhnd = jnp.einsum("bhnm,bmd->bhnd", seen.maps, values_bmd)
    gram_dd = jnp.matmul(out[j], out[j].T, precision=high)
    own_bnd = outputs_bhnd[:, j]
    error_bhnd = jnp.where(jnp.arange(heads)[None, :, None, None] == j, own_bnd[:, None],
                           outputs_bhnd - own_bnd[:, None])
    return jnp.einsum("bhnd,de,bhne->h", error_bhnd, gram_dd, error_bhnd)

  costs_jh = jax.lax.map(costs_of_copies, jnp.arange(heads))
  return costs_jh.T, jnp.asarray(seen.maps.shape[0] * seen.maps.shape[2], jnp.float32)


def arrange(cost: np.ndarray, real: int) -> Arrangement:
  """Returns the cheapest choice of `real` heads, and of the other heads that copy each of them.

  cost: (h, h), [i, j] if head j copies head i's map. The numbers of copies of real heads differ by
  at most one, as in the layout of `HMHSA`.
  """
  heads = len(cost)
  if math.comb(heads, real) <= MAX_SETS:
    return min((_assign_copies(cost, kept) for kept in itertools.combinations(range(heads), real)),
               key=lambda found: found.cost)
  kept = list(range(heads))
  while len(kept) > real:   # remove the head whose loss costs least
    def cost_without(head):
      rest = [other for other in kept if other != head]
      return sum(cost[rest, j].min() for j in range(heads) if j not in rest)
    kept.remove(min(kept, key=cost_without))
  return _assign_copies(cost, tuple(kept))


def _assign_copies(cost, kept: tuple[int, ...]) -> Arrangement:
  """Returns the cheapest assignment of the other heads to the `kept` ones."""
  real, others = len(kept), [j for j in range(len(cost)) if j not in kept]
  share, extra = divmod(len(others), real)
  # Each real head has `share` places that must be filled and one more that may be: `extra` of these
  # get a head, the others stay empty.
  columns = [i for i in kept for _ in range(share)] + list(kept)
  table = np.full((len(others) + real - extra if extra else len(others),
                   len(columns) if extra else share * real), np.inf)
  for row, j in enumerate(others):
    table[row] = cost[columns[:table.shape[1]], j]
  table[len(others):, share * real:] = 0
  rows, places = scipy.optimize.linear_sum_assignment(table)
  copies = {i: [] for i in kept}
  for row, place in zip(rows, places, strict=True):
    if row < len(others):
      copies[columns[place]].append(others[row])
  ordered = sorted(kept, key=lambda i: (-len(copies[i]), i))
  hallucinated = [copies[i][copy] for copy in range(share + bool(extra)) for i in ordered
                  if copy < len(copies[i])]
  total = sum(cost[i, j] for i in kept for j in copies[i])
  return Arrangement((*ordered, *hallucinated), float(total))


def reorder_heads(params, order):
  """Returns a block's parameters with its heads in another order; its function is the same."""
  attn, order = params["attn"], np.asarray(order)
  new = {name: {leaf: jnp.asarray(array)[..., order, :] for leaf, array in attn[name].items()}
         for name in ("query", "key", "value")}
  out = {**attn["out"], "kernel": jnp.asarray(attn["out"]["kernel"])[order]}
  return {**params, "attn": {**attn, **new, "out": out}}


def tap_sums(seen, value, out, steps):
  """Normal equations of each hallucinated head's filter, with errors after values and outputs.

  The real heads come first: seen.maps (B, f + g, N, M), value (D, f + g, d); out (g, d, D) holds
  only the hallucinated heads. steps: any array (K,) for K taps. Returns (g, K^2, K^2) and (g, K^2).
  """
  high = jax.lax.Precision.HIGHEST
  heads, taps = value.shape[1], steps.shape[0]
  real = heads - out.shape[0]

  def sums_of_head(g):
    j = real + g
    values_bmd = seen.keys @ value[:, j]
    source_bnm = jnp.take(seen.maps, g % real, axis=1)
    gram_dd = jnp.matmul(out[g], out[g].T, precision=high)
    target_bnd = jnp.einsum("bnm,bmd->bnd", jnp.take(seen.maps, j, axis=1), values_bmd)
    # A key-side tap at offset t weighs entry m + t of a row: value m meets the map at m + t.
    outputs = [jnp.einsum("bnm,bmd->bnd", source_bnm, shift_tokens(values_bmd, -(t - taps // 2)))
            for t in range(taps)]
    rows_kbnd = jnp.stack([shift_tokens(x, s - taps // 2) for s in range(taps) for x in outputs])
    weighted_kbnd = jnp.einsum("kbnd,de->kbne", rows_kbnd, gram_dd)
    return (jnp.einsum("kbnd,lbnd->kl", weighted_kbnd, rows_kbnd, precision=high),
            jnp.einsum("kbnd,bnd->k", weighted_kbnd, target_bnd, precision=high))

  return jax.lax.map(sums_of_head, jnp.arange(heads - real))


def shift_tokens(x_bnd, step: int):
  """Returns x with row n replaced by row n + step, or by 0 if there is no such row."""
  if step == 0:
    return x_bnd
  zeros = jnp.zeros_like(x_bnd[:, :abs(step)])
  parts = [x_bnd[:, step:], zeros] if step > 0 else [zeros, x_bnd[:, :step]]
  return jnp.concatenate(parts, axis=1)[:, :x_bnd.shape[1]]


def fit_taps(gram: np.ndarray, cross: np.ndarray, taps: int, rank: int):
  """Returns the best query_taps and key_taps (g, rank, K), from `tap_sums`.

  For rank 1 by alternating least squares; higher ranks are singular vectors of the unconstrained
  filter.
  """
  query, key = [], []
  for g, c in zip(gram, cross, strict=True):
    g = g + 1e-6 * np.trace(g) / len(g) * np.eye(len(g))
    left, singular, right = np.linalg.svd(np.linalg.solve(g, c).reshape(taps, taps))
    u, v = (side * np.sqrt(singular[:rank, None]) for side in (left.T[:rank], right[:rank]))
    if rank == 1:
      u, v = _alternating_least_squares(g.reshape(taps, taps, taps, taps), c.reshape(taps, taps),
                                        u[0], v[0])
    query.append(u)
    key.append(v)
  return np.stack(query), np.stack(key)


def _alternating_least_squares(g_stuv, c_st, u_s, v_t, iterations: int = 30):
  for _ in range(iterations):
    u_s = np.linalg.solve(np.einsum("stuv,t,v->su", g_stuv, v_t, v_t), c_st @ v_t)
    v_t = np.linalg.solve(np.einsum("stuv,s,u->tv", g_stuv, u_s, u_s), u_s @ c_st)
    scale = np.sqrt(np.linalg.norm(v_t) / np.linalg.norm(u_s))
    u_s, v_t = u_s * scale, v_t / scale
  return u_s[None], v_t[None]


def copied_sums(seen, places) -> Sums:
  """Returns `Sums` of the features A_i X of the real heads, which come first, and the target.

  places: any array whose length is the number f of real heads.
  """
  maps = seen.maps[:, :places.shape[0], ::seen.step]   # XLA would compute the other rows as well
  features = jnp.einsum("bhnm,bmw->bnhw", maps, seen.keys)
  return sums_of(jax.lax.collapse(features, 2), seen.target_attention[:, ::seen.step])


def filtered_sums(seen, query_taps, key_taps) -> Sums:
  """Returns `Sums` of the features of all heads, the hallucinated ones filtered, and the target;
  taps (g, rank, K)."""
  hallucinated, rank, taps = query_taps.shape
  real = seen.maps.shape[1] - hallucinated
  every = slice(None, None, seen.step)   # XLA would compute the other rows of features as well
  features = [jnp.einsum("bhnm,bmw->bnhw", seen.maps[:, :real, every], seen.keys)]
  for g in range(hallucinated):
    filtered = 0
    for r in range(rank):
      keys = sum(shift_tokens(seen.keys, -(t - taps // 2)) * key_taps[g, r, t] for t in range(taps))
      rows = sum(shift_tokens(seen.maps[:, g % real], s - taps // 2)[:, every] * query_taps[g, r, s]
                 for s in range(taps))
      filtered += jnp.einsum("bnm,bmw->bnw", rows, keys)
    features.append(filtered[:, :, None])
  flat = jax.lax.collapse(jnp.concatenate(features, axis=2), 2)
  return sums_of(flat, seen.target_attention[:, every])


class Refit(NamedTuple):
  """Values (h, D, d), outputs (h, d, D) and the bias of the output.

  fitted, held_out: relative squared errors of the attention's output on the images used for the fit
  and on those held out; copied: the error on the latter with the dense values and outputs.
  """
  values: np.ndarray
  outputs: np.ndarray
  bias: np.ndarray
  fitted: float
  held_out: float
  copied: float


def refit(sums, groups, values, outputs) -> Refit:
  """Refits the values and outputs of all heads by block coordinate descent over groups of heads.

  sums: `Sums` (of the images to fit, of those held out), with D features for each group. groups:
  the heads that share the same features; a group of g heads has rank g d. values (h, D, d), outputs
  (h, d, D): those of the dense block, real heads first.
  """
  fit, held_out_data, both = fit_held_out_and_all(sums)
  old = [np.concatenate([values[h] for h in group], axis=1) for group in groups], \
      [np.concatenate([outputs[h] for h in group], axis=0) for group in groups]

  def error_of(factors):
    return held_out_data.error_of_factors(*factors, fit.bias(product(factors)))

  copied_error = error_of(old)
  held_out, ridge, factors = choose_ridge(
      fit, held_out_data, lambda ridge: _descend(fit, old, old, ridge, sweeps=1))
  if held_out < copied_error:
    factors = _descend(fit, old, factors, ridge, sweeps=SWEEPS - 1)
    held_out = error_of(factors)
  if held_out >= copied_error:   # no fit is better than the dense values and outputs
    factors, held_out = old, copied_error
  fitted = fit.error_of_factors(*factors)
  if factors is not old and both is not fit:   # finally fit all images
    factors = _descend(both, old, factors, ridge, sweeps=1)
  new_values, new_outputs = np.empty_like(values), np.empty_like(outputs)
  width = values.shape[2]
  for group, left, right in zip(groups, *factors, strict=True):
    if factors is not old:
      left, right = balance_factors(left, right)
    for place, head in enumerate(group):
      new_values[head] = left[:, place * width:(place + 1) * width]
      new_outputs[head] = right[place * width:(place + 1) * width]
  return Refit(new_values, new_outputs, both.bias(product(factors)), fitted, held_out, copied_error)


def _descend(data: Regression, old, start, ridge: float, sweeps: int):
  """Returns (values, outputs) of each group after `sweeps` sweeps over the groups.

  old: the pair that the ridge pulls towards; start: the pair to start from.
  """
  ridge, size = data.strength(ridge), len(data.cov) // len(old[0])
  slices = [slice(at, at + size) for at in range(0, len(data.cov), size)]
  solvers = [solver(data.cov[at, at], ridge) for at in slices]
  before = [ridge * (left @ right) for left, right in zip(*old, strict=True)]
  a, b = map(list, start)
  cov_a = [data.cov[:, at] @ left for left, at in zip(a, slices, strict=True)]   # C A of each group
  if start is old:
    b = _solve_outputs(data, a, cov_a, b, slices, ridge)
  for _ in range(sweeps):
    for g, at in enumerate(slices):
      # The target minus the contributions of the other groups.
      others = [cov_a[k][at] @ b[k] for k in range(len(a)) if k != g]
      right = data.cross[at] - sum(others) + before[g]
      a[g], b[g] = closest_factors(solvers[g](right), right, a[g].shape[1])
      cov_a[g] = data.cov[:, at] @ a[g]
    b = _solve_outputs(data, a, cov_a, b, slices, ridge)
  return a, b


def _solve_outputs(data: Regression, a, cov_a, old_b, slices, ridge: float):
  """Solves for the outputs of all groups at once, with their values fixed."""
  value_cross = np.concatenate([left.T @ data.cross[at] for left, at in
                                zip(a, slices, strict=True)])
  cov_a = np.concatenate(cov_a, axis=1)
  value_cov = np.concatenate([left.T @ cov_a[at] for left, at in zip(a, slices, strict=True)])
  # The ridge is relative to the variance of the regressors, which are now the values.
  relative = ridge / max(np.trace(data.cov) / len(data.cov), 1e-30)
  pull = relative * np.trace(value_cov) / len(value_cov)
  new = np.linalg.solve(value_cov + pull * np.eye(len(value_cov)),
                        value_cross + pull * np.concatenate(old_b))
  ends = np.cumsum([left.shape[1] for left in a])[:-1]
  return np.split(new, ends)


def refitted_params(fit: Refit, attn):
  """Returns {"value", "out"}: the refitted parameters of an attention `attn`."""
  new = {"value": {"kernel": jnp.asarray(fit.values.transpose(1, 0, 2), jnp.float32)},
         "out": {"kernel": jnp.asarray(fit.outputs, jnp.float32),
                 "bias": jnp.asarray(fit.bias, jnp.float32)}}
  if "bias" in attn["value"]:   # the bias of the output contains this constant
    new["value"]["bias"] = jnp.zeros_like(attn["value"]["bias"])
  return new


def fit_hallucinated(spec, site, params, data):
  """Returns (a dense block's parameters with heads in the best order, values and outputs refitted;
  its taps, {} if they are not fitted) for an `HMHSA`. data: a `calibration.Calibration`."""
  real = spec.scored_heads(site)
  function, arguments = spec.statistics(params)
  costs, tokens = data.with_fewer_images().sums(function, *arguments)[0]
  chosen = arrange(costs / tokens, real)
  params = reorder_heads(params, chosen.order)
  data, attn = data.with_params(params), params["attn"]
  values, outputs = (np.asarray(attn[name]["kernel"], np.float64) for name in ("value", "out"))
  values = values.transpose(1, 0, 2)
  taps, groups = {}, [[h, *range(real + h, site.heads, real)] for h in range(real)]
  if spec.site == "probs" and spec.layout == "map" and site.heads * site.width <= MAX_FEATURES:
    sums = data.with_fewer_images().sums(tap_sums, attn["value"]["kernel"],
                                         attn["out"]["kernel"][real:], jnp.zeros(spec.kernel))[0]
    query, key = fit_taps(*sums, spec.kernel, spec.rank)
    taps = {"query_taps": jnp.asarray(query, jnp.float32),
            "key_taps": jnp.asarray(key, jnp.float32)}
    groups = [[h] for h in range(site.heads)]
    sums = data.sums(filtered_sums, taps["query_taps"], taps["key_taps"])
  else:
    sums = data.sums(copied_sums, jnp.zeros(real))
  fit = refit(sums, groups, values, outputs)
  data.note("heads", copied=fit.copied, fitted=fit.fitted, held_out=fit.held_out,
            order=list(chosen.order))
  return {**params, "attn": {**attn, **refitted_params(fit, attn)}}, taps
