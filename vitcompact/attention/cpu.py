"""Loops that pay off only on a CPU: the data of one iteration stays in its cache.

Up to a few hundred tokens, the scores of all heads of an image fit, in an allocation so small that
it is not returned to the system after each layer; with more tokens, those of one head and some of
its keys fit.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp


def over_images(attend: Callable, call, query_bnhd, key_bmhd, value_bmhe):
  """Applies `attend` to one image of a call after another."""
  def image(arrays):
    (size, keep_mask, mask), *arrays = jax.tree.map(lambda x: x[None], arrays)
    return attend(call._replace(size=size, keep_mask=keep_mask, mask=mask), *arrays)[0]

  fields = (call.size, call.keep_mask, call.mask)
  return jax.lax.map(image, (fields, query_bnhd, key_bmhd, value_bmhe))


def loop_over_images(image: Callable) -> Callable:
  """Turns a function of arrays (N, h, ...) and a bias (M,) into one of arrays (B, N, h, ...) and
  biases (B, M)."""
  return lambda arrays_bnh, bias_bm: jax.lax.map(lambda one: image(*one), (arrays_bnh, bias_bm))


def loop_over_heads(head: Callable) -> Callable:
  """Turns a function of arrays (N, ...) and a bias (M,) into one of arrays (B, N, h, ...) and
  biases (B, M)."""
  def loop(arrays_bnh, bias_bm):
    # Transposed before the loop: inside it, images of 577 tokens took a twentieth longer.
    batch, _, heads = arrays_bnh[0].shape[:3]
    arrays_gn = [x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], *x.shape[3:])
                 for x in arrays_bnh]
    bias_gm = None if bias_bm is None else jnp.repeat(bias_bm, heads, axis=0)
    out_gn = jax.lax.map(lambda one: head(*one), (*arrays_gn, bias_gm))
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]).swapaxes(1, 2), out_gn)
  return loop
