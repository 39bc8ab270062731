"""Block-sparse attention without a loop, for other runtimes: a gather, two products and a softmax,
for all blocks of queries at once."""
import jax
import jax.numpy as jnp

from vitcompact.attention import reference
from vitcompact.attention.reference import SCOPE


def attend(layout, query_bnfd, key_bmfd, value_bmfe, bias_bm):
  """Computes `layout.BlockLayout.attend`."""
  windows = layout.queries, layout.keys, layout.keys
  blocks, outer = zip(*map(layout.split, windows, (query_bnfd, key_bmfd, value_bmfe)), strict=True)
  key, value = (_gather_keys(layout.chosen, *sides)
                for sides in list(zip(blocks, outer, strict=True))[1:])
  scores = _product(blocks[0] * query_bnfd.shape[-1] ** -0.5, key.swapaxes(-1, -2))
  if (bias := _bias(layout, bias_bm)) is not None:
    scores = scores + bias
  out = _product(jax.nn.softmax(scores, axis=-1), value)
  out_outer = outer[2]   # has no tokens
  if layout.prefix + layout.fused:
    dense = reference.scores(outer[0], key_bmfd)
    dense = dense if bias_bm is None else dense + bias_bm[:, None, None]
    out_outer = reference.weigh(jax.nn.softmax(dense, axis=-1), value_bmfe)
  return layout.join(layout.queries, out, out_outer).astype(value_bmfe.dtype)


def _product(x, y):
  with jax.named_scope(SCOPE):
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _gather_keys(chosen_bfqs, blocks_bfkcd, outer_bofd):
  """Gathers the tokens to which each block of queries attends, those outside the blocks last:
  (B, f, q, m, d)."""
  batch, heads, count, area, width = blocks_bfkcd.shape
  queries, kept = chosen_bfqs.shape[2:]
  first_bf11 = count * jnp.arange(batch * heads).reshape(batch, heads, 1, 1)
  flat = blocks_bfkcd.reshape(-1, area * width)
  inner = flat[(chosen_bfqs + first_bf11).reshape(-1)]
  inner = inner.reshape(batch, heads, queries, kept * area, width)
  outer = outer_bofd.swapaxes(1, 2)[:, :, None]
  return jnp.concatenate([inner, jnp.broadcast_to(
      outer, (batch, heads, queries, *outer.shape[3:]))], axis=3)


def _bias(layout, bias_bm):
  """Returns the bias (B, f, q, 1, m) of the keys of each block of queries, or None."""
  inner = layout.biases(bias_bm)
  if inner is None:
    return None
  batch, heads = layout.chosen.shape[:2]
  inner = jnp.broadcast_to(inner, (batch, heads, *inner.shape[2:]))[..., None]
  outer = jnp.zeros((batch, layout.prefix + layout.fused)) if bias_bm is None else \
      layout.outer(bias_bm)
  outer = jnp.broadcast_to(outer[..., None, None], (*outer.shape, heads, 1))
  return _gather_keys(layout.chosen, inner, outer)[..., 0][..., None, :]
