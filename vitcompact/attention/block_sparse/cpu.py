"""Block-sparse attention on a CPU: one head after another, and in each some blocks of queries.

What a step needs stays in the cache: a head is cut into blocks in its own step of the loop, and put
together at the end of it. Tokens outside the blocks are scored beside the chosen blocks; as queries
they see all tokens in their order. Holding little matters: an allocation above 32 MB is zeroed by
the system at every call.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vitcompact.attention import online_softmax, tuning
from vitcompact.attention.online_softmax import State, row_max, tile
from vitcompact.attention.reference import SCOPE


class Parts(NamedTuple):
  """What is in blocks (k, c, ...) and outside of them (o, ...), of one head of one image."""
  blocks: Any
  outer: Any


class Head(NamedTuple):
  """One head of one image: its layout; keys, values and bias in their order, and in parts; scaled
  queries in parts; the chosen blocks (q, s)."""
  layout: Any
  tokens: tuple
  queries: Parts
  keys: tuple[Parts, Parts, Parts]
  chosen: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(layout, query_bnfd, key_bmfd, value_bmfe, bias_bm, order_bn, chosen_bfqs):
  """softmax(q k^T / sqrt(d) + bias) v over the chosen blocks: (B, N, f, e) in the values' dtype.

  layout: a `layout.BlockLayout` without its arrays, which are order_bn and chosen_bfqs. bias_bm: of
  the keys, without a gradient; or None. All tokens are in their order.
  """
  return _forward(layout, query_bnfd, key_bmfd, value_bmfe, bias_bm, order_bn, chosen_bfqs)[0]


def _forward(layout, *arrays):
  query_bnfd, _, value_bmfe, *_, chosen_bfqs = arrays

  def head(index):
    one = _head(layout, index, *arrays)
    with jax.named_scope(SCOPE):
      outer = online_softmax.attend(one.queries.outer, *one.tokens)
    out, log_sum = map(Parts, _attend_blocks(one), (outer.attention(), outer.log_sum()))
    return [_joined(one.layout, one.layout.queries, out)], log_sum

  like = jax.ShapeDtypeStruct((*query_bnfd.shape[:3], value_bmfe.shape[3]), value_bmfe.dtype)
  (out_bnfe,), log_sum = _loop_over_heads(head, chosen_bfqs, [like])
  return out_bnfe, (arrays, out_bnfe, log_sum)


def _backward(layout, residuals, d_out_bnfe):
  arrays, out_bnfe, log_sum = residuals
  query_bnfd, *_, chosen_bfqs = arrays

  def head(index):
    one = _head(layout, index, *arrays)
    split = functools.partial(_parts, one.layout, one.layout.queries)
    out_n, d_out_n = (_take_head(x, index).astype(jnp.float32) for x in (out_bnfe, d_out_bnfe))
    shift_n1 = jnp.sum(out_n * d_out_n, axis=-1, keepdims=True)
    rows = [one.queries, Parts(*(x[index] for x in log_sum)), split(shift_n1), split(d_out_n)]
    d_query_outer, *d_seen, _ = online_softmax.gradients(*one.tokens, *(x.outer for x in rows))
    d_query, *d_keys = _blocks_backward(one, [x.blocks for x in rows])
    d_query_n = _joined(one.layout, one.layout.queries, Parts(d_query, d_query_outer))
    d_keys_n = [_joined(one.layout, one.layout.keys, x) + d
                for x, d in zip(d_keys, d_seen, strict=True)]
    return [d_query_n * query_bnfd.shape[-1] ** -0.5, *d_keys_n], None

  gradients, _ = _loop_over_heads(head, chosen_bfqs, arrays[:3])
  return *gradients, None, None, None


attend.defvjp(_forward, _backward)


def _loop_over_heads(head, chosen_bfqs, like_bnfd):
  """What `head` gives for the number of each head: arrays (N, d), put together as those of `like`,
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


def _take_head(x_bnfd, index):
  """The head with this number: (N, d)."""
  _, count, heads, width = x_bnfd.shape
  return jax.lax.dynamic_slice(x_bnfd, _start(index, heads), (1, count, 1, width))[0, :, 0]


def _parts(layout, windows, x_nd) -> Parts:
  blocks_11kcd, outer_1o1d = layout.parts(windows, x_nd[None, :, None])
  return Parts(blocks_11kcd[0, 0], outer_1o1d[0, :, 0])


def _joined(layout, windows, parts: Parts):
  """Inverse of `_parts`: (N, d)."""
  return layout.whole(windows, parts.blocks[None, None], parts.outer[None, :, None])[0, :, 0]


