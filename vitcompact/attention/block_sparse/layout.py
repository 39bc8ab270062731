"""Attention of blocks of queries over the blocks of keys that each is linked to.

Blocks of keys and values are gathered for one block of queries at a time, in a scan: what is not
linked is not computed, and memory grows with the number of tokens, not with its square.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitcompact import attention, kernels
from vitcompact.attention.block_sparse import cpu
from vitcompact.attention.block_sparse.windows import Windows


class BlockLayout(NamedTuple):
  """Which blocks of keys each block of queries is linked to, for one call of attention.

  chosen: (B, f, q, k) int32, k different blocks for each of q, for each head.
  order: (B, n) or None: the tokens in the order in which they are cut into blocks.
  prefix, fused: tokens at the start and the end that are in no block: they see all, and all see
    them.
  """
  chosen: jax.Array
  queries: Windows
  keys: Windows
  order: jax.Array | None = None
  prefix: int = 0
  fused: int = 0

  def of_heads(self, start: int, stop: int) -> "BlockLayout":
    return self._replace(chosen=self.chosen[:, start:stop])

  def inner(self, x_bn):
    """The tokens that are in blocks, in the order of these."""
    x_bn = x_bn[:, self.prefix:x_bn.shape[1] - self.fused]
    return x_bn if self.order is None else _take(x_bn, self.order)

  def outer(self, x_bn):
    """The tokens that are in no block."""
    if not self.fused:
      return x_bn[:, :self.prefix]
    return jnp.concatenate([x_bn[:, :self.prefix], x_bn[:, -self.fused:]], axis=1)

  def parts(self, windows, x_bnfd):
    """What is in blocks, (B, f, k, c, d), and in none, (B, o, f, d)."""
    return windows.cut(self.inner(x_bnfd)), self.outer(x_bnfd)

  def whole(self, windows, blocks_bfkcd, outer_bofd):
    """Inverse of `parts`: (B, N, f, d)."""
    inner_bnfd = windows.join(blocks_bfkcd)
    if self.order is not None:
      inner_bnfd = _take(inner_bnfd, jnp.argsort(self.order, axis=1))
    return jnp.concatenate([outer_bofd[:, :self.prefix], inner_bnfd, outer_bofd[:, self.prefix:]],
                           axis=1)

  def biases(self, bias_bm):
    """(B or 1, 1, blocks, area) added to scores of keys, or None; -inf in the padding."""
    valid = self.keys.valid()
    if bias_bm is None:
      return None if valid.all() else jnp.where(valid, 0.0, -jnp.inf)[None, None]
    bias = self.keys.cut(self.inner(bias_bm)[:, :, None, None])[..., 0]
    return jnp.where(valid[None, None], bias, -jnp.inf)

  def attend(self, query_bnfd, key_bmfd, value_bmfe, bias_bm=None):
    """softmax(q k^T / sqrt(d) + bias) v over what is linked: (B, N, f, e). bias: of keys, fixed."""
    if attention.in_turn():
      return cpu.attend(self._replace(chosen=None, order=None), query_bnfd, key_bmfd,
                            value_bmfe, bias_bm, self.order, self.chosen)
    query_bnfd = query_bnfd * query_bnfd.shape[-1] ** -0.5
    out = self.whole(self.queries, *self._side_by_side(query_bnfd, key_bmfd, value_bmfe, bias_bm))
    return out.astype(value_bmfe.dtype)

  def _side_by_side(self, query, key, value, bias):
    """What tokens in blocks attend to, and those in none, all heads together."""
    blocks, outer = zip(self.parts(self.queries, query), self.parts(self.keys, key),
                        self.parts(self.keys, value), strict=True)
    attend = attend_gathered
    if attention.asked() is None:   # `count` asks for one: it counts what all devices compute
      attend = kernels.block_attention(jax.devices(), *blocks, self.chosen) or attend
    out, log_sum = attend(*blocks, self.biases(bias), self.chosen)
    if not self.prefix + self.fused:
      return out, outer[2]
    rest = _dense(self.inner(query), *outer[1:], None if bias is None else self.outer(bias))
    out = merge((out, log_sum[..., None]), [self.queries.cut(x) for x in rest])
    return out, _dense(outer[0], key, value, bias)[0]

  def scored_blocks(self):
    """(B, f, q, blocks of keys): whether two blocks are linked."""
    return jax.nn.one_hot(self.chosen, self.keys.blocks, dtype=bool).any(axis=-2)

  def mask(self):
    """(B, f, N, M): the same links between tokens, for a map to be looked at."""
    rows, columns = (jnp.asarray(windows.block_of()) for windows in (self.queries, self.keys))
    mask = self.scored_blocks()[:, :, rows][..., columns]
    if self.order is not None:
      back = jnp.argsort(self.order, axis=1)
      mask = jax.vmap(lambda mask, back: mask[:, back][:, :, back])(mask, back)
    around = [(self.prefix, self.fused)] * 2
    return jnp.pad(mask, [(0, 0), (0, 0), *around], constant_values=True)


def _take(x_bn, index_bn):
  return jnp.take_along_axis(x_bn, index_bn.reshape(*index_bn.shape, *(1,) * (x_bn.ndim - 2)), 1)


def _dense(query_bnfd, key_bmfd, value_bmfe, bias_bm):
  """(attention (B, N, f, e), log of the sum of exponentials (B, N, f, 1)); queries are scaled."""
  with jax.named_scope(attention.SCOPE):
    scores = jnp.einsum("bnfd,bmfd->bnfm", query_bnfd, key_bmfd,
                        preferred_element_type=jnp.float32)
  if bias_bm is not None:
    scores = scores + bias_bm[:, None, None]
  log_sum = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
  with jax.named_scope(attention.SCOPE):
    out = jnp.einsum("bnfm,bmfe->bnfe", jnp.exp(scores - log_sum).astype(value_bmfe.dtype),
                     value_bmfe, preferred_element_type=jnp.float32)
  return out, log_sum


def merge(first, second):
  """Attention over the keys of both, from (attention, log of the sum of exponentials) of each."""
  (out, log_sum), (other, other_log_sum) = first, second
  part = jax.nn.sigmoid(log_sum - other_log_sum)
  return part * out + (1 - part) * other


@jax.custom_vjp
def attend_gathered(query_bfqad, key_bfkcd, value_bfkce, bias, chosen_bfqs):
  """Attention of each block of queries over its chosen blocks of keys.

  Args:
    query_bfqad, key_bfkcd, value_bfkce: q blocks of `a` scaled queries, k blocks of c keys.
    bias: (B or 1, 1, k, c) added to the scores, fixed; or None.
    chosen_bfqs: s blocks of keys for each block of queries.
  Returns:
    (B, f, q, a, e) and the log of the sum of exponentials (B, f, q, a), float32.
  """
  return _forward(query_bfqad, key_bfkcd, value_bfkce, bias, chosen_bfqs)


def _forward(query, key, value, bias, chosen):
  def step(_, block):
    query_bfad, chosen_bfs = block
    scores = _scores(query_bfad, gather(key, chosen_bfs), _gather_bias(bias, chosen_bfs))
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    with jax.named_scope(attention.SCOPE):
      out = jnp.einsum("bfam,bfme->bfae", weights.astype(value.dtype), gather(value, chosen_bfs),
                       preferred_element_type=jnp.float32)
    return None, (out / total, (top + jnp.log(total))[..., 0])

  _, (out, log_sum) = jax.lax.scan(step, None, (_first(query), _first(chosen)))
  return _third(out), _third(log_sum)


def _scores(query_bfad, key_bfmd, bias):
  with jax.named_scope(attention.SCOPE):
    scores = jnp.einsum("bfad,bfmd->bfam", query_bfad, key_bfmd,
                        preferred_element_type=jnp.float32)
  return scores if bias is None else scores + bias


def gather(blocks_bfkcd, chosen_bfs):
  """(B, f, s c, d): the chosen blocks one after another."""
  batch, heads, _, _, width = blocks_bfkcd.shape
  out = jnp.take_along_axis(blocks_bfkcd, chosen_bfs[..., None, None], axis=2)
  return out.reshape(batch, heads, -1, width)


def _gather_bias(bias, chosen_bfs):
  if bias is None:
    return None
  batch, heads, _ = chosen_bfs.shape
  spread = jnp.broadcast_to(bias, (batch, heads, *bias.shape[2:]))
  return gather(spread[..., None], chosen_bfs)[:, :, None, :, 0]


def _first(x_bfq):
  """The axis of query blocks in front, for a scan."""
  return jnp.moveaxis(x_bfq, 2, 0)


def _third(x_qbf):
  return jnp.moveaxis(x_qbf, 0, 2)


def _forward_and_residuals(query, key, value, bias, chosen):
  out, log_sum = _forward(query, key, value, bias, chosen)
  return (out, log_sum), (query, key, value, bias, chosen, out, log_sum)


def _backward(residuals, gradients):
  """Weights are computed again, block by block. A scan's own transpose would add a whole array of
  keys for every block of queries, which is quadratic."""
  query, key, value, bias, chosen, out, log_sum = residuals
  d_out, d_log_sum = gradients
  # d scores = weights (d weights - sum of out d_out + d_log_sum)
  shift = d_log_sum - jnp.sum(out * d_out, axis=-1)
  c = key.shape[-2]

  def step(sums, block):
    query_bfad, chosen_bfs, log_sum_bfa, shift_bfa, d_out_bfae = block
    key_bfmd, value_bfme = gather(key, chosen_bfs), gather(value, chosen_bfs)
    scores = _scores(query_bfad, key_bfmd, _gather_bias(bias, chosen_bfs))
    weights = jnp.exp(scores - log_sum_bfa[..., None])
    d_weights = jnp.einsum("bfae,bfme->bfam", d_out_bfae, value_bfme,
                           preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights + shift_bfa[..., None])
    d_value = jnp.einsum("bfam,bfae->bfme", weights, d_out_bfae)
    d_key = jnp.einsum("bfam,bfad->bfmd", d_scores, query_bfad)
    d_query = jnp.einsum("bfam,bfmd->bfad", d_scores, key_bfmd)
    sums = [add(total, chosen_bfs, part.reshape(*chosen_bfs.shape, c, -1))
            for total, part in zip(sums, (d_key, d_value), strict=True)]
    return sums, d_query

  # Mapped over images: with their numbers as indices all devices would hold all of them.
  add = jax.vmap(jax.vmap(lambda total, at, part: total.at[at].add(part, unique_indices=True)))
  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (key, value)]
  blocks = [_first(x) for x in (query, chosen, log_sum, shift, d_out)]
  (d_key, d_value), d_query = jax.lax.scan(step, zeros, blocks)
  return (_third(d_query).astype(query.dtype), d_key.astype(key.dtype),
          d_value.astype(value.dtype), None, None)


attend_gathered.defvjp(_forward_and_residuals, _backward)
