"""Attention over linked blocks on a CPU: a head in turn, and in it some blocks of queries in turn.

What a step needs stays in the cache. The tokens in no block, `outer`, are scored beside the chosen
blocks, and see all blocks as they lie, so that nothing needs the arrays from before the cut: to
hold less matters, because an allocation above 32 MB is zeroed by the system at every call.
"""
import jax
import jax.numpy as jnp

from vitcompact import attention, backends

STEP_ENTRIES = 2 ** 18   # scores that a step forms at the most, if it is more than one block's


@jax.custom_vjp
def attend(queries, keys, values, biases, chosen_bfqs):
  """Attention of blocks of queries over their chosen blocks, and of outer queries over all.

  Args:
    queries, keys, values: pairs of what is in blocks, (B, f, q, a, d), (B, f, k, c, d) and
      (B, f, k, c, e), and of what is in none, (B, f, o, d), (B, f, o, d) and (B, f, o, e). Queries
      are scaled.
    biases: of the keys, fixed: a pair (B, k, c), (B, o), or None.
    chosen_bfqs: int32, s different blocks of keys for each block of queries.
  Returns:
    (B, f, q, a, e) and (B, f, o, e), float32.
  """
  return _forward(queries, keys, values, biases, chosen_bfqs)[0]


def _forward(*arguments):
  out, log_sum = _each_head(_head, arguments)
  return out, (arguments, out, log_sum)


def _backward(residuals, d_out):
  arguments, out, log_sum = residuals
  shift = jax.tree.map(lambda x, d: jnp.sum(x * d, axis=-1, keepdims=True), out, d_out)
  gradients = _each_head(_head_backward, arguments, log_sum, shift, d_out)
  return *gradients, None, None


attend.defvjp(_forward, _backward)


def _each_head(head, arguments, *more):
  """`head` of the arguments of `attend`, and of more arrays (B, f, ...), without these axes."""
  *arrays, biases, chosen = arguments
  batch, heads = chosen.shape[:2]
  biases = jax.tree.map(lambda x: jnp.repeat(x, heads, axis=0), biases)
  arrays, chosen, more = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]),
                                      (arrays, chosen, more))
  out = jax.lax.map(lambda one: head(*one), (*arrays, biases, chosen, *more))
  return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), out)


def _head(queries, keys, values, biases, chosen_qs):
  """A pair, out and the log of the sum of exponentials (..., 1), of pairs for `queries`."""
  (query_qad, outer_query_od), bias = queries, biases or (None, None)
  blocks, area, _ = query_qad.shape
  most = max(1, STEP_ENTRIES // (area * chosen_qs.shape[1] * keys[0].shape[1]))
  group = max(n for n in range(1, min(most, blocks) + 1) if blocks % n == 0)
  outer = [keys[1], values[1], bias[1]]

  def step(arrays):
    query_gad, chosen_gs = arrays
    return _beside(query_gad, [_chosen(x, chosen_gs) for x in (keys[0], values[0], bias[0])], outer)

  groups = [x.reshape(-1, group, *x.shape[1:]) for x in (query_qad, chosen_qs)]
  inner = step([x[0] for x in groups]) if group == blocks else jax.lax.map(step, groups)
  inner = [x.reshape(blocks, area, -1) for x in inner]
  seen = [None if x is None else _flat(x)[None] for x in (keys[0], values[0], bias[0])]
  ends = [x[0] for x in _beside(outer_query_od[None], seen, outer)]
  return tuple(zip(inner, ends, strict=True))


def _beside(query_gad, seen, outer):
  """(attention (g, a, e), log of the sum of exponentials (g, a, 1)) over `seen` and `outer`.

  seen: keys (g, m, d), values (g, m, e), bias (g, m) or None; outer: the same without g.
  """
  (key_gmd, value_gme, bias_gm), (key_od, value_oe, bias_o) = seen, outer
  scores = [_product("gad,gmd->gam", query_gad, key_gmd)]
  if bias_gm is not None:
    scores = [scores[0] + bias_gm[:, None]]
  if len(key_od):
    scores.append(_product("gad,od->gao", query_gad, key_od))
    scores[1] += 0 if bias_o is None else bias_o[None, None]
  top = jnp.stack([x.max(axis=-1, keepdims=True) for x in scores]).max(axis=0)
  exps = [jnp.exp(x - top) for x in scores]
  total = sum(x.sum(axis=-1, keepdims=True) for x in exps)
  out = _product("gam,gme->gae", exps[0].astype(value_gme.dtype), value_gme)
  if len(key_od):
    out += _product("gao,oe->gae", exps[1].astype(value_oe.dtype), value_oe)
  return out / total, top + jnp.log(total)


def _product(axes: str, x, y):
  with jax.named_scope(attention.SCOPE):
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _chosen(blocks_kc, chosen_gs):
  """The chosen blocks one after another: (g, s c, ...)."""
  if blocks_kc is None:
    return None
  groups, chosen = chosen_gs.shape
  return blocks_kc[chosen_gs].reshape(groups, chosen * blocks_kc.shape[1], *blocks_kc.shape[2:])


def _flat(blocks_kc):
  return None if blocks_kc is None else blocks_kc.reshape(-1, *blocks_kc.shape[2:])


def _head_backward(queries, keys, values, biases, chosen_qs, log_sum, shift, d_out):
  """Gradients of queries, keys and values, pairs as these; the latter summed block by block."""
  bias = biases or (None, None)
  inner, outer = ((keys[i], values[i], bias[i]) for i in range(2))
  rows, end_rows = ([x[i] for x in (queries, log_sum, shift, d_out)] for i in range(2))

  def step(sums, arrays):
    chosen_s, *rows = arrays
    seen = [None if x is None else _chosen(x, chosen_s[None])[0] for x in inner]
    d_query, *d_seen, _ = backends.gradients_of_rows(*seen, *rows)
    d_outer_query, *d_outer, _ = backends.gradients_of_rows(*outer, *rows)
    return [(total.at[chosen_s].add(d.reshape(-1, *total.shape[1:]), unique_indices=True), end + e)
            for (total, end), d, e in zip(sums, d_seen, d_outer, strict=True)
            ], d_query + d_outer_query

  d_end, *d_seen, _ = backends.gradients_of_rows(*(_flat(x) for x in inner), *end_rows)
  more, *d_outer, _ = backends.gradients_of_rows(*outer, *end_rows)
  sums = [(d.reshape(x.shape), e) for d, e, x in zip(d_seen, d_outer, inner[:2], strict=True)]
  (d_keys, d_values), d_query = jax.lax.scan(step, sums, (chosen_qs, *rows))
  d_keys, d_values = (tuple(d.astype(keys[0].dtype) for d in x) for x in (d_keys, d_values))
  return (d_query, d_end + more), d_keys, d_values
