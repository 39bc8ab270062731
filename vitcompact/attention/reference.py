"""The definition of attention, against which every form is tested.

  out_i = sum_j a_ij v_j,   a_i = softmax(s_i),   s_ij = q_i . k_j / sqrt(d)

for each head, with the options of a `call.Core`: a filter over scores, log size added to scores, a
mask, dropped tokens that only they themselves attend to, tokens merged between scores and values.
"""
from fractions import Fraction

import jax
import jax.numpy as jnp

# The name scope by which `count` recognises the products of scores and of values.
SCOPE = "vitcompact.attention"
KEEP_EPSILON = 1e-6   # DynamicViT's


def share(part: float | Fraction):
  """Returns a name scope for `count`: the method needs only this part of the products inside."""
  part = Fraction(part).limit_denominator(10 ** 9)
  return jax.named_scope(f"vitcompact.share({part.numerator}:{part.denominator})")


def attend(call, query_bnhd, key_bmhd, value_bmhe, rescore=None):
  """Computes a `Core`: (B, N, h, d), (B, M, h, d), (B, M, h, e) -> (B, N, h, e)."""
  maps_bhnm = maps(call, query_bnhd, key_bmhd, rescore)
  return call.gather(weigh(maps_bhnm, call.spread(value_bmhe)))


def maps(call, query_bnhd, key_bmhd, rescore=None, own_n=None, edges: bool = True):
  """Returns attention maps (B, h, N, M), float32. own_n: see `softmax_kept`; edges: see `Core`."""
  scores_bhnm = masked_scores(call.masked(), query_bnhd, key_bmhd, rescore, edges)
  if call.keep_mask is not None:
    return softmax_kept(scores_bhnm, call.keep_mask, own_n)
  return jax.nn.softmax(scores_bhnm, axis=-1)


def masked_scores(call, query_bnhd, key_bmhd, rescore=None, edges: bool = True):
  """Returns scores (B, h, N, M), float32: filtered, plus log sizes, -inf where masked."""
  with share(call.scored if rescore is None else 1):   # a filter needs all scores
    scores_bhnm = scores(query_bnhd, key_bmhd)
  if rescore is not None:
    scores_bhnm = rescore(scores_bhnm, edges)
  if call.size is not None:
    scores_bhnm = scores_bhnm + call.bias()[:, None, None]
  if call.mask is None:
    return scores_bhnm
  heads, masked = scores_bhnm.shape[1], call.mask.shape[1]
  mask = call.mask if heads == masked else call.mask[:, jnp.arange(heads) % masked]
  return jnp.where(mask, scores_bhnm, -jnp.inf)


def scores(query_bnhd, key_bmhd):
  """Returns scores q.k / sqrt(d), float32: (B, N, h, d), (B, M, h, d) -> (B, h, N, M)."""
  scale = query_bnhd.shape[-1] ** -0.5
  with jax.named_scope(SCOPE):
    return jnp.einsum("bnhd,bmhd->bhnm", query_bnhd * scale, key_bmhd,
                      preferred_element_type=jnp.float32)


def softmax_kept(scores_bhnm, keep_bm, own_n=None):
  """Computes a softmax that hides dropped tokens (keep_mask = 0) from all queries but their own.

  a_ij = (e_ij g_ij + eps / M) / (sum_k e_ik g_ik + eps), g_ij = keep_mask_j, or 1 for i = j. As in
  DynamicViT, including eps. Float32; gradients reach keep_mask (B, M). own_n: (N,) or (B, N), the
  index of each query's own key; None: queries and keys are the same tokens.
  """
  queries, count = scores_bhnm.shape[-2:]
  own_n = jnp.arange(queries) if own_n is None else own_n
  own_bn1 = jnp.broadcast_to(own_n, (keep_bm.shape[0], queries))[..., None]
  top_bhn1 = jax.lax.stop_gradient(scores_bhnm.max(axis=-1, keepdims=True))
  seen_bnm = jnp.where(own_bn1 == jnp.arange(count)[None, None], 1, keep_bm[:, None, :])
  exp_bhnm = jnp.exp(scores_bhnm - top_bhn1) * seen_bnm[:, None]
  total_bhn1 = exp_bhnm.sum(axis=-1, keepdims=True)
  return (exp_bhnm + KEEP_EPSILON / count) / (total_bhn1 + KEEP_EPSILON)


def weigh(maps_bhnm, value_bmhe):
  """Averages values with the weights of maps: (B, h, N, M), (B, M, h, e) -> (B, N, h, e)."""
  with jax.named_scope(SCOPE):
    return jnp.einsum("bhnm,bmhe->bnhe", maps_bhnm.astype(value_bmhe.dtype), value_bmhe)
