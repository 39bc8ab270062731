"""Which form computes a call of attention: one function of the device and the call."""
from typing import NamedTuple

import jax.numpy as jnp

from vitcompact import kernels
from vitcompact.attention import tuning, vendor
from vitcompact.attention.device import Device


class Choice(NamedTuple):
  """A form by name, and what a reader of a receipt should know about it, if anything."""
  form: str
  note: str = ""

  @property
  def block_sparse(self) -> bool:
    return self.form.startswith("block_sparse")


def choose(device: Device, call, query, key, value, rescore=None, requested: str | None = None):
  """The form for a `Core` and such arrays (or `jax.ShapeDtypeStruct`s), values spread already.

  Raises ValueError where the form asked for cannot run. Returns a Choice of
    "einsum", all scores at once; "plain", the same as others recognise it; "images", one image
    after another; "tiled", tiles of queries, whose memory is linear in tokens; "cudnn"; "splash";
    "tokamax", which is, like "plain", only ever asked for;
    for a block layout "block_sparse_cpu", "block_sparse_kernel", "block_sparse_gather" or
    "block_sparse_plain".
  """
  if call.layout is not None and not (note := masked_dense(call, rescore)):
    return for_layout(device, call.layout, query, key, value, requested)
  if not call.is_plain(rescore):
    note = "" if call.layout is None else note
    requested = "tiled" if requested in vendor.FORMS else requested
    return Choice(requested or _portable_form(device, query, key), note)
  width = vendor.channels(query.shape[-1], value.shape[-1], call.size is not None)
  if why := refusal(requested, device, value.dtype, width):
    raise ValueError(f"attention form {requested!r} {why}; ask for another, or for none (in an "
                     "Execution, attention={}): then the one that fits is taken")
  if requested is not None:
    return Choice(requested)
  if not device.loops_over_images:
    if not refusal("cudnn", device, value.dtype, width):
      return Choice("cudnn")
    # XLA cannot split its kernel over several TPUs.
    if device.platform == "tpu" and device.count == 1 and key.shape[1] >= tuning.MIN_SPLASH_KEYS:
      return Choice("splash")
  return Choice(_portable_form(device, query, key))


def _portable_form(device: Device, query, key) -> str:
  keys, entries = key.shape[1], query.shape[1] * key.shape[1]
  if not device.loops_over_images:
    return "einsum" if entries <= tuning.MAX_MAP_ENTRIES else "tiled"
  if entries < tuning.FEW_ENTRIES:
    return "einsum"
  return "images" if entries < tuning.MANY_ENTRIES and keys < tuning.MANY_KEYS else "tiled"


def masked_dense(call, rescore=None) -> str:
  """Why a block layout is masked dense attention, of which all scores are formed; empty: it is not.
  """
  if rescore is None and call.keep_mask is None:
    return ""
  return "block layout computed as masked dense attention: " + (
      "a keep mask adds its epsilon to all scores" if rescore is None else
      "a filter over scores needs all of them")


def for_layout(device: Device, layout, query, key, value, requested: str | None = None) -> Choice:
  """The form for a block layout and nothing besides."""
  if requested == "plain":
    return Choice("block_sparse_plain")
  if device.loops_over_images:
    return Choice("block_sparse_cpu")
  if requested is not None:   # `count` does: it counts what all devices compute
    return Choice("block_sparse_gather", f"no kernel: {requested!r} was asked for")
  why = kernels.refusal(device, *layout.block_shapes(query, key, value), layout.chosen)
  return Choice("block_sparse_gather", why) if why else Choice("block_sparse_kernel")


def refusal(form: str | None, device: Device, dtype, width: int) -> str:
  """Why a vendor's form does not compute such attention; empty: it does, or it is none of these."""
  if form == "splash" and device.platform != "tpu":
    return f"runs on TPUs, not on a {device.platform}"
  if form == "cudnn" and device.platform != "gpu":
    return f"runs on NVIDIA GPUs, not on a {device.platform}"
  most = 256 if device.hopper else 128
  if form == "cudnn" and (jnp.dtype(dtype).itemsize != 2 or width > most):
    return f"takes 16 bits and up to {most} channels, not {jnp.dtype(dtype)} and {width}"
  return ""
