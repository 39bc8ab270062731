"""What happens to one image on the host: PIL and a numpy Generator, uint8 in and uint8 out.

The DeiT recipe's order is: random resized crop, flip, RandAugment (`randaugment.py`), all here;
then normalising, random erasing and mixing per batch on the device (`batch.py`). `IMAGES` names the
augmentations that a config may ask for; LV-ViT's, which labels of places go through with their
image, is in `labels.py`.
"""
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vitcompact.data.randaugment import randaugment

BICUBIC = Image.Resampling.BICUBIC
SMALL = 32         # pixels: images of a model's own size up to this are not cut in evaluation
MUCH_LARGER = 64   # times the pixels that are needed: more than that is not resized whole


def evaluation(image: Image.Image, image_size: tuple[int, int], crop: float | None,
               interpolation: str) -> Image.Image:
  """Resizes to image_size / crop on the shorter side, then cuts image_size out of the centre.

  image_size: (height, width). The longer side is int(short * long / short), and offsets are
  rounded half to even, as the authors' pipeline does. If image_size is not square, the image is
  made just large enough to cover both sides. crop=None: the whole image is warped to image_size.
  An image of up to 32 pixels that has the model's size is left whole, as published for CIFAR.

  Of an image more than 64 times as long as wide only what is kept is computed, the same to within
  rounding: resized whole, 6000 x 1 pixels would take a gigabyte.
  """
  if image.size == image_size[::-1] and max(image_size) <= SMALL:
    return image
  resample = Image.Resampling[interpolation.upper()]
  if crop is None:
    return image.resize(image_size[::-1], resample)
  check_crop(crop)
  height, width = image_size
  need_h, need_w = int(height / crop), int(width / crop)
  w, h = image.size
  if h * need_w <= w * need_h:
    new_h, new_w = need_h, int(need_h * w / h)
  else:
    new_h, new_w = int(need_w * h / w), need_w
  left, top = round((new_w - width) / 2), round((new_h - height) / 2)
  kept = left, top, left + width, top + height
  if new_w * new_h > MUCH_LARGER * need_w * need_h:
    return _resized_part(image, (new_w, new_h), kept, resample)
  return image.resize((new_w, new_h), resample).crop(kept)


def _resized_part(image: Image.Image, size: tuple[int, int], part, resample) -> Image.Image:
  """`part` (left, top, right, bottom) of the image as resized to `size`, and no more of it."""
  left, top, right, bottom = part
  x, y = image.width / size[0], image.height / size[1]
  box = left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)
  return image.resize((right - left, bottom - top), resample, box)


def check_crop(crop: float | None) -> None:
  """Refuses what would show black borders."""
  if crop is not None and not 0 < crop <= 1:
    raise ValueError(f"{crop=} must be above 0 and at most 1: the share of the resized image that "
                     "is kept (0.875 resizes to 256 for 224)")


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of 8-100 % of the area, with aspect 3/4 to 4/3; ten attempts.

  If all attempts stick out, the centre: the whole image, cut to the nearest allowed aspect.
  """
  for _ in range(10):
    area = rng.uniform(0.08, 1) * width * height
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
      return left, top, left + w, top + h
  w, h = width, height
  if width / height < 3 / 4:
    h = round(width / (3 / 4))
  elif width / height > 4 / 3:
    w = round(height * (4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def resized_crop(image: Image.Image, box, image_size: tuple[int, int],
                 resample=BICUBIC) -> Image.Image:
  """The box, resized to image_size = (height, width); no pixel from outside the box counts."""
  return image.crop(box).resize(image_size[::-1], resample)


def pad_crop(image: Image.Image, rng: np.random.Generator, pixels: int = 4) -> Image.Image:
  """Shifted by up to `pixels` in both directions, black where nothing is left."""
  left, top = (int(shift) for shift in rng.integers(-pixels, pixels + 1, size=2))
  return image.crop((left, top, left + image.width, top + image.height))


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Left and right exchanged, with probability 1/2."""
  return ImageOps.mirror(image) if rng.random() < 0.5 else image


def small_affine(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Turns by up to 12 degrees, scales by 0.9 to 1.1, shifts by up to 8 %; black from outside.

  Small enough that a digit stays the digit it was: no flip, and a 6 does not become a 9.
  """
  w, h = image.size
  angle, scale = math.radians(rng.uniform(-12, 12)), rng.uniform(0.9, 1.1)
  shift_x, shift_y = rng.uniform(-0.08, 0.08, size=2) * (w, h)
  cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
  # PIL maps output to input. The centre of the image goes to the centre plus the shift.
  matrix = (cos, sin, w / 2 - cos * (w / 2 + shift_x) - sin * (h / 2 + shift_y),
            -sin, cos, h / 2 + sin * (w / 2 + shift_x) - cos * (h / 2 + shift_y))
  return image.transform((w, h), Image.Transform.AFFINE, matrix, resample=BICUBIC)


def colour_jitter(image: Image.Image, rng: np.random.Generator,
                  strength: float = 0.3) -> Image.Image:
  """Brightness, contrast and saturation by factors of 1 +- strength, in random order.

  No published recipe here uses it: DeiT's asks for 0.3, but RandAugment switches it off.
  """
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for i in rng.permutation(len(enhancers)):
    image = enhancers[i](image).enhance(rng.uniform(1 - strength, 1 + strength))
  return image


def _as_evaluated(image, rng, image_size):
  return image if image.size == image_size[::-1] else evaluation(image, image_size, 1.0, "bicubic")


def _flip_crop(image, rng, image_size):
  return flip(resized_crop(image, crop_box(*image.size, rng), image_size), rng)


def _pad_crop(image, rng, image_size):
  if image.size != image_size[::-1]:
    raise ValueError(f"data.augment='pad_crop' takes images as they are, and one of width and "
                     f"height {image.size} came for a model of {image_size[::-1]}; set "
                     "config.model.image_size, or use 'randaugment'")
  return randaugment(flip(pad_crop(image, rng), rng), rng)


# data.augment -> (image, rng, (height, width)) -> image of that size
IMAGES = {
    "none": _as_evaluated,
    "digits": lambda image, rng, size: small_affine(_as_evaluated(image, rng, size), rng),
    "flip_crop": _flip_crop,
    "colour_jitter": lambda image, rng, size: colour_jitter(_flip_crop(image, rng, size), rng),
    "randaugment": lambda image, rng, size: randaugment(_flip_crop(image, rng, size), rng),
    "pad_crop": _pad_crop,
}
