"""Attention over linked blocks on a CPU: a head in turn, and in it some blocks of queries in turn.

What a step needs stays in the cache: a head is cut into blocks when its turn comes, and laid back
after it. The tokens in no block, `outer`, are scored beside the chosen blocks, and see all blocks
as they lie. To hold less matters: an allocation above 32 MB is zeroed by the system at every call.
"""
import functools

import jax
import jax.numpy as jnp

from vitcompact import attention
from vitcompact.attention import backends

STEP_ENTRIES = 2 ** 16   # scores that a step forms at the most, if it is more than one block's


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(cut, query_bnfd, key_bmfd, value_bmfe, bias_bm, order_bn, chosen_bfqs):
  """softmax(q k^T / sqrt(d) + bias) v over the chosen blocks: (B, N, f, e) in the values' dtype.

  Args:
    cut: a `blocks.BlockLayout` without its arrays: which tokens are in which block.
    query_bnfd, key_bmfd, value_bmfe: all tokens, as they lie.
    bias_bm: of the keys, fixed; or None.
    order_bn, chosen_bfqs: those arrays.
  """
  return _forward(cut, query_bnfd, key_bmfd, value_bmfe, bias_bm, order_bn, chosen_bfqs)[0]


def _forward(cut, *arrays):
  query_bnfd, _, value_bmfe, *_, chosen_bfqs = arrays

  def head(index):
    links, seen, parts, chosen_qs = _of_head(cut, index, *arrays)
    with jax.named_scope(attention.SCOPE):
      ends = backends.attend_rows(parts[0][1], *seen, seen[0].shape[0])
    out, log_sum = zip(_blocks(*parts, chosen_qs), ends, strict=True)
    return [_whole(links, links.queries, *out)], log_sum

  like = jax.ShapeDtypeStruct((*query_bnfd.shape[:3], value_bmfe.shape[3]), value_bmfe.dtype)
  (out_bnfe,), log_sum_gn1 = _each_head(head, chosen_bfqs, [like])
  return out_bnfe, (arrays, out_bnfe, log_sum_gn1)


def _backward(cut, residuals, d_out_bnfe):
  arrays, out_bnfe, log_sum_gn1 = residuals
  query_bnfd, *_, chosen_bfqs = arrays

  def head(index):
    links, seen, parts, chosen_qs = _of_head(cut, index, *arrays)
    out_n, d_out_n = (_alone(x, index).astype(jnp.float32) for x in (out_bnfe, d_out_bnfe))
    shift_n = jnp.sum(out_n * d_out_n, axis=-1, keepdims=True)
    inner, ends = zip(parts[0], [x[index] for x in log_sum_gn1],
                      *(_parts(links, links.queries, x) for x in (shift_n, d_out_n)), strict=True)
    d_ends, *d_seen, _ = backends.gradients_of_rows(*seen, *ends)
    d_queries, *d_keys = _blocks_backward(*parts[1:], chosen_qs, *inner)
    d_query_n = _whole(links, links.queries, d_queries, d_ends) * query_bnfd.shape[-1] ** -0.5
    d_keys_n = [_whole(links, links.keys, *x) + d for x, d in zip(d_keys, d_seen, strict=True)]
    return [d_query_n, *d_keys_n], None

  gradients, _ = _each_head(head, chosen_bfqs, arrays[:3])
  return *gradients, None, None, None


attend.defvjp(_forward, _backward)


def _each_head(head, chosen_bfqs, like_bnfd):
  """What `head` gives for the number of each head: arrays (N, d), laid together as those of `like`,
  and others, (B f, ...)."""
  batch, heads = chosen_bfqs.shape[:2]

  def step(together, index):
    arrays_nd, others = head(index)
    start = _start(index, heads)
    return [jax.lax.dynamic_update_slice(x, new.astype(x.dtype)[None, :, None], start)
            for x, new in zip(together, arrays_nd, strict=True)], others

  empty = [jnp.zeros(x.shape, x.dtype) for x in like_bnfd]
  return jax.lax.scan(step, empty, jnp.arange(batch * heads))


