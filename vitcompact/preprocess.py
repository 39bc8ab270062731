"""preprocess: how a named model's evaluation prepares an image.

Files are decoded as in training (`data.decode`): 16-bit grey keeps its upper 8 bits, transparency
is dropped, of several frames the first counts, and an orientation in the EXIF data is not applied
(but Pillow itself turns a TIFF).
"""
import dataclasses
import json
import os

import flax.linen as nn
import numpy as np
from PIL import Image

from vitcompact import convert, files
from vitcompact.data import augment, decode
from vitcompact.doors import check_model
from vitcompact.models import variant_of


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resize, central crop, normalise. Call it with the path of an image, with a PIL image, or with a
  uint8 array (H, W, 3) or (H, W).

  mean, std: of RGB in [0, 1], or of grey for a model of one channel; crop: share of the resized
  image's shorter side that the crop keeps, None: the whole image is warped, its aspect ratio lost;
  interpolation: PIL's name, antialiased; image_size: (height, width) of the result.
  """
  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop: float | None
  interpolation: str
  image_size: tuple[int, int]

  def __post_init__(self):
    augment.check_crop(self.crop)

  def __call__(self, image) -> np.ndarray:
    """Returns float32 (height, width, 3 or 1), ready to be batched for `model.apply`."""
    channels = len(self.mean)
    if channels not in (1, 3):
      raise ValueError(f"a model of {channels} channels takes no image files, which have 1 or 3: "
                       "scale and normalise its arrays yourself")
    image = _opened(image)
    if channels == 1:
      image = image.convert("L")
    image = augment.evaluation(image, self.image_size, self.crop, self.interpolation)
    pixels = np.asarray(image, np.float32).reshape(*self.image_size, channels) / 255
    return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

  def pixels(self, normalised) -> np.ndarray:
    """The inverse of the normalisation: values in [0, 1]."""
    return np.clip(normalised * np.asarray(self.std) + np.asarray(self.mean), 0, 1)


def _opened(image) -> Image.Image:
  """RGB, of whatever stands for an image."""
  name, way_out = "the image", "check the file"
  if isinstance(image, str | os.PathLike):
    return decode.rgb(image, decode.printable(os.fspath(image)), way_out)
  if isinstance(image, Image.Image):
    return decode.rgb(image, decode.printable(getattr(image, "filename", "") or name), way_out)
  image = np.asarray(image)
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)) or not image.size:
    raise ValueError(f"an image must be a path, a PIL image, or a uint8 array (H, W, 3), got "
                     f"{image.dtype} {image.shape}: scale its pixels to 0..255 (16 bits: // 256), "
                     "its channels to red, green and blue, and give one image at a time")
  return decode.rgb(Image.fromarray(image), name, way_out)


def preprocess(model: nn.Module | str | os.PathLike) -> Preprocess:
  """The evaluation of the named model (timm's where timm has the model), at `model.image_size`; or,
  given the path of a file of ours, that of the run that wrote it, whose crop may be another. Other
  names of weights, such as "hf-hub:org/name" or a folder, are taken as by `pretrained`.

  A model of another number of channels than three is normalised by the mean of mean and of std in
  each, as in timm; one of a single channel is shown images in grey.
  """
  if isinstance(model, str | os.PathLike):
    if not os.fspath(model).endswith(".safetensors"):
      from vitcompact.hub import as_file  # which imports this module

      model = as_file(model)
    return _of_file(model)
  check_model(model)
  row = variant_of(model.variant)
  size = tuple(np.broadcast_to(model.image_size, 2).tolist())
  crop = row.crop_384 if row.crop_384 and min(size) >= 384 else row.crop
  mean, std = row.mean, row.std
  if model.in_chans != len(mean):
    mean, std = ((sum(values) / len(values),) * model.in_chans for values in (mean, std))
  return Preprocess(mean, std, crop, row.interpolation, size)


def _of_file(path) -> Preprocess:
  """As `preprocess`; files of before do not tell a crop, and have their model's."""
  pre, about = preprocess(convert.read_model(path)), convert.read_metadata(path)
  if "pixels" in about:   # weights of others may have been trained on other means than the model's
    try:
      told = json.loads(about["pixels"])
      mean, std = (tuple(map(float, told[name])) for name in ("mean", "std"))
      pre = dataclasses.replace(pre, **{**told, "mean": mean, "std": std})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
      raise ValueError(f"{path}: its metadata tells no mean and std ({error!r}); make the file "
                       "again") from None
  return dataclasses.replace(pre, crop=files.crop_in(path, about)) if "crop" in about else pre
