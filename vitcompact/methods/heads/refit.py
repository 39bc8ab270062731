"""Which heads stay real, which one each other head copies, and the values and outputs that then
come closest to the dense attention: in closed form, from calibration images.

Ours. What a head may be replaced by is told by the error *behind* its values and outputs: on small
trained models, likeness of the maps themselves chose two to three times worse in KL of the logits.
"""
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from vitcompact.regression import (
  Regression,
  Sums,
  balanced,
  chosen,
  closest_factors,
  solver,
  split,
  sums_of,
)

SETS = 20_000        # sets of real heads that are all tried; beyond, heads are dropped greedily
SWEEPS = 3
FEATURES = 4608      # heads x width up to which filters are fitted: their sums are its square


class Arrangement(NamedTuple):
  """A head's old number for each new place: the real heads, then those that copy them, place f + g
  copying place g mod f; and what it costs, E |error|^2 of the attention's output."""
  order: tuple[int, ...]
  cost: float


def head_costs(seen, value, bias, out):
  """(h, h) sums over tokens of |(A_i - A_j) V_j O_j|^2, [i, j] of head i in the place of j, with
  the number of tokens; the diagonal holds |A_j V_j O_j|^2.

  value (D, h, d), bias (h, d), out (h, d, D): of the dense block.
  """
  high = jax.lax.Precision.HIGHEST
  seen, heads = seen.of_fewer_images(), value.shape[1]

  def behind(j):
    """Head j's values under every map."""
    values_bmd = seen.keys @ value[:, j] + bias[j][None, None]
    made_bhnd = jnp.einsum("bhnm,bmd->bhnd", seen.maps, values_bmd)
    gram_dd = jnp.matmul(out[j], out[j].T, precision=high)
    own_bnd = made_bhnd[:, j]
    error_bhnd = jnp.where(jnp.arange(heads)[None, :, None, None] == j, own_bnd[:, None],
                           made_bhnd - own_bnd[:, None])
    return jnp.einsum("bhnd,de,bhne->h", error_bhnd, gram_dd, error_bhnd)

  costs_jh = jax.lax.map(behind, jnp.arange(heads))
  return costs_jh.T, jnp.asarray(seen.maps.shape[0] * seen.maps.shape[2], jnp.float32)


def arrange(cost: np.ndarray, real: int) -> Arrangement:
  """The cheapest choice of `real` heads and of the heads that copy each.

  cost: (h, h), [i, j] of head i in the place of j. Every real head has as many copies as another,
  or one more, which is how the heads of `HMHSA` are laid out.
  """
  heads = len(cost)
  if math.comb(heads, real) <= SETS:
    return min((_partners(cost, kept) for kept in itertools.combinations(range(heads), real)),
               key=lambda found: found.cost)
  kept = list(range(heads))
  while len(kept) > real:   # what is missed least goes
    def after(head):
      rest = [other for other in kept if other != head]
      return sum(cost[rest, j].min() for j in range(heads) if j not in rest)
    kept.remove(min(kept, key=after))
  return _partners(cost, tuple(kept))


def _partners(cost, kept: tuple[int, ...]) -> Arrangement:
  """The cheapest assignment of the other heads to these."""
  real, others = len(kept), [j for j in range(len(cost)) if j not in kept]
  share, extra = divmod(len(others), real)
  # Places that must be taken, `share` of each real head; and one more of each, of which `extra` are
  # taken by heads and the rest by nobody.
  columns = [i for i in kept for _ in range(share)] + list(kept)
  table = np.full((len(others) + real - extra if extra else len(others),
                   len(columns) if extra else share * real), np.inf)
  for row, j in enumerate(others):
    table[row] = cost[columns[:table.shape[1]], j]
  table[len(others):, share * real:] = 0
  rows, places = linear_sum_assignment(table)
  copies = {i: [] for i in kept}
  for row, place in zip(rows, places, strict=True):
    if row < len(others):
      copies[columns[place]].append(others[row])
  ordered = sorted(kept, key=lambda i: (-len(copies[i]), i))
  hallucinated = [copies[i][turn] for turn in range(share + bool(extra)) for i in ordered
                  if turn < len(copies[i])]
  total = sum(cost[i, j] for i in kept for j in copies[i])
  return Arrangement((*ordered, *hallucinated), float(total))