def _start(index, heads: int):
  """Where in (B, N, f, d) the head with this number begins."""
  return index // heads, 0, index % heads, 0


def _alone(x_bnfd, index):
  """The head with this number: (N, d)."""
  _, count, heads, width = x_bnfd.shape
  return jax.lax.dynamic_slice(x_bnfd, _start(index, heads), (1, count, 1, width))[0, :, 0]


def _parts(links, windows, x_nd):
  """What is in blocks (k, c, d), and in none (o, d)."""
  blocks_11kcd, outer_1o1d = links.parts(windows, x_nd[None, :, None])
  return blocks_11kcd[0, 0], outer_1o1d[0, :, 0]


def _whole(links, windows, blocks_kcd, outer_od):
  """Inverse of `_parts`: (N, d)."""
  return links.whole(windows, blocks_kcd[None, None], outer_od[None, :, None])[0, :, 0]


def _of_head(cut, index, query, key, value, bias, order, chosen):
  """One head's links; its keys, values and bias as they lie; `_blocks`' arguments."""
  image = index // chosen.shape[1]
  links = cut if order is None else cut._replace(order=order[image][None])
  query, key, value = (_alone(x, index) for x in (query, key, value))
  bias = None if bias is None else bias[image][None]
  parts = [_parts(links, windows, x) for windows, x in (
      (links.queries, query * query.shape[-1] ** -0.5), (links.keys, key), (links.keys, value))]
  inner, outer = links.biases(bias), None
  if inner is not None:
    inner = inner[0, 0]
    outer = jnp.zeros(links.prefix + links.fused) if bias is None else links.outer(bias)[0]
  seen = key, value, None if bias is None else bias[0]
  return links, seen, [*parts, (inner, outer)], chosen.reshape(-1, *chosen.shape[2:])[index]


def _blocks(queries, keys, values, bias, chosen_qs):
  """Attention of queries in blocks (q, a, e), and the log of its sum of exponentials (q, a, 1).

  Pairs, of what is in blocks and in none: queries, scaled, (q, a, d) and (o, d); keys and values
  (k, c, d) and (o, d); bias (k, c) and (o,), or None and None.
  """
  query_qad, _ = queries
  blocks, area, _ = query_qad.shape
  most = max(1, STEP_ENTRIES // (area * chosen_qs.shape[1] * keys[0].shape[1]))
  group = max(n for n in range(1, min(most, blocks) + 1) if blocks % n == 0)
  inner, outer = zip(keys, values, bias, strict=True)

  def step(arrays):
    query_gad, chosen_gs = arrays
    return _beside(query_gad, [_chosen(x, chosen_gs) for x in inner], outer)

  groups = [x.reshape(-1, group, *x.shape[1:]) for x in (query_qad, chosen_qs)]
  out = step([x[0] for x in groups]) if group == blocks else jax.lax.map(step, groups)
  return [x.reshape(blocks, area, -1) for x in out]


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


def _blocks_backward(keys, values, bias, chosen_qs, *rows):
  """Gradients of queries in blocks, and pairs of keys and values, summed block by block.

  rows: arguments of `backends.gradients_of_rows`, (q, a, ...).
  """
  inner, outer = zip(keys, values, bias, strict=True)

  def step(sums, arrays):
    chosen_s, *rows = arrays
    seen = [None if x is None else _chosen(x, chosen_s[None])[0] for x in inner]
    d_query, *d_seen, _ = backends.gradients_of_rows(*seen, *rows)
    d_outer_query, *d_outer, _ = backends.gradients_of_rows(*outer, *rows)
    return [(total.at[chosen_s].add(d.reshape(-1, *total.shape[1:]), unique_indices=True), end + e)
            for (total, end), d, e in zip(sums, d_seen, d_outer, strict=True)
            ], d_query + d_outer_query

  zeros = [tuple(jnp.zeros(x.shape, jnp.float32) for x in pair) for pair in (keys, values)]
  d_keys, d_query_qad = jax.lax.scan(step, zeros, (chosen_qs, *rows))
  return d_query_qad, *d_keys
