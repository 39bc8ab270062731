"""What is exported: a function of images, with its weights, and the metadata of its file."""
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact._version import __version__
from vitcompact.attention import Device, on, using, vendor
from vitcompact.data.evaluation import Preprocess
from vitcompact.execution import Execution
from vitcompact.models.backbone import Isotropic

PORTABLE = Device("any")   # no loops over images (CPU) and no vendor kernels
INPUT, OUTPUT = "images", "logits"
KEPT = "kept"   # the second output of a program with `tokens`


@dataclasses.dataclass(frozen=True)
class Program:
  """A deployed model as a function of images.

  batch: the batch size, None: any. pixels: whether it takes uint8 pixels and normalises them
  itself, else it takes normalised float32. classes: their names, or None. tokens: whether it also
  returns float32 (B, patches): 1 where a patch still has a token of its own right after the last
  block, merged or not; only for isotropic models whose plan reduces tokens.
  """
  model: nn.Module
  variables: Any
  preprocess: Preprocess
  batch: int | None = None
  pixels: bool = False
  classes: tuple[str, ...] | None = None
  tokens: bool = False

  def __post_init__(self):
    if self.tokens and not isinstance(self.model, Isotropic):
      raise ValueError(f"tokens=True: {self.model.variant} is hierarchical, so no patch has a "
                       "token up to the end; leave tokens out")
    if self.tokens and self.model.plan.tokens is None:
      raise ValueError(f"tokens=True: plan={self.model.plan.to_json()} reduces no tokens, so every "
                       "patch survives; leave tokens out")

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.preprocess.image_size, self.model.in_chans)

  @property
  def dtype(self):
    return np.dtype(np.uint8 if self.pixels else np.float32)

  @property
  def outputs(self) -> list[str]:
    """The names of the outputs."""
    return [OUTPUT, KEPT] if self.tokens else [OUTPUT]

  def on(self, device: Device, form: str | None = None) -> Callable:
    """The function (variables, images) -> logits (B, classes) float32, traced for a device; with
    `tokens` it returns (logits, kept)."""
    mean, std = (np.asarray(x, np.float32) for x in (self.preprocess.mean, self.preprocess.std))
    mean, std = (x.reshape(1, 1, 1, -1) for x in (mean, std))
    model = self.model_on(device)

    def run(variables, images):
      with on(device), using(form):
        if self.pixels:
          images = (images.astype(jnp.float32) / 255 - mean) / std
        return self.with_kept(model, variables, images) if self.tokens else (
            model.apply(variables, images))

    return run

  def model_on(self, device: Device) -> nn.Module:
    """The model without the choices of `tune` that hold only for the device they were measured on:
    chunks and forms of attention, which would take precedence over the form requested here."""
    execution = self.model.execution
    if device.loops_over_images:
      forms = {block: form for block, form in execution.attention.items()
               if form not in vendor.FORMS}
      execution = dataclasses.replace(execution, attention=forms)
    else:
      execution = Execution(merged=execution.merged)
    return self.model.clone(execution=execution)

  def with_kept(self, model: nn.Module, variables, images):
    """(logits, kept) of normalised images."""
    logits, state = model.apply(variables, images, mutable=["tokens"])
    return logits, state["tokens"][f"keep_mask_{self.model.depth - 1}"][0]

  def normalised(self, name: str, images) -> np.ndarray:
    """Checks the normalised images that a caller passed as the argument `name`; ValueError if they
    do not fit the model."""
    images = np.asarray(images, np.float32)
    if images.shape[1:] != self.image_shape or not len(images):
      raise ValueError(f"{name}: must be normalised images of shape (n, "
                       f"{', '.join(map(str, self.image_shape))}) with n at least 1, and is an "
                       f"array of shape {images.shape}")
    return images

  def prepared(self, images) -> np.ndarray:
    """Images that `Preprocess.resize` returned, normalised if the program takes such images."""
    images = np.asarray(images)
    return images if self.pixels else self.preprocess.normalise(images)

  def logits(self, images) -> np.ndarray:
    """The model's logits for such images, computed by JAX on this machine."""
    model = self.model_on(PORTABLE).apply
    normalised = self.preprocess.normalise(images) if self.pixels else images
    return np.asarray(jax.jit(model)(self.variables, normalised))

  def about(self) -> dict[str, str]:
    """The file's metadata: the model, its plan, its classes, and how its images are prepared."""
    pre = {name: value for name, value in dataclasses.asdict(self.preprocess).items()
           if name != "exif_transpose"}
    metadata = {"vitcompact": __version__, "model": self.model.variant,
                "plan": self.model.plan.to_json(), "preprocess": json.dumps(pre),
                "input": "pixels" if self.pixels else "normalised"}
    if self.tokens:
      metadata["grid"] = json.dumps(self.model.grid)
    if self.classes is not None:
      metadata["classes"] = json.dumps(self.classes)
    return metadata
