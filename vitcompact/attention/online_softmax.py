"""The online softmax: attention of queries over one tile of keys after another.

For a row of scores s with values v, the state over the keys seen so far is kept unnormalised,

  top = max_j s_j,   total = sum_j e^(s_j - top),   out = sum_j e^(s_j - top) v_j,

and the states of two sets of keys combine to the state of their union.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = jnp.finfo(jnp.float32).min


class State(NamedTuple):
  """top, total (..., N, 1) and out (..., N, e), float32."""
  top: jax.Array
  total: jax.Array
  out: jax.Array

  def combine(self, other: "State") -> "State":
    """Returns the state of the keys of both. The result does not depend on `top`, which therefore
    has no gradient."""
    top = jax.lax.stop_gradient(jnp.maximum(self.top, other.top))
    old, new = jnp.exp(self.top - top), jnp.exp(other.top - top)
    return State(top, old * self.total + new * other.total, old * self.out + new * other.out)

  def attention(self):
    return self.out / self.total   # divided after the product, which is smaller than the scores

  def log_sum(self):
    """Returns the log of the sum of exponentials of the scores."""
    return self.top + jnp.log(self.total)


def row_max(scores):
  return jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))


def tile(scores, weigh: Callable, top=None) -> State:
  """Returns the state of a tile of scores (..., N, M).

  weigh: exponentials (..., N, M) -> their products with the values (..., N, e).
  top: (..., N, 1); None: the maxima of the scores.
  """
  top = row_max(scores) if top is None else top
  exps = jnp.exp(scores - top)
  return State(top, exps.sum(axis=-1, keepdims=True), weigh(exps))


def row_scores(query_nd, key_md, bias_m):
  """Returns scores (N, M), float32, of queries that are already scaled."""
  scores_nm = _product(query_nd, key_md.T)
  return scores_nm if bias_m is None else scores_nm + bias_m[None]


def attend(query_nd, key_md, value_me, bias_m, step: int | None = None) -> State:
  """Returns the state of scaled queries (N, d) over all keys, in steps of `step` keys (None: all at
  once); the first step has the remainder."""
  def attend_step(key_sd, value_se, bias_s):
    def weigh(exp_ns):
      return _product(exp_ns.astype(value_se.dtype), value_se)
    scores_ns = row_scores(query_nd, key_sd, bias_s)
    # Keys of size 0 score -inf, and those may be all keys of a step.
    return tile(scores_ns, weigh, jnp.maximum(row_max(scores_ns), LOWEST))

  keys, step = (key_md, value_me, bias_m), step or len(key_md)
  first = (len(key_md) - 1) % step + 1
  state = attend_step(*jax.tree.map(lambda x: x[:first], keys))
  if first < len(key_md):
    steps = jax.tree.map(lambda x: x[first:].reshape(-1, step, *x.shape[1:]), keys)
    state, _ = jax.lax.scan(lambda state, keys: (state.combine(attend_step(*keys)), None), state,
                            steps)
  return state


def gradients(key_md, value_me, bias_m, query_nd, log_sum_n1, shift_n1, d_out_ne):
  """Returns the gradients of query, key, value and the bias (M,). shift: the sum of out d_out over
  channels, minus the gradient of log_sum."""
  weights_nm = jnp.exp(row_scores(query_nd, key_md, bias_m) - log_sum_n1)
  d_scores_nm = weights_nm * (_product(d_out_ne, value_me.T) - shift_n1)
  return (_product(d_scores_nm, key_md).astype(query_nd.dtype), _product(d_scores_nm.T, query_nd),
          _product(weights_nm.T, d_out_ne), d_scores_nm.sum(axis=0))


def _product(x, y):
  return jnp.matmul(x, y, preferred_element_type=jnp.float32)