def _head(layout, index, query, key, value, bias, order, chosen) -> Head:
  """The head with this number of `attend`'s arguments."""
  image = index // chosen.shape[1]
  if order is not None:
    layout = layout._replace(order=order[image][None])
  query, key, value = (_take_head(x, index) for x in (query, key, value))
  bias = None if bias is None else bias[image][None]
  query, *keys = (_parts(layout, windows, x) for windows, x in (
      (layout.queries, query * query.shape[-1] ** -0.5), (layout.keys, key), (layout.keys, value)))
  biases = Parts(layout.biases(bias), None)
  if biases.blocks is not None:
    outer = jnp.zeros(layout.prefix + layout.fused) if bias is None else layout.outer(bias)[0]
    biases = Parts(biases.blocks[0, 0], outer)
  tokens = key, value, None if bias is None else bias[0]
  return Head(layout, tokens, query, (*keys, biases),
              chosen.reshape(-1, *chosen.shape[2:])[index])


def _attend_blocks(one: Head):
  """Attention of queries in blocks (q, a, e), and the log of its sum of exponentials (q, a, 1);
  some blocks of queries together, as many as divide all."""
  blocks, area, _ = one.queries.blocks.shape
  entries = area * one.chosen.shape[1] * one.keys[0].blocks.shape[1]
  most = max(1, tuning.BLOCK_ENTRIES // entries)
  group = max(n for n in range(1, min(most, blocks) + 1) if blocks % n == 0)

  def step(arrays):
    query_gad, chosen_gs = arrays
    state = _attend_group(query_gad, [_chosen(x.blocks, chosen_gs) for x in one.keys],
                          [x.outer for x in one.keys])
    return state.attention(), state.log_sum()

  groups = [x.reshape(-1, group, *x.shape[1:]) for x in (one.queries.blocks, one.chosen)]
  out = step([x[0] for x in groups]) if group == blocks else jax.lax.map(step, groups)
  return [x.reshape(blocks, area, -1) for x in out]


def _attend_group(query_gad, chosen, outer) -> State:
  """The state of blocks of queries over keys (g, m, d), values (g, m, e) and bias (g, m) or None
  that were chosen, and over those outside the blocks, the same without g."""
  (key_gmd, value_gme, bias_gm), (key_od, value_oe, bias_o) = chosen, outer
  scores = [_product("gad,gmd->gam", query_gad, key_gmd)]
  if bias_gm is not None:
    scores = [scores[0] + bias_gm[:, None]]
  weighs = [lambda exps: _product("gam,gme->gae", exps.astype(value_gme.dtype), value_gme)]
  if len(key_od):
    scores.append(_product("gad,od->gao", query_gad, key_od))
    scores[1] += 0 if bias_o is None else bias_o[None, None]
    weighs.append(lambda exps: _product("gao,oe->gae", exps.astype(value_oe.dtype), value_oe))
  # One top for both: nothing has to be scaled.
  top = jnp.stack([row_max(x) for x in scores]).max(axis=0)
  states = [tile(x, weigh, top) for x, weigh in zip(scores, weighs, strict=True)]
  return State(top, sum(x.total for x in states), sum(x.out for x in states))


def _product(axes: str, x, y):
  with jax.named_scope(SCOPE):
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _chosen(blocks_kc, chosen_gs):
  """The chosen blocks one after another: (g, s c, ...)."""
  if blocks_kc is None:
    return None
  groups, chosen = chosen_gs.shape
  return blocks_kc[chosen_gs].reshape(groups, chosen * blocks_kc.shape[1], *blocks_kc.shape[2:])


def _blocks_backward(one: Head, rows):
  """Gradients of queries in blocks (q, a, d), and Parts of those of keys and values, summed block
  by block. rows: of queries in blocks, what `online_softmax.gradients` takes."""
  inner, outer = zip(*one.keys, strict=True)

  def step(sums, arrays):
    chosen_s, *rows = arrays
    seen = [None if x is None else _chosen(x, chosen_s[None])[0] for x in inner]
    d_query, *d_seen, _ = online_softmax.gradients(*seen, *rows)
    d_query_outer, *d_outer, _ = online_softmax.gradients(*outer, *rows)
    return [Parts(total.at[chosen_s].add(d.reshape(-1, *total.shape[1:]), unique_indices=True),
                  end + e)
            for (total, end), d, e in zip(sums, d_seen, d_outer, strict=True)
            ], d_query + d_query_outer

  zeros = [Parts(*(jnp.zeros(x.shape, jnp.float32) for x in pair)) for pair in one.keys[:2]]
  d_keys, d_query_qad = jax.lax.scan(step, zeros, (one.chosen, *rows))
  return d_query_qad, *d_keys
