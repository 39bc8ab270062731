"""Block-sparse attention by a kernel that computes only the chosen blocks."""
import jax
import jax.numpy as jnp

from vitcompact.attention import online_softmax
from vitcompact.attention.online_softmax import State
from vitcompact.attention.reference import SCOPE


def attend(layout, kernel, query, key, value, bias):
  """Computes `layout.BlockLayout.attend`. kernel: see `kernels.block_attention`."""
  query = query * query.shape[-1] ** -0.5
  blocks, outer = zip(layout.split(layout.queries, query), layout.split(layout.keys, key),
                      layout.split(layout.keys, value), strict=True)
  out, log_sum = kernel(*blocks, layout.biases(bias), layout.chosen)
  out_outer = outer[2]   # has no tokens
  if layout.prefix + layout.fused:
    chosen_state = State(log_sum[..., None], jnp.ones_like(log_sum)[..., None], out)
    outer_bias = None if bias is None else layout.outer(bias)
    outer_state = _all_pairs(layout.inner(query), *outer[1:], outer_bias)
    out = chosen_state.combine(State(*map(layout.queries.cut, outer_state))).attention()
    out_outer = _all_pairs(outer[0], key, value, bias).attention()
  return layout.join(layout.queries, out, out_outer).astype(value.dtype)


def _all_pairs(query_bnfd, key_bmfd, value_bmfe, bias_bm) -> State:
  """Returns states (B, N, f, ...) of scaled queries that attend to all of these keys."""
  heads = jax.vmap(online_softmax.attend, (1, 1, 1, None), 1)
  with jax.named_scope(SCOPE):
    return jax.vmap(heads)(query_bnfd, key_bmfd, value_bmfe, bias_bm)
