"""Chooses the form that computes a call of attention, given the device and the call."""
from typing import NamedTuple

import jax.numpy as jnp

from vitcompact import kernels
from vitcompact.attention import tuning, vendor
from vitcompact.attention.device import Device


class Choice(NamedTuple):
  """The name of a form, and a note for the receipt, if there is one."""
  form: str
  note: str = ""

  @property
  def block_sparse(self) -> bool:
    return self.form.startswith("block_sparse")


def choose(device: Device, call, query, key, value, rescore=None, requested: str | None = None):
  """Chooses the form for a `Core` and its arrays (or `jax.ShapeDtypeStruct`s), after `spread`.

  Returns a Choice of
    "einsum": all scores at once; "plain": the same, in the pattern that other runtimes recognise;
    "images": one image after another; "tiled": tiles of queries, with memory linear in the number
    of tokens; "cudnn"; "splash"; "tokamax". "plain" and "tokamax" are used only on request.
    For a block layout: "block_sparse_cpu", "block_sparse_kernel", "block_sparse_gather" or
    "block_sparse_plain".
  Raises ValueError if the requested form cannot run.
  """
  if call.layout is not None and not (note := masked_dense(call, rescore)):
    return for_layout(device, call.layout, query, key, value, requested)
  if not call.is_plain(rescore):
    note = "" if call.layout is None else note
    requested = "tiled" if requested in vendor.FORMS else requested
    return Choice(requested or _portable_form(device, query, key), note)
  width = vendor.channels(query.shape[-1], value.shape[-1], call.size is not None)
  if why := refusal(requested, device, value.dtype, width):
    raise ValueError(f"attention form {requested!r} {why}; request another form, or none (in an "
                     "Execution, attention={}) to let the library choose")
  if requested is not None:
    return Choice(requested)
  if not device.loops_over_images:
    if not refusal("cudnn", device, value.dtype, width):
      return Choice("cudnn")
    # XLA cannot split the splash kernel over several TPUs.
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
  """Returns why a block layout must be computed as masked dense attention, with all scores; empty
  if it need not be."""
  if rescore is None and call.keep_mask is None:
    return ""
  return "block layout computed as masked dense attention: " + (
      "a keep mask adds its epsilon to all scores" if rescore is None else
      "a filter over scores needs all of them")


def for_layout(device: Device, layout, query, key, value, requested: str | None = None) -> Choice:
  """Chooses the form for a block layout without a keep mask or a filter over scores."""
  if requested == "plain":
    return Choice("block_sparse_plain")
  if device.loops_over_images:
    return Choice("block_sparse_cpu")
  if requested is not None:   # as `count` does, to count what every device can compute
    return Choice("block_sparse_gather", f"no kernel: {requested!r} was requested")
  why = kernels.refusal(device, *layout.block_shapes(query, key, value), layout.chosen)
  return Choice("block_sparse_gather", why) if why else Choice("block_sparse_kernel")


def refusal(form: str | None, device: Device, dtype, width: int) -> str:
  """Returns why a vendor's form cannot compute attention with this dtype and width; empty if it
  can, or if the form is not a vendor's."""
  if form == "splash" and device.platform != "tpu":
    return f"runs on TPUs, not on a {device.platform}"
  if form == "cudnn" and device.platform != "gpu":
    return f"runs on NVIDIA GPUs, not on a {device.platform}"
  most = 256 if device.hopper else 128
  if form == "cudnn" and (jnp.dtype(dtype).itemsize != 2 or width > most):
    return f"takes 16 bits and up to {most} channels, not {jnp.dtype(dtype)} and {width}"
  return ""
