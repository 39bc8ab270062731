"""Attention over linked blocks on a CPU: a head in turn, and in it a block of queries in turn.

What a step needs stays in the cache, and no array of all heads is laid out anew: a copy of one is
as large as the values, and costs as much as a tenth of the layer.
"""
import functools

import jax
import jax.numpy as jnp

from vitcompact import attention, backends


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(links, query_bnfd, key_bmfd, value_bmfe, bias_bm, chosen_bfqs, order_bn):
  """(B, N, f, e) in the values' dtype, as `BlockLinks.attend` has it.

  links: a BlockLinks without its arrays, chosen and order, which are given apart; query: scaled.
  """
  return _forward(links, query_bnfd, key_bmfd, value_bmfe, bias_bm, chosen_bfqs, order_bn)[0]


def _forward(links, query_bnfd, key_bmfd, value_bmfe, bias_bm, chosen_bfqs, order_bn):
  arrays = (query_bnfd, key_bmfd, value_bmfe)
  out_bnfe, log_sum_bnf1 = _each_head(functools.partial(_head, links), arrays, bias_bm, chosen_bfqs,
                                      order_bn)
  return out_bnfe, (*arrays, bias_bm, chosen_bfqs, order_bn, out_bnfe, log_sum_bnf1)


def _backward(links, residuals, d_out_bnfe):
  *arrays, bias_bm, chosen_bfqs, order_bn, out_bnfe, log_sum_bnf1 = residuals
  gradients = _each_head(functools.partial(_head_backward, links),
                         (*arrays, out_bnfe, log_sum_bnf1, d_out_bnfe), bias_bm, chosen_bfqs,
                         order_bn)
  return *gradients, None, None, None


attend.defvjp(_forward, _backward)


def _each_head(head, arrays_bnf, bias_bm, chosen_bfqs, order_bn):
  """Results (B, N, f, ...) of `head`, which sees one image and head: 1s in these places."""
  def image(arrays):
    arrays_nf, bias_1m, chosen_1fqs, order_1n = jax.tree.map(lambda x: x[None], arrays)

    def one(index):
      index, chosen_qs = index
      mine = [jax.lax.dynamic_slice_in_dim(x, index, 1, axis=2) for x in arrays_nf]
      out = head(mine, bias_1m, chosen_qs[None, None], order_1n)
      return [x[0, :, 0] for x in out]

    heads = jnp.arange(chosen_1fqs.shape[1])
    return [x.swapaxes(0, 1) for x in jax.lax.map(one, (heads, chosen_1fqs[0]))]

  return jax.lax.map(image, (arrays_bnf, bias_bm, chosen_bfqs, order_bn))


def _split(links, windows, x_1n1d):
  """(in blocks (blocks, area, d), in none (n, d))."""
  return windows.cut(links.inner(x_1n1d))[0, 0], links.outer(x_1n1d)[0, :, 0]


def _biases(links, bias_1m):
  """As `_split`, of the keys' bias; None where there is none and no padding either."""
  inner = links.block_bias(bias_1m)
  if inner is None:
    return None, None
  outside = links.prefix + links.fused
  outer = jnp.zeros(outside) if bias_1m is None else links.outer(bias_1m)[0]
  return jnp.broadcast_to(inner[0, 0], (links.keys.blocks, links.keys.area)), outer


def _chosen(blocks_kc, outer, chosen_s):
  """What a block of queries sees: the tokens in no block, then those of the chosen blocks."""
  if blocks_kc is None:
    return None
  return jnp.concatenate([outer, blocks_kc[chosen_s].reshape(-1, *blocks_kc.shape[2:])])


def _head(links, arrays, bias_1m, chosen, order_1n):
  """[out (1, N, 1, e), log of the sum of exponentials (1, N, 1, 1)] of one head."""
  links = links._replace(chosen=chosen, order=order_1n)
  query, key, value = arrays
  parts = [_split(links, links.keys, x) for x in (key, value)] + [_biases(links, bias_1m)]
  query_qad, outer_od = _split(links, links.queries, query)

  def block(arrays):
    query_ad, chosen_s = arrays
    return backends.attend_rows(query_ad, *(_chosen(*part, chosen_s) for part in parts))

  with jax.named_scope(attention.SCOPE):
    out, log_sum = jax.lax.map(block, (query_qad, chosen[0, 0]))
    outer = backends.attend_rows(outer_od, key[0, :, 0], value[0, :, 0], _only(bias_1m))
  return [links.together(x, y) for x, y in zip((out, log_sum), outer, strict=True)]


def _only(bias_1m):
  return None if bias_1m is None else bias_1m[0]


def _head_backward(links, arrays, bias_1m, chosen, order_1n):
  """Gradients of query, key and value; those of the keys are summed block by block."""
  links = links._replace(chosen=chosen, order=order_1n)
  query, key, value, out, log_sum, d_out = arrays
  shift = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True)
  (keys, pull_key), (values, pull_value) = (
      jax.vjp(functools.partial(_split, links, links.keys), x) for x in (key, value))
  biases = _biases(links, bias_1m)
  split = [_split(links, links.queries, x) for x in (query, log_sum, shift, d_out)]
  area, outside = links.keys.area, links.prefix + links.fused

  def block(sums, arrays):
    chosen_s, *rows = arrays
    seen = [_chosen(*part, chosen_s) for part in (keys, values, biases)]
    d_query_ad, d_keys, d_values, _ = backends.gradients_of_rows(*seen, *rows)
    return [(blocks.at[chosen_s].add(d[outside:].reshape(-1, area, d.shape[-1]),
                                     unique_indices=True), outer + d[:outside])
            for (blocks, outer), d in zip(sums, (d_keys, d_values), strict=True)], d_query_ad

  zeros = [tuple(jnp.zeros(x.shape, jnp.float32) for x in part) for part in (keys, values)]
  sums, d_query_qad = jax.lax.scan(block, zeros, (chosen[0, 0], *(inner for inner, _ in split)))
  d_outer_od, d_key_md, d_value_me, _ = backends.gradients_of_rows(
      key[0, :, 0], value[0, :, 0], _only(bias_1m), *(outer for _, outer in split))
  d_query = links.together(d_query_qad, d_outer_od)
  d_key, d_value = (
      pull(jax.tree.map(lambda d, x: d.astype(x.dtype), total, part))[0] +
      d[None, :, None].astype(x.dtype)
      for pull, total, part, d, x in ((pull_key, sums[0], keys, d_key_md, key),
                                      (pull_value, sums[1], values, d_value_me, value)))
  return [d_query.astype(query.dtype), d_key, d_value]