def arranged(params, order):
  """A block's parameters with its heads in another order: the same function."""
  attn, order = params["attn"], np.asarray(order)
  new = {name: {leaf: jnp.asarray(array)[..., order, :] for leaf, array in attn[name].items()}
         for name in ("query", "key", "value")}
  out = {**attn["out"], "kernel": jnp.asarray(attn["out"]["kernel"])[order]}
  return {**params, "attn": {**attn, **new, "out": out}}


def tap_sums(seen, value, out, steps):
  """Normal equations of a filter for each hallucinated head, behind values and outputs.

  Heads are in order already, the real ones first: seen.maps (B, f + g, N, M), value (D, f + g, d);
  out (g, d, D), of the hallucinated ones. steps: (K,), of which only the length counts. Returns
  (g, K^2, K^2) and (g, K^2).
  """
  high = jax.lax.Precision.HIGHEST
  heads, taps = value.shape[1], steps.shape[0]
  real = heads - out.shape[0]

  def of_head(g):
    j = real + g
    values_bmd = seen.keys @ value[:, j]
    source_bnm = jnp.take(seen.maps, g % real, axis=1)
    gram_dd = jnp.matmul(out[g], out[g].T, precision=high)
    wanted_bnd = jnp.einsum("bnm,bmd->bnd", jnp.take(seen.maps, j, axis=1), values_bmd)
    # A key-side tap at offset t weighs entry m + t of a row: value m meets the map at m + t.
    made = [jnp.einsum("bnm,bmd->bnd", source_bnm, shifted(values_bmd, -(t - taps // 2)))
            for t in range(taps)]
    rows_kbnd = jnp.stack([shifted(x, s - taps // 2) for s in range(taps) for x in made])
    behind_kbnd = jnp.einsum("kbnd,de->kbne", rows_kbnd, gram_dd)
    return (jnp.einsum("kbnd,lbnd->kl", behind_kbnd, rows_kbnd, precision=high),
            jnp.einsum("kbnd,bnd->k", behind_kbnd, wanted_bnd, precision=high))

  return jax.lax.map(of_head, jnp.arange(heads - real))


def shifted(x_bnd, step: int):
  """Row n is row n + step, 0 outside."""
  if step == 0:
    return x_bnd
  none = jnp.zeros_like(x_bnd[:, :abs(step)])
  parts = [x_bnd[:, step:], none] if step > 0 else [none, x_bnd[:, :step]]
  return jnp.concatenate(parts, axis=1)[:, :x_bnd.shape[1]]


def fitted_taps(gram: np.ndarray, cross: np.ndarray, taps: int, rank: int):
  """query_taps, key_taps (g, rank, K) whose filters come closest, from `tap_sums`.

  One term is refined by alternating least squares; more are singular vectors of the free filter.
  """
  query, key = [], []
  for g, c in zip(gram, cross, strict=True):
    g = g + 1e-6 * np.trace(g) / len(g) * np.eye(len(g))
    left, singular, right = np.linalg.svd(np.linalg.solve(g, c).reshape(taps, taps))
    u, v = (side * np.sqrt(singular[:rank, None]) for side in (left.T[:rank], right[:rank]))
    if rank == 1:
      u, v = _alternated(g.reshape(taps, taps, taps, taps), c.reshape(taps, taps), u[0], v[0])
    query.append(u)
    key.append(v)
  return np.stack(query), np.stack(key)


def _alternated(g_stuv, c_st, u_s, v_t, turns: int = 30):
  for _ in range(turns):
    u_s = np.linalg.solve(np.einsum("stuv,t,v->su", g_stuv, v_t, v_t), c_st @ v_t)
    v_t = np.linalg.solve(np.einsum("stuv,s,u->tv", g_stuv, u_s, u_s), u_s @ c_st)
    scale = np.sqrt(np.linalg.norm(v_t) / np.linalg.norm(u_s))
    u_s, v_t = u_s * scale, v_t / scale
  return u_s[None], v_t[None]


def copied_sums(seen, places) -> Sums:
  """Of the features A_i X of the real heads (those first in order) and the wanted output.

  places: (f,), only its length counts.
  """
  made = jnp.einsum("bhnm,bmw->bnhw", seen.maps[:, :places.shape[0]], seen.keys)
  return sums_of(jax.lax.collapse(made, 2), seen.wanted_attention, seen.step)


def filtered_sums(seen, query_taps, key_taps) -> Sums:
  """Of the features of all heads, the hallucinated ones through their filters, and the wanted
  output; taps (g, rank, K)."""
  hallucinated, rank, taps = query_taps.shape
  real = seen.maps.shape[1] - hallucinated
  features = [jnp.einsum("bhnm,bmw->bnhw", seen.maps[:, :real], seen.keys)]
  for g in range(hallucinated):
    made = 0
    for r in range(rank):
      keys = sum(shifted(seen.keys, -(t - taps // 2)) * key_taps[g, r, t] for t in range(taps))
      rows = jnp.einsum("bnm,bmw->bnw", seen.maps[:, g % real], keys)
      made += sum(shifted(rows, s - taps // 2) * query_taps[g, r, s] for s in range(taps))
    features.append(made[:, :, None])
  made = jax.lax.collapse(jnp.concatenate(features, axis=2), 2)
  return sums_of(made, seen.wanted_attention, seen.step)


class Refit(NamedTuple):
  """Values (h, D, d), outputs (h, d, D) and the output's bias; fitted, held_out: relative errors of
  the attention's output on the images fitted and held out; copied: without a refit."""
  values: np.ndarray
  outputs: np.ndarray
  bias: np.ndarray
  fitted: float
  held_out: float
  copied: float


def refit(sums, groups, values, outputs) -> Refit:
  """Values and outputs of all heads, together, by block coordinate descent over groups of heads.

  sums: (fit, held) of the features, D for each group. groups: which heads share one; a group of g
  heads has rank g d. values (h, D, d), outputs (h, d, D): the dense ones, heads in order.
  """
  fit, held, both = split(sums)
  old = [np.concatenate([values[h] for h in group], axis=1) for group in groups], \
      [np.concatenate([outputs[h] for h in group], axis=0) for group in groups]
  matrix = copied = _product(old)
  copied_error = held.error(copied, fit.bias(copied))

  def descended(ridge):
    factors = _descend(fit, old, old, ridge, sweeps=1)
    return factors, _product(factors)

  held_out, ridge, factors = chosen(sums, descended)
  if held_out < copied_error:
    factors = _descend(fit, old, factors, ridge, sweeps=SWEEPS - 1)
    matrix = _product(factors)
    held_out = held.error(matrix, fit.bias(matrix))
  if held_out >= copied_error:   # none is better than the dense ones
    factors, matrix, held_out = old, copied, copied_error
  fitted = fit.error(matrix, fit.bias(matrix))
  if factors is not old and both is not fit:   # else they are of all rows already
    factors = _descend(both, old, factors, ridge, sweeps=1)
    matrix = _product(factors)
  new_values, new_outputs = np.empty_like(values), np.empty_like(outputs)
  width = values.shape[2]
  for group, left, right in zip(groups, *factors, strict=True):
    if factors is not old:
      left, right = balanced(left, right)
    for place, head in enumerate(group):
      new_values[head] = left[:, place * width:(place + 1) * width]
      new_outputs[head] = right[place * width:(place + 1) * width]
  return Refit(new_values, new_outputs, both.bias(matrix), fitted, held_out, copied_error)


def _product(factors):
  return np.concatenate([left @ right for left, right in zip(*factors, strict=True)])


def _descend(data: Regression, old, start, ridge: float, sweeps: int):
  """(values, outputs) of each group, after so many sweeps over the groups.

  Both old and start are such pairs; the fit is pulled towards the old ones.
  """
  ridge, size = data.strength(ridge), len(data.cov) // len(old[0])
  slices = [slice(at, at + size) for at in range(0, len(data.cov), size)]
  solvers = [solver(data.cov[at, at], ridge) for at in slices]
  before = [ridge * (left @ right) for left, right in zip(*old, strict=True)]
  a, b = map(list, start)
  seen = [data.cov[:, at] @ left for left, at in zip(a, slices, strict=True)]   # C A of each group
  if start is old:
    b = _outputs(data, a, seen, b, slices, ridge)
  for _ in range(sweeps):
    for g, at in enumerate(slices):
      # What the other groups leave to this one.
      others = [seen[k][at] @ b[k] for k in range(len(a)) if k != g]
      right = data.cross[at] - sum(others) + before[g]
      a[g], b[g] = closest_factors(solvers[g](right), right, a[g].shape[1])
      seen[g] = data.cov[:, at] @ a[g]
    b = _outputs(data, a, seen, b, slices, ridge)
  return a, b


def _outputs(data: Regression, a, seen, old_b, slices, ridge: float):
  """The outputs of all groups at once, for values that stay."""
  made_cross = np.concatenate([left.T @ data.cross[at] for left, at in
                               zip(a, slices, strict=True)])
  seen = np.concatenate(seen, axis=1)
  made = np.concatenate([left.T @ seen[at] for left, at in zip(a, slices, strict=True)])
  # In units of the features: the strength is relative to the variance of what is regressed on.
  relative = ridge / max(np.trace(data.cov) / len(data.cov), 1e-30)
  pull = relative * np.trace(made) / len(made)
  new = np.linalg.solve(made + pull * np.eye(len(made)), made_cross + pull * np.concatenate(old_b))
  ends = np.cumsum([left.shape[1] for left in a])[:-1]
  return np.split(new, ends)


def leaves(fit: Refit, attn):
  """{"value", "out"}: the parameters of an attention `attn` as refitted."""
  new = {"value": {"kernel": jnp.asarray(fit.values.transpose(1, 0, 2), jnp.float32)},
         "out": {"kernel": jnp.asarray(fit.outputs, jnp.float32),
                 "bias": jnp.asarray(fit.bias, jnp.float32)}}
  if "bias" in attn["value"]:   # a constant, which the output's bias has taken in
    new["value"]["bias"] = jnp.zeros_like(attn["value"]["bias"])
  return new


def fitted(spec, site, params, data):
  """(a dense block's parameters with its heads in the best order, values and outputs refitted; {}
  or the taps that go with them), under an `HMHSA`; data: a `calibration.Calibration`."""
  real = spec.scored_heads(site)
  function, arguments = spec.statistics(params)
  costs, tokens = data.fewer().sums(function, *arguments)[0]
  chosen = arrange(costs / tokens, real)
  params = arranged(params, chosen.order)
  data, attn = data.with_params(params), params["attn"]
  values, outputs = (np.asarray(attn[name]["kernel"], np.float64) for name in ("value", "out"))
  values = values.transpose(1, 0, 2)
  taps, groups = {}, [[h, *range(real + h, site.heads, real)] for h in range(real)]
  if spec.site == "probs" and spec.layout == "map" and site.heads * site.width <= FEATURES:
    sums = data.fewer().sums(tap_sums, attn["value"]["kernel"],
                                   attn["out"]["kernel"][real:], jnp.zeros(spec.kernel))[0]
    query, key = fitted_taps(*sums, spec.kernel, spec.rank)
    taps = {"query_taps": jnp.asarray(query, jnp.float32),
            "key_taps": jnp.asarray(key, jnp.float32)}
    groups = [[h] for h in range(site.heads)]
    sums = data.sums(filtered_sums, taps["query_taps"], taps["key_taps"])
  else:
    sums = data.sums(copied_sums, jnp.zeros(real))
  fit = refit(sums, groups, values, outputs)
  data.note("heads", copied=fit.copied, fitted=fit.fitted, held_out=fit.held_out,
            order=list(chosen.order))
  return {**params, "attn": {**attn, **leaves(fit, attn)}}, taps
