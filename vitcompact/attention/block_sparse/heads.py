"""Block-sparse attention, head by head: cut into blocks, attended, put together again.

On a CPU one head follows another, in steps of some blocks of queries, whose scores stay in the
cache (an allocation above 32 MB, moreover, is zeroed by the system at every call). Elsewhere all
heads are computed together, a block of queries each. Tokens outside the blocks are keys beside the
chosen blocks; as queries they see all tokens.
"""
import functools

import jax
import jax.numpy as jnp

from vitcompact.attention import online_softmax, tuning
from vitcompact.attention.online_softmax import State, row_max, tile
from vitcompact.attention.reference import SCOPE


def attend(layout, loops: bool, query_bnfd, key_bmfd, value_bmfe, bias_bm):
  """As `layout.BlockLayout.attend`; loops: whether one head follows another."""
  chosen = layout.chosen.reshape(-1, *layout.chosen.shape[2:]) if loops else layout.chosen
  return _attend(layout._replace(chosen=None, order=None), loops,
                 (query_bnfd, key_bmfd, value_bmfe), (bias_bm, layout.order), chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(layout, loops, tokens, of_image, chosen):
  return _forward(layout, loops, tokens, of_image, chosen)[0]


def _forward(layout, loops, tokens, of_image, chosen):
  def head(tokens, of_image, chosen_qs):
    one, seen, queries, *keys = _cut(layout, tokens, of_image)
    with jax.named_scope(SCOPE):
      outer = online_softmax.attend(queries[1], *seen)
    inner = _attend_blocks(loops, queries[0], keys, chosen_qs)
    out, log_sum = zip(inner, (outer.attention(), outer.log_sum()), strict=True)
    return [_joined(one, one.queries, *out)], log_sum

  query_bnfd, _, value_bmfe = tokens
  like = jax.ShapeDtypeStruct((*query_bnfd.shape[:3], value_bmfe.shape[3]), value_bmfe.dtype)
  (out_bnfe,), log_sum = _each_head(head, loops, tokens, of_image, chosen, [like])
  return out_bnfe, (tokens, of_image, chosen, out_bnfe, log_sum)


def _backward(layout, loops, residuals, d_out_bnfe):
  tokens, of_image, chosen, out_bnfe, log_sum = residuals

  def head(tokens, of_image, of_head):
    (*tokens, out_n, d_out_n), (chosen_qs, log_sum) = tokens, of_head
    one, seen, queries, *keys = _cut(layout, tokens, of_image)
    out_n, d_out_n = out_n.astype(jnp.float32), d_out_n.astype(jnp.float32)
    shift_n1 = jnp.sum(out_n * d_out_n, axis=-1, keepdims=True)
    rows, outer_rows = zip(queries, log_sum, *(_split(one, one.queries, x)
                                               for x in (shift_n1, d_out_n)), strict=True)
    d_query_outer, *d_seen, _ = online_softmax.gradients(*seen, *outer_rows)
    d_query, *d_keys = _blocks_backward(keys, chosen_qs, rows)
    d_query_n = _joined(one, one.queries, d_query, d_query_outer) * tokens[0].shape[-1] ** -0.5
    return [d_query_n, *(_joined(one, one.keys, *x) + d
                         for x, d in zip(d_keys, d_seen, strict=True))], None

  gradients, _ = _each_head(head, loops, (*tokens, out_bnfe, d_out_bnfe), of_image,
                            (chosen, log_sum), tokens)
  return tuple(gradients), None, None


_attend.defvjp(_forward, _backward)


def _each_head(head, loops, tokens_bnfd, of_image_b, of_head_bf, like_bnfd):
  """`head` of arrays (N, d), those of its image and its own, for those of all heads. It gives
  arrays (N, d), put together as those of `like`, and others. of_head: (B, f, ...), and (B f, ...)
  where heads follow one another."""
  if not loops:
    of_heads = jax.vmap(head, (1, None, 0), (1, 0))
    arrays, others = jax.vmap(of_heads)(tokens_bnfd, of_image_b, of_head_bf)
    return [x.astype(like.dtype) for x, like in zip(arrays, like_bnfd, strict=True)], others
  batch, _, heads, _ = tokens_bnfd[0].shape

  def step(together, index):
    start = (index // heads, 0, index % heads, 0)
    tokens = [jax.lax.dynamic_slice(x, start, (1, x.shape[1], 1, x.shape[3]))[0, :, 0]
              for x in tokens_bnfd]
    arrays_nd, others = head(
        tokens, jax.tree.map(lambda x: x[index // heads], of_image_b),
        jax.tree.map(lambda x: x[index], of_head_bf))
    return [jax.lax.dynamic_update_slice(x, new.astype(x.dtype)[None, :, None], start)
            for x, new in zip(together, arrays_nd, strict=True)], others

  empty = [jnp.zeros(x.shape, x.dtype) for x in like_bnfd]
  return jax.lax.scan(step, empty, jnp.arange(batch * heads))


def _cut(layout, tokens, of_image):
  """One head's layout; its keys, values and bias as they are; then in blocks and outside of them,
  pairs (k, c, ...), (o, ...): scaled queries, keys, values, bias or (None, None)."""
  (query, key, value), (bias, order) = tokens, of_image
  if order is not None:
    layout = layout._replace(order=order[None])
  arrays = [_split(layout, windows, x) for windows, x in (
      (layout.queries, query * query.shape[-1] ** -0.5), (layout.keys, key), (layout.keys, value))]
  bias_1m = None if bias is None else bias[None]
  inner, outer = layout.biases(bias_1m), None
  if inner is not None:
    inner = inner[0, 0]
    outer = jnp.zeros(layout.prefix + layout.fused) if bias is None else layout.outer(bias_1m)[0]
  return layout, (key, value, bias), *arrays, (inner, outer)


def _split(layout, windows, x_nd):
  """What is in blocks (k, c, d), and outside of them (o, d)."""
  blocks_11kcd, outer_1o1d = layout.split(windows, x_nd[None, :, None])
  return blocks_11kcd[0, 0], outer_1o1d[0, :, 0]


def _joined(layout, windows, blocks_kcd, outer_od):
  """Inverse of `_split`: (N, d)."""
  return layout.join(windows, blocks_kcd[None, None], outer_od[None, :, None])[0, :, 0]


def _attend_blocks(loops, query_qad, keys, chosen_qs):
  """Attention of queries in blocks (q, a, e), and its `log_sum` (q, a, 1); keys: see `_cut`."""
  inner, outer = zip(*keys, strict=True)
  blocks, area, _ = query_qad.shape
  most = tuning.BLOCK_ENTRIES // (area * chosen_qs.shape[1] * inner[0].shape[1]) if loops else 1
  group = max(n for n in range(1, min(max(1, most), blocks) + 1) if blocks % n == 0)

  def step(arrays):
    query_gad, chosen_gs = arrays
    state = _attend_group(query_gad, _chosen(inner, chosen_gs), outer)
    return state.attention(), state.log_sum()

  groups = [x.reshape(-1, group, *x.shape[1:]) for x in (query_qad, chosen_qs)]
  out = step([x[0] for x in groups]) if group == blocks else jax.lax.map(step, groups)
  return [x.reshape(blocks, area, -1) for x in out]


def _attend_group(query_gad, chosen, outer) -> State:
  """The state of blocks of queries over keys (g, m, d), values (g, m, e) and bias (g, m) or None
  that were chosen, and over those outside the blocks, the same without g."""
  def product(axes, x, y):
    with jax.named_scope(SCOPE):
      return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)

  def scored(axes, key, _, bias):
    scores = product(f"gad,{axes}d->ga{axes[-1]}", query_gad, key)
    return scores if bias is None else scores + bias.reshape(-1, 1, bias.shape[-1])

  sides = [("gm", *chosen), ("o", *outer)] if len(outer[0]) else [("gm", *chosen)]
  scores = [scored(*side) for side in sides]
  # One top for both: neither state has to be scaled.
  top = jnp.stack([row_max(x) for x in scores]).max(axis=0)
  states = [tile(x, lambda exps, axes=axes, value=value: product(
      f"ga{axes[-1]},{axes}e->gae", exps.astype(value.dtype), value), top)
            for x, (axes, _, value, _) in zip(scores, sides, strict=True)]
  return State(top, sum(x.total for x in states), sum(x.out for x in states))


def _chosen(blocks, chosen_gs):
  """Of arrays of blocks (k, c, ...) the chosen ones, one after another: (g, s c, ...)."""
  groups, chosen = chosen_gs.shape
  return jax.tree.map(lambda x: x[chosen_gs].reshape(groups, chosen * x.shape[1], *x.shape[2:]),
                      blocks)


def _blocks_backward(keys, chosen_qs, rows):
  """Gradients of queries in blocks, and pairs of those of keys and values, summed block by block.

  Not by a scan's own transpose, which would add a whole array of keys for every block of queries.
  rows: of queries in blocks, the last arguments of `online_softmax.gradients`.
  """
  inner, outer = zip(*keys, strict=True)

  def step(sums, arrays):
    chosen_s, *rows = arrays
    seen = jax.tree.map(lambda x: x[0], _chosen(inner, chosen_s[None]))
    d_query, *d_seen, _ = online_softmax.gradients(*seen, *rows)
    d_query_outer, *d_outer, _ = online_softmax.gradients(*outer, *rows)
    return [(total.at[chosen_s].add(d.reshape(-1, *total.shape[1:]), unique_indices=True), end + e)
            for (total, end), d, e in zip(sums, d_seen, d_outer, strict=True)
            ], d_query + d_query_outer

  zeros = [tuple(jnp.zeros(x.shape, jnp.float32) for x in pair) for pair in keys[:2]]
  d_keys, d_query_qad = jax.lax.scan(step, zeros, (chosen_qs, *rows))
  return d_query_qad, *d_keys
