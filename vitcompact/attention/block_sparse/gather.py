"""Block-sparse attention off a CPU: all heads together, by a kernel or by gathering blocks."""
import jax
import jax.numpy as jnp

from vitcompact.attention import online_softmax
from vitcompact.attention.online_softmax import State
from vitcompact.attention.reference import SCOPE


def attend(layout, of_blocks, query, key, value, bias):
  """See `layout.BlockLayout.attend`. of_blocks: `attend_blocks`, or a kernel that equals it."""
  query = query * query.shape[-1] ** -0.5
  blocks, outer = zip(layout.parts(layout.queries, query), layout.parts(layout.keys, key),
                      layout.parts(layout.keys, value), strict=True)
  out, log_sum = of_blocks(*blocks, layout.biases(bias), layout.chosen)
  out_outer = outer[2]   # of no tokens
  if layout.prefix + layout.fused:
    # What is in blocks sees the keys outside as well, and what is outside sees all.
    seen = State(log_sum[..., None], jnp.ones_like(log_sum)[..., None], out)
    rest = _all_pairs(layout.inner(query), *outer[1:], None if bias is None else layout.outer(bias))
    out = seen.combined(State(*map(layout.queries.cut, rest))).attention()
    out_outer = _all_pairs(outer[0], key, value, bias).attention()
  return layout.whole(layout.queries, out, out_outer).astype(value.dtype)


def _all_pairs(query_bnfd, key_bmfd, value_bmfe, bias_bm) -> State:
  """States (B, N, f, ...) of scaled queries that see all these keys."""
  heads = jax.vmap(online_softmax.attend, (1, 1, 1, None), 1)
  with jax.named_scope(SCOPE):
    return jax.vmap(heads)(query_bnfd, key_bmfd, value_bmfe, bias_bm)


@jax.custom_vjp
def attend_blocks(query_bfqad, key_bfkcd, value_bfkce, bias, chosen_bfqs):
  """Attention of each block of queries over its chosen blocks of keys, one after another.

  Args:
    query_bfqad, key_bfkcd, value_bfkce: q blocks of `a` scaled queries, k blocks of c keys.
    bias: (B or 1, 1, k, c) added to the scores, fixed; or None.
    chosen_bfqs: s blocks of keys for each block of queries.
  Returns:
    (B, f, q, a, e) and the log of the sum of exponentials (B, f, q, a), float32.
  """
  return _forward(query_bfqad, key_bfkcd, value_bfkce, bias, chosen_bfqs)[0]


def _over_heads(fn):
  """fn of one head of an image, for arrays (B, f, ...)."""
  return jax.vmap(jax.vmap(fn))


def _forward(query, key, value, bias, chosen):
  arrays = (query, key, value, bias, chosen)

  def step(_, block):
    query_bfad, chosen_bfs = block
    with jax.named_scope(SCOPE):
      state = _over_heads(online_softmax.attend)(query_bfad, *_chosen(key, value, bias, chosen_bfs))
    return None, (state.attention(), state.log_sum()[..., 0])

  _, out = jax.lax.scan(step, None, (_first(query), _first(chosen)))
  out, log_sum = map(_third, out)
  return (out, log_sum), (*arrays, out, log_sum)


def _backward(residuals, gradients):
  """Weights are computed again, block by block. A scan's own transpose would add a whole array of
  keys for every block of queries, which is quadratic."""
  query, key, value, bias, chosen, out, log_sum = residuals
  d_out, d_log_sum = gradients
  shift = jnp.sum(out * d_out, axis=-1) - d_log_sum
  rows = [query, log_sum[..., None], shift[..., None], d_out]

  def step(sums, block):
    chosen_bfs, *rows = block
    d_query, *d_keys, _ = _over_heads(online_softmax.gradients)(
        *_chosen(key, value, bias, chosen_bfs), *rows)
    return [add(total, chosen_bfs, d.reshape(*chosen_bfs.shape, -1, d.shape[-1]))
            for total, d in zip(sums, d_keys, strict=True)], d_query

  # Mapped over images: with their numbers as indices all devices would hold all of them.
  add = _over_heads(lambda total, at, part: total.at[at].add(part, unique_indices=True))
  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (key, value)]
  (d_key, d_value), d_query = jax.lax.scan(step, zeros, [_first(x) for x in (chosen, *rows)])
  return _third(d_query), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


attend_blocks.defvjp(_forward, _backward)


def _chosen(key, value, bias, chosen_bfs):
  """Keys, values and bias of the chosen blocks, one after another: (B, f, s c, ...)."""
  if bias is not None:
    bias = jnp.broadcast_to(bias, key.shape[:4])[..., None]
  def gather(blocks_bfkcd):
    out = jnp.take_along_axis(blocks_bfkcd, chosen_bfs[..., None, None], axis=2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])
  key, value, bias = jax.tree.map(gather, (key, value, bias))
  return key, value, None if bias is None else bias[..., 0]


def _first(x_bfq):
  """The axis of query blocks in front, for a scan."""
  return jnp.moveaxis(x_bfq, 2, 0)


def _third(x_qbf):
  return jnp.moveaxis(x_qbf, 0, 2)
