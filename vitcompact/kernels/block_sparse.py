"""What the kernels of all platforms share: arguments, gradients and the split over devices."""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vitcompact.kernels.partition import over_images


def attention(forward: Callable, backward: Callable) -> Callable:
  """Makes a differentiable function of two kernels.

  forward(interpret, query, key, value, bias, chosen) returns (out, log_sum); bias is (B, 1, k, c).
  backward(interpret, query, key, value, bias, chosen, log_sum, shift, d_out) returns the gradients
  of query, key and value, where weights = exp(scores - log_sum) and
  d_scores = weights (d_weights + shift).
  """
  @functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
  def attend(query_bfqad, key_bfkcd, value_bfkce, bias, chosen_bfqs, interpret=None):
    """Attention of each block of queries over its chosen blocks of keys.

    Args:
      query_bfqad, key_bfkcd, value_bfkce: q blocks of `a` scaled queries, k blocks of c keys.
      bias: (B or 1, 1, k, c) float32 added to the scores, without a gradient; -inf masks a key. Or
        None.
      chosen_bfqs: int32, s different blocks of keys for each block of queries.
      interpret: the `interpret` argument of the platform's kernels, which runs them on any machine.
    Returns:
      (B, f, q, a, e) and the log of the sum of exponentials (B, f, q, a), float32.
    """
    return run(query_bfqad, key_bfkcd, value_bfkce, bias, chosen_bfqs, interpret)[0]

  def per_device(kernel, interpret):
    kernel = functools.partial(kernel, interpret)
    # Mosaic GPU's interpreter has effects, which a partitioned function may not have.
    return over_images(kernel) if interpret is None else kernel

  def run(query, key, value, bias, chosen, interpret):
    bias = _bias_per_image(bias, key)
    out, log_sum = per_device(forward, interpret)(query, key, value, bias, chosen)
    return (out.astype(jnp.float32), log_sum), (query, key, value, bias, chosen, out, log_sum)

  def gradients(interpret, residuals, gradients):
    *arguments, out, log_sum = residuals
    d_out, d_log_sum = gradients
    shift = d_log_sum - jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)
    d_arrays = per_device(backward, interpret)(*arguments, log_sum, shift, d_out.astype(out.dtype))
    return *d_arrays, None, None

  attend.defvjp(run, gradients)
  return attend


def _bias_per_image(bias, key_bfkcd):
  """Returns the bias as (B, 1, k, c) float32."""
  batch, _, keys, area, _ = key_bfkcd.shape
  if bias is None:
    return jnp.zeros((batch, 1, keys, area), jnp.float32)
  return jnp.broadcast_to(bias.astype(jnp.float32), (batch, 1, keys, area))
