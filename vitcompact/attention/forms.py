"""The forms of attention between tokens, by name: each equals the reference.

Each computes a `call.Core` (its mask resolved, its values spread) of queries (B, N, h, d), keys
(B, M, h, d) and values (B, M, h, e) on a device: (B, N, h, e) in the values' dtype.
"""
import functools

import jax
import jax.numpy as jnp

from vitcompact.attention import cpu, online_softmax, reference, tiled, vendor


def einsum(call, query_bnhd, key_bmhd, value_bmhe, rescore=None, device=None, own_n=None,
           edges: bool = True):
  """All scores of these queries formed. own_n, edges: see `reference.maps`."""
  needed = call.scored * call.weighed
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
  """One image after another, where the device is one on which that pays; no map is kept."""
  loops = device.loops_over_images
  if call.is_plain(rescore):
    return tiled.attend(query, key, value, call.bias(), loop="images" if loops else None)
  if loops:
    return cpu.over_images(functools.partial(einsum, rescore=rescore), call, query, key, value)
  return einsum(call, query, key, value, rescore)


def tiles(call, query, key, value, rescore, device):
  """Tiles of queries, computed again in the backward pass: memory is linear in tokens."""
  loops = device.loops_over_images
  if call.is_plain(rescore):
    return tiled.attend(query, key, value, call.bias(), loop="heads" if loops else None)
  attend = functools.partial(tiled.attend_any, einsum, rescore=rescore)
  attend = functools.partial(cpu.over_images, attend) if loops else attend
  return attend(call, query, key, value)


def plain(call, query, key, value, rescore, device):
  """The reference: two products around a softmax, as other runtimes recognise them."""
  return reference.weigh(reference.maps(call, query, key, rescore), value)


def _vendors(attend):
  def form(call, query, key, value, rescore, device):
    with jax.named_scope(reference.SCOPE):
      return attend(query, key, value, call.bias())
  return form


COMPUTE = {"einsum": einsum, "images": images, "tiled": tiles, "plain": plain,
           **{name: _vendors(getattr(vendor, name)) for name in vendor.FORMS}}
