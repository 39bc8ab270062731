"""The device that a program is for, and the requested form of attention.

Both are read while a call is traced, and are part of the cache keys of `jax.jit`: a function
compiled for one device or form is traced again for another.
"""
from typing import NamedTuple

import jax

FORMS = ("einsum", "images", "tiled", "plain", "cudnn", "splash", "tokamax")
_device = jax.make_user_context(None)
_requested = jax.make_user_context(None)


class Device(NamedTuple):
  """platform: "cpu", "gpu" or "tpu". count: number of devices. capability: of an NVIDIA GPU, "9.0"
  for Hopper. split: whether the images of a batch are split over several devices."""
  platform: str
  count: int = 1
  capability: str = ""
  split: bool = False

  @property
  def hopper(self) -> bool:
    """Whether it is a Hopper GPU or a later one."""
    major = self.capability.split(".")[0]
    return major.isdecimal() and int(major) >= 9

  @property
  def loops_over_images(self) -> bool:
    """Whether to compute one image after another, which fits the cache of a CPU. Not if images are
    split over devices: a loop cannot be split, so each device would run all of it."""
    return self.platform == "cpu" and not self.split


def current() -> Device:
  """Returns the device that the program being traced is for."""
  if _device.value is not None:
    return _device.value
  capability = getattr(jax.devices()[0], "compute_capability", "")
  return Device(jax.default_backend(), jax.device_count(), str(capability))


def on(device: Device):
  """Returns a context in which programs are traced for this device, whether it is present or not.
  """
  return _device(device)


def split_over(devices: int):
  """Returns a context in which the images of a batch are split over this many devices."""
  return on(current()._replace(split=devices > 1))


def using(form: str | None):
  """Returns a context in which attention is computed in this form; None: the form that fits best.

  Only "einsum" has forward-mode derivatives. Vendors' forms do not support masks, dropped tokens or
  filters over scores, which fall back to "tiled". A block layout has its own forms: any requested
  form only disables its kernels. "plain" is for graphs that other runtimes execute: it has no
  loops, and products and a softmax in the pattern that their compilers recognise.
  """
  if form is not None and form not in FORMS:
    raise ValueError(f"attention form {form!r}: must be one of {', '.join(FORMS)}, or None")
  return _requested(form)


def requested_form() -> str | None:
  """Returns the requested form, or None."""
  return _requested.value
