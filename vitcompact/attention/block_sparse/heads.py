"""Block-sparse attention, head by head: cuts tokens into blocks, attends, and joins the blocks.

On a CPU, one head is computed after another, in steps of a few blocks of queries, whose scores stay
in the cache (also, the system would zero an allocation above 32 MB at every call). Elsewhere all
heads are computed together, in steps of one block of queries. Tokens outside the blocks are keys in
addition to the chosen blocks; as queries, they attend to all tokens.
"""
import functools

import jax
import jax.numpy as jnp

from vitcompact.attention import online_softmax, tuning
from vitcompact.attention.online_softmax import State, row_max, tile
from vitcompact.attention.reference import SCOPE


def attend(layout, loops: bool, query_bnfd, key_bmfd, value_bmfe, bias_bm):
  """Computes `layout.BlockLayout.attend`; loops: whether to compute one head after another."""
  chosen = layout.chosen.reshape(-1, *layout.chosen.shape[2:]) if loops else layout.chosen
  return _attend(layout._replace(chosen=None, order=None), loops,
                 (query_bnfd, key_bmfd, value_bmfe), (bias_bm, layout.order), chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(layout, loops, tokens, image_arrays, chosen):
  return _forward(layout, loops, tokens, image_arrays, chosen)[0]


def _forward(layout, loops, tokens, image_arrays, chosen):
  def head(tokens, image_arrays, chosen_qs):
    image_layout, all_keys, queries, *keys = _cut(layout, tokens, image_arrays)
    with jax.named_scope(SCOPE):
      outer = online_softmax.attend(queries[1], *all_keys)
    inner = _attend_blocks(loops, queries[0], keys, chosen_qs)
    out, log_sum = zip(inner, (outer.attention(), outer.log_sum()), strict=True)
    return [_join(image_layout, image_layout.queries, *out)], log_sum

  query_bnfd, _, value_bmfe = tokens
  like = jax.ShapeDtypeStruct((*query_bnfd.shape[:3], value_bmfe.shape[3]), value_bmfe.dtype)
  (out_bnfe,), log_sum = _map_heads(head, loops, tokens, image_arrays, chosen, [like])
  return out_bnfe, (tokens, image_arrays, chosen, out_bnfe, log_sum)


def _backward(layout, loops, residuals, d_out_bnfe):
  tokens, image_arrays, chosen, out_bnfe, log_sum = residuals

  def head(tokens, image_arrays, head_arrays):
    (*tokens, out_n, d_out_n), (chosen_qs, log_sum) = tokens, head_arrays
    image_layout, all_keys, queries, *keys = _cut(layout, tokens, image_arrays)
    query_windows, key_windows = image_layout.queries, image_layout.keys
    out_n, d_out_n = out_n.astype(jnp.float32), d_out_n.astype(jnp.float32)
    shift_n1 = jnp.sum(out_n * d_out_n, axis=-1, keepdims=True)
    rows, outer_rows = zip(queries, log_sum, *(_split(image_layout, query_windows, x)
                                               for x in (shift_n1, d_out_n)), strict=True)
    d_query_outer, *d_all_keys, _ = online_softmax.gradients(*all_keys, *outer_rows)
    d_query, *d_keys = _blocks_backward(keys, chosen_qs, rows)
    d_query_n = _join(image_layout, query_windows, d_query, d_query_outer)
    return [d_query_n * tokens[0].shape[-1] ** -0.5,
            *(_join(image_layout, key_windows, *x) + d
              for x, d in zip(d_keys, d_all_keys, strict=True))], None

  gradients, _ = _map_heads(head, loops, (*tokens, out_bnfe, d_out_bnfe), image_arrays,
                            (chosen, log_sum), tokens)
  return tuple(gradients), None, None


_attend.defvjp(_forward, _backward)


def _map_heads(head, loops, tokens_bnfd, image_arrays_b, head_arrays_bf, like_bnfd):
  """Applies `head` to the tokens (N, d) of each head, the arrays of its image, and its own arrays.
  The arrays (N, d) that it returns are stacked in the shapes and dtypes of `like`. head_arrays:
  (B, f, ...), or (B f, ...) if loops."""
  if not loops:
    map_image = jax.vmap(head, (1, None, 0), (1, 0))
    arrays, others = jax.vmap(map_image)(tokens_bnfd, image_arrays_b, head_arrays_bf)
    return [x.astype(like.dtype) for x, like in zip(arrays, like_bnfd, strict=True)], others
  batch, _, heads, _ = tokens_bnfd[0].shape

  def step(results, index):
    start = (index // heads, 0, index % heads, 0)
    tokens = [jax.lax.dynamic_slice(x, start, (1, x.shape[1], 1, x.shape[3]))[0, :, 0]
              for x in tokens_bnfd]
    arrays_nd, others = head(
        tokens, jax.tree.map(lambda x: x[index // heads], image_arrays_b),
        jax.tree.map(lambda x: x[index], head_arrays_bf))
    return [jax.lax.dynamic_update_slice(x, new.astype(x.dtype)[None, :, None], start)
            for x, new in zip(results, arrays_nd, strict=True)], others

  empty = [jnp.zeros(x.shape, x.dtype) for x in like_bnfd]
  return jax.lax.scan(step, empty, jnp.arange(batch * heads))


def _cut(layout, tokens, image_arrays):
  """Returns the layout of one image; keys, values and bias of all tokens of one head; then, for
  scaled queries, keys, values and bias, a pair of those in blocks (k, c, ...) and outside (o, ...),
  which is (None, None) if there is no bias."""
  (query, key, value), (bias, order) = tokens, image_arrays
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
  """Splits tokens into those in blocks (k, c, d) and those outside (o, d)."""
  blocks_11kcd, outer_1o1d = layout.split(windows, x_nd[None, :, None])
  return blocks_11kcd[0, 0], outer_1o1d[0, :, 0]


def _join(layout, windows, blocks_kcd, outer_od):
  """Inverse of `_split`: (N, d)."""
  return layout.join(windows, blocks_kcd[None, None], outer_od[None, :, None])[0, :, 0]


def _attend_blocks(loops, query_qad, keys, chosen_qs):
  """Returns the attention of queries in blocks (q, a, e), and its `log_sum` (q, a, 1); keys: see
  `_cut`."""
  inner, outer = zip(*keys, strict=True)
  blocks, area, _ = query_qad.shape
  most = tuning.BLOCK_ENTRIES // (area * chosen_qs.shape[1] * inner[0].shape[1]) if loops else 1
  group = max(n for n in range(1, min(max(1, most), blocks) + 1) if blocks % n == 0)

  def step(arrays):
    query_gad, chosen_gs = arrays
    state = _attend_group(query_gad, _gather_blocks(inner, chosen_gs), outer)
    return state.attention(), state.log_sum()

  groups = [x.reshape(-1, group, *x.shape[1:]) for x in (query_qad, chosen_qs)]
  out = step([x[0] for x in groups]) if group == blocks else jax.lax.map(step, groups)
  return [x.reshape(blocks, area, -1) for x in out]


def _attend_group(query_gad, chosen, outer) -> State:
  """Returns the state of blocks of queries over chosen keys (g, m, d), values (g, m, e) and bias
  (g, m) or None, and over those outside the blocks, which have no axis g."""
  def product(axes, x, y):
    with jax.named_scope(SCOPE):
      return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)

  def scores_of(axes, key, _, bias):
    scores = product(f"gad,{axes}d->ga{axes[-1]}", query_gad, key)
    return scores if bias is None else scores + bias.reshape(-1, 1, bias.shape[-1])

  sides = [("gm", *chosen), ("o", *outer)] if len(outer[0]) else [("gm", *chosen)]
  scores = [scores_of(*side) for side in sides]
  # With one top for both, neither state has to be rescaled.
  top = jnp.stack([row_max(x) for x in scores]).max(axis=0)
  states = [tile(x, lambda exps, axes=axes, value=value: product(
      f"ga{axes[-1]},{axes}e->gae", exps.astype(value.dtype), value), top)
            for x, (axes, _, value, _) in zip(scores, sides, strict=True)]
  return State(top, sum(x.total for x in states), sum(x.out for x in states))


def _gather_blocks(blocks, chosen_gs):
  """Gathers the chosen blocks of arrays (k, c, ...) and concatenates them: (g, s c, ...)."""
  groups, chosen = chosen_gs.shape
  return jax.tree.map(lambda x: x[chosen_gs].reshape(groups, chosen * x.shape[1], *x.shape[2:]),
                      blocks)


def _blocks_backward(keys, chosen_qs, rows):
  """Returns gradients of queries in blocks, and pairs of gradients of keys and values in blocks and
  outside, summed block by block.

  The transpose of a scan would add a whole array of keys for every block of queries. rows: for
  queries in blocks, the last arguments of `online_softmax.gradients`.
  """
  inner, outer = zip(*keys, strict=True)

  def step(sums, arrays):
    chosen_s, *rows = arrays
    chosen = jax.tree.map(lambda x: x[0], _gather_blocks(inner, chosen_s[None]))
    d_query, *d_chosen, _ = online_softmax.gradients(*chosen, *rows)
    d_query_outer, *d_outer, _ = online_softmax.gradients(*outer, *rows)
    return [(total.at[chosen_s].add(d.reshape(-1, *total.shape[1:]), unique_indices=True), end + e)
            for (total, end), d, e in zip(sums, d_chosen, d_outer, strict=True)
            ], d_query + d_query_outer

  zeros = [tuple(jnp.zeros(x.shape, jnp.float32) for x in pair) for pair in keys[:2]]
  d_keys, d_query_qad = jax.lax.scan(step, zeros, (chosen_qs, *rows))
  return d_query_qad, *d_keys
