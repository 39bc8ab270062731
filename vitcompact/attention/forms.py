"""The forms of attention between tokens, by name; each computes the same as the reference.

Each takes a `call.Core` (with `masked` and `spread` already applied), queries (B, N, h, d), keys
(B, M, h, d), values (B, M, h, e) and a device, and returns (B, N, h, e) in the values' dtype.
"""
import functools

import jax
import jax.numpy as jnp

from vitcompact.attention import cpu, online_softmax, reference, tiled, vendor


def einsum(call, query_bnhd, key_bmhd, value_bmhe, rescore=None, device=None, own_n=None,
           edges: bool = True):
  """Forms all scores of these queries at once. own_n, edges: see `reference.maps`."""
  needed = call.scored * call.value_share
  if call.keep_mask is not None:
    maps_bhnm = reference.maps(call, query_bnhd, key_bmhd, rescore, own_n, edges)
    with reference.share(needed):
      return reference.weigh(maps_bhnm, value_bmhe)

  def weigh(exp_bhnm):
    with reference.share(needed), jax.named_scope(reference.SCOPE):
      return jnp.einsum("bhnm,bmhe->bhne", exp_bhnm.astype(value_bmhe.dtype), value_bmhe,
                        preferred_element_type=jnp.float32)

  scores_bhnm = reference.masked_scores(call, query_bnhd, key_bmhd, rescore, edges)
  out_bhne = online_softmax.tile(scores_bhnm, weigh).attention()
  return out_bhne.astype(value_bmhe.dtype).swapaxes(1, 2)


def images(call, query, key, value, rescore, device):
  """Computes one image after another, if that is faster on the device; no map is kept."""
  loops = device.loops_over_images
  if call.is_plain(rescore):
    return tiled.attend(query, key, value, call.bias(), loop="images" if loops else None)
  if loops:
    return cpu.over_images(functools.partial(einsum, rescore=rescore), call, query, key, value)
  return einsum(call, query, key, value, rescore)


def tiles(call, query, key, value, rescore, device):
  """Computes tiles of queries, and recomputes them in the backward pass: memory is linear in the
  number of tokens."""
  loops = device.loops_over_images
  if call.is_plain(rescore):
    return tiled.attend(query, key, value, call.bias(), loop="heads" if loops else None)
  attend = functools.partial(tiled.attend_any, einsum, rescore=rescore)
  attend = functools.partial(cpu.over_images, attend) if loops else attend
  return attend(call, query, key, value)


def plain(call, query, key, value, rescore, device):
  """Computes the reference: two products and a softmax, a pattern that other runtimes recognise."""
  return reference.weigh(reference.maps(call, query, key, rescore), value)


def _vendor_form(attend):
  def form(call, query, key, value, rescore, device):
    with jax.named_scope(reference.SCOPE):
      return attend(query, key, value, call.bias())
  return form


COMPUTE = {"einsum": einsum, "images": images, "tiled": tiles, "plain": plain,
           **{name: _vendor_form(getattr(vendor, name)) for name in vendor.FORMS}}
