"""Where a program will run, and which form of attention was asked for.

Read once a call, while it is traced, and part of the cache keys of `jax.jit`: a function compiled
for one device or form is traced again for another.
"""
from typing import NamedTuple

import jax

FORMS = ("einsum", "images", "tiled", "plain", "cudnn", "splash", "tokamax")
_device = jax.make_user_context(None)
_requested = jax.make_user_context(None)


class Device(NamedTuple):
  """platform: "cpu", "gpu" or "tpu". count: how many there are. capability: of an NVIDIA GPU, "9.0"
  for Hopper. split: whether the images of a batch lie on several devices."""
  platform: str
  count: int = 1
  capability: str = ""
  split: bool = False

  @property
  def hopper(self) -> bool:
    """A GPU of that generation or a later one."""
    major = self.capability.split(".")[0]
    return major.isdecimal() and int(major) >= 9

  @property
  def loops_over_images(self) -> bool:
    """Whether images are computed one after another, which fits the cache of a CPU. Not where they
    are split over devices: a loop cannot be, and each device would run all of it."""
    return self.platform == "cpu" and not self.split


def current() -> Device:
  """The device that the program being traced is for."""
  if _device.value is not None:
    return _device.value
  capability = getattr(jax.devices()[0], "compute_capability", "")
  return Device(jax.default_backend(), jax.device_count(), str(capability))


def on(device: Device):
  """A context in which programs are traced for this device, present or not."""
  return _device(device)


def split_over(devices: int):
  """A context in which the images of a batch lie on this many devices."""
  return on(current()._replace(split=devices > 1))


def using(form: str | None):
  """A context in which attention is computed in this form; None: in the one that fits best.

  Only "einsum" has derivatives by forward mode. Vendors' forms know no masks, dropped tokens or
  filters over scores, which are left to "tiled". A block layout has forms of its own: asking for
  any form leaves out its kernels only. "plain" is for graphs that others run: no loops, and
  products around a softmax that their compilers recognise.
  """
  if form is not None and form not in FORMS:
    raise ValueError(f"attention form {form!r}: must be one of {', '.join(FORMS)}, or None")
  return _requested(form)


def requested_form() -> str | None:
  """The form that was asked for, if any."""
  return _requested.value
