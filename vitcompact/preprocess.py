"""preprocess: how a named model's evaluation prepares an image."""
import dataclasses

import flax.linen as nn
import numpy as np
from PIL import Image

from vitcompact.data import augment
from vitcompact.models import variant_of


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resize, central crop, normalise. Call it with a PIL image or a uint8 array (H, W, 3).

  mean, std: of RGB in [0, 1]; crop: share of the resized image's shorter side that the crop keeps,
  None: the whole image is warped, its aspect ratio lost; interpolation: PIL's name, antialiased;
  image_size: (height, width) of the result.
  """
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  crop: float | None
  interpolation: str
  image_size: tuple[int, int]

  def __call__(self, image) -> np.ndarray:
    """Returns float32 (height, width, 3), ready to be batched for `model.apply`."""
    if not isinstance(image, Image.Image):
      image = np.asarray(image)
      if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image must be a PIL image or a uint8 array (H, W, 3), got "
                         f"{image.dtype} {image.shape}")
      image = Image.fromarray(image)
    image = augment.evaluation(image.convert("RGB"), self.image_size, self.crop,
                               self.interpolation)
    pixels = np.asarray(image, np.float32) / 255
    return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def preprocess(model: nn.Module) -> Preprocess:
  """The evaluation of the named model (timm's where timm has the model), at `model.image_size`."""
  row = variant_of(model.variant)
  size = tuple(np.broadcast_to(model.image_size, 2).tolist())
  crop = row.crop_384 if row.crop_384 and min(size) >= 384 else row.crop
  return Preprocess(row.mean, row.std, crop, row.interpolation, size)
