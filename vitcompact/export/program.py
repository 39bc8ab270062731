"""What is exported: a function of images with its weights inside, and what its file tells of it."""
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact._version import __version__
from vitcompact.attention import Device, on, using
from vitcompact.data.evaluation import Preprocess

PORTABLE = Device("any")   # neither a CPU's loops nor a vendor's kernels
INPUT, OUTPUT = "images", "logits"


@dataclasses.dataclass(frozen=True)
class Program:
  """A deployed model as a function of images.

  batch: how many images it takes, None: any number. pixels: whether it takes uint8 pixels and
  normalises them itself, else normalised float32. classes: their names, or None.
  """
  model: nn.Module
  variables: Any
  preprocess: Preprocess
  batch: int | None = None
  pixels: bool = False
  classes: tuple[str, ...] | None = None

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.preprocess.image_size, self.model.in_chans)

  @property
  def dtype(self):
    return np.dtype(np.uint8 if self.pixels else np.float32)

  def on(self, device: Device, form: str | None = None) -> Callable:
    """(variables, images) -> logits (B, classes) float32, as traced for a device."""
    mean, std = (np.asarray(x, np.float32) for x in (self.preprocess.mean, self.preprocess.std))
    mean, std = (x.reshape(1, 1, 1, -1) for x in (mean, std))

    def run(variables, images):
      with on(device), using(form):
        if self.pixels:
          images = (images.astype(jnp.float32) / 255 - mean) / std
        return self.model.apply(variables, images)

    return run

  def prepared(self, images) -> np.ndarray:
    """Images, as `Preprocess.resize` gives them, in the form that the program takes."""
    images = np.asarray(images)
    return images if self.pixels else self.preprocess.normalise(images)

  def logits(self, images) -> np.ndarray:
    """What the model itself computes of such images, here."""
    model = self.model.apply
    normalised = self.preprocess.normalise(images) if self.pixels else images
    return np.asarray(jax.jit(model)(self.variables, normalised))

  def about(self) -> dict[str, str]:
    """What the file tells: the model, its plan, its classes, and how its images are prepared."""
    pre = {name: value for name, value in dataclasses.asdict(self.preprocess).items()
           if name != "exif_transpose"}
    told = {"vitcompact": __version__, "model": self.model.variant,
            "plan": self.model.plan.to_json(), "preprocess": json.dumps(pre),
            "input": "pixels" if self.pixels else "normalised"}
    if self.classes is not None:
      told["classes"] = json.dumps(self.classes)
    return told
