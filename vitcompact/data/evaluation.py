"""How images are prepared for a model, the same in evaluation, calibration and serving."""
import dataclasses
import os

import numpy as np
from PIL import Image

from vitcompact.data import augment, decode


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resize, central crop, normalise. Call it with the path of an image, with a PIL image, or with a
  uint8 array (H, W, 3) or (H, W).

  mean, std: of RGB in [0, 1], or of grey for a model of one channel; crop: share of the resized
  image that the crop keeps, None: the whole image is warped to the size; interpolation: PIL's name,
  antialiased; image_size: (height, width) of the result; crop_mode: timm's "center", "squash" or
  "border", see `augment.evaluation`; exif_transpose: whether to rotate a file according to its EXIF
  data, which neither timm nor training does.
  """
  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop: float | None
  interpolation: str
  image_size: tuple[int, int]
  crop_mode: str = "center"
  exif_transpose: bool = False

  def __post_init__(self):
    augment.check_crop(self.crop)
    augment.check_crop_mode(self.crop_mode)

  def __call__(self, image) -> np.ndarray:
    """Returns float32 (height, width, 3 or 1), ready to be batched for `model.apply`."""
    return self.normalise(self.resize(image))

  def resize(self, image) -> np.ndarray:
    """Returns uint8 (height, width, 3 or 1): the decoded, resized and cropped image."""
    channels = len(self.mean)
    if channels not in (1, 3):
      raise ValueError(f"a model with {channels} channels cannot take image files, which have 1 or "
                       "3: scale and normalise its arrays yourself")
    image = _decode(image, self.exif_transpose)
    fill = tuple(round(255 * value) for value in self.mean)
    if channels == 1:
      image, fill = image.convert("L"), fill[0]
    image = augment.evaluation(image, self.image_size, self.crop, self.interpolation,
                               self.crop_mode, fill)
    return np.asarray(image).reshape(*self.image_size, channels)

  def normalise(self, pixels) -> np.ndarray:
    """uint8 (..., C) -> float32 (..., C): (pixels / 255 - mean) / std."""
    shares = np.asarray(pixels, np.float32) / 255
    return (shares - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

  def pixels(self, normalised) -> np.ndarray:
    """Inverts the normalisation: values in [0, 1]."""
    return np.clip(normalised * np.asarray(self.std) + np.asarray(self.mean), 0, 1)


def _decode(image, exif_transpose: bool) -> Image.Image:
  """Decodes a path, a PIL image or an array to an RGB image."""
  name, hint = "the image", "check the file"
  if isinstance(image, str | os.PathLike):
    return decode.rgb(image, decode.printable(os.fspath(image)), hint, exif_transpose)
  if isinstance(image, Image.Image):
    name = decode.printable(str(getattr(image, "filename", "")) or name)
    return decode.rgb(image, name, hint, exif_transpose)
  image = np.asarray(image)
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)) or not image.size:
    raise ValueError(f"an image must be a path, a PIL image, or a uint8 array (H, W, 3), got "
                     f"{image.dtype} {image.shape}: scale its pixels to 0..255 (16 bits: // 256), "
                     "its channels to red, green and blue, and give one image at a time")
  return decode.rgb(Image.fromarray(image), name, hint)
