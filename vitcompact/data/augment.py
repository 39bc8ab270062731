"""Augmentation of one image on the host, with PIL and a numpy Generator: uint8 in, uint8 out.

The order of DeiT's recipe is: random resized crop, flip and RandAugment (`randaugment.py`), here;
then normalising, random erasing and mixing of a batch, on the device (`batch.py`). `IMAGES` lists
the values of `data.augment`, except LV-ViT's, which transforms an image and its label map together
and is in `labels.py`.
"""
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vitcompact.data.randaugment import randaugment

BICUBIC = Image.Resampling.BICUBIC
CROP_MODES = ("center", "squash", "border")   # timm's names
SMALL = 32         # pixels: up to this size, images of the model's own size are not cropped
MUCH_LARGER = 64   # an image is not resized as a whole to more than 64 times the needed pixels


def evaluation(image: Image.Image, image_size: tuple[int, int], crop: float | None,
               interpolation: str, crop_mode: str = "center", fill=0) -> Image.Image:
  """Resizes, then takes the central crop of image_size = (height, width); equals timm exactly.

  crop_mode: how the image is resized to image_size / crop (rounded down). "center": until its
  shorter side fits, or if image_size is not square, until it just covers both sides; "squash": to
  both sides, changing the aspect ratio; "border": until the whole image fits, with `fill` (a colour
  of the image's mode) around it. crop=None is "squash" without a crop. Sizes and offsets are
  rounded like timm's.

  There are two exceptions. An image of up to 32 pixels that has the model's size is not cropped, as
  published for CIFAR. For an image that "center" would make more than 64 times as long as wide,
  only the crop is computed, the same to within rounding: resizing all of 6000 x 1 pixels would take
  a gigabyte.
  """
  if image.size == image_size[::-1] and max(image_size) <= SMALL:
    return image
  resample = Image.Resampling[interpolation.upper()]
  if crop is None:
    crop, crop_mode = 1.0, "squash"
  check_crop(crop)
  check_crop_mode(crop_mode)
  height, width = image_size
  need = int(height / crop), int(width / crop)
  new_w, new_h = _resized_size(image.size, need, crop_mode)
  left, top = round((new_w - width) / 2), round((new_h - height) / 2)
  box = left, top, left + width, top + height
  if new_w * new_h > MUCH_LARGER * need[0] * need[1]:
    return _resized_part(image, (new_w, new_h), box, resample)
  image = image.resize((new_w, new_h), resample)
  if crop_mode == "border":
    return _padded_crop(image, image_size, fill)
  return image.crop(box)


def _resized_size(size: tuple[int, int], need: tuple[int, int], crop_mode: str) -> tuple[int, int]:
  """(width, height) to resize an image of `size` = (width, height) to; need = (height, width).

  Rounded down for a square and to the nearest for other sizes, as in timm's two functions.
  """
  (w, h), (need_h, need_w) = size, need
  if crop_mode == "squash":
    return need_w, need_h
  if crop_mode == "center" and need_h == need_w:
    return (need_w, int(need_h * h / w)) if w <= h else (int(need_w * w / h), need_h)
  choose = min if crop_mode == "center" else max
  ratio = choose(h / need_h, w / need_w)
  return max(1, round(w / ratio)), max(1, round(h / ratio))


def _padded_crop(image: Image.Image, image_size: tuple[int, int], fill) -> Image.Image:
  """The central crop of image_size = (height, width), padded with `fill` if the image is smaller.
  """
  height, width = image_size
  canvas = Image.new(image.mode, (max(width, image.width), max(height, image.height)), fill)
  canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
  left, top = round((canvas.width - width) / 2), round((canvas.height - height) / 2)
  return canvas.crop((left, top, left + width, top + height))


def _resized_part(image: Image.Image, size: tuple[int, int], part, resample) -> Image.Image:
  """Only `part` (left, top, right, bottom) of the image resized to `size`."""
  left, top, right, bottom = part
  x, y = image.width / size[0], image.height / size[1]
  # Pillow stores a box in float32, too coarse far from the corner: so a neighbourhood is cropped
  # first, as large as the widest filter needs.
  reach_x, reach_y = (math.ceil(4 * max(1, scale)) for scale in (x, y))
  first_x, first_y = (max(0, math.floor(left * x) - reach_x), max(0, math.floor(top * y) - reach_y))
  near = image.crop((first_x, first_y, min(image.width, math.ceil(right * x) + reach_x),
                     min(image.height, math.ceil(bottom * y) + reach_y)))
  box = (left * x - first_x, top * y - first_y, min(right * x - first_x, near.width),
         min(bottom * y - first_y, near.height))
  return near.resize((right - left, bottom - top), resample, box)


def check_crop(crop: float | None) -> None:
  """Raises ValueError for a crop ratio that is not in (0, 1]: above 1, there would be borders."""
  if crop is not None and not 0 < crop <= 1:
    raise ValueError(f"{crop=} must be above 0 and at most 1: the share of the resized image that "
                     "is kept (0.875 resizes to 256 for 224)")


def check_crop_mode(crop_mode: str) -> None:
  if crop_mode not in CROP_MODES:
    raise ValueError(f"{crop_mode=} must be one of {', '.join(CROP_MODES)}")


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
  """A random (left, top, right, bottom): 8-100 % of the area, aspect 3/4 to 4/3, ten attempts.

  If none of them fits into the image: the largest central box of the nearest allowed aspect.
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
  """The box, resized to image_size = (height, width); pixels outside the box have no influence."""
  return image.crop(box).resize(image_size[::-1], resample)


def pad_crop(image: Image.Image, rng: np.random.Generator, pixels: int = 4) -> Image.Image:
  """Shifts by up to `pixels` in each direction; the uncovered margin is black."""
  left, top = (int(shift) for shift in rng.integers(-pixels, pixels + 1, size=2))
  return image.crop((left, top, left + image.width, top + image.height))


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Mirrors left and right, with probability 1/2."""
  return ImageOps.mirror(image) if rng.random() < 0.5 else image


def small_affine(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Rotates by up to 12 degrees, scales by 0.9 to 1.1, shifts by up to 8 %, and pads with black.

  Small enough to preserve the label of a digit: no flip, and a 6 does not become a 9.
  """
  w, h = image.size
  angle, scale = math.radians(rng.uniform(-12, 12)), rng.uniform(0.9, 1.1)
  shift_x, shift_y = rng.uniform(-0.08, 0.08, size=2) * (w, h)
  cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
  # PIL maps output to input. The centre of the image moves to the centre plus the shift.
  matrix = (cos, sin, w / 2 - cos * (w / 2 + shift_x) - sin * (h / 2 + shift_y),
            -sin, cos, h / 2 + sin * (w / 2 + shift_x) - cos * (h / 2 + shift_y))
  return image.transform((w, h), Image.Transform.AFFINE, matrix, resample=BICUBIC)


def colour_jitter(image: Image.Image, rng: np.random.Generator,
                  strength: float = 0.3) -> Image.Image:
  """Changes brightness, contrast and saturation by factors of 1 +- strength, in random order.

  No published recipe here uses it: DeiT's asks for 0.3, but RandAugment switches it off.
  """
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for i in rng.permutation(len(enhancers)):
    image = enhancers[i](image).enhance(rng.uniform(1 - strength, 1 + strength))
  return image


def _without_augmentation(image, rng, image_size):
  return image if image.size == image_size[::-1] else evaluation(image, image_size, 1.0, "bicubic")


def _flip_crop(image, rng, image_size):
  return flip(resized_crop(image, crop_box(*image.size, rng), image_size), rng)


def _pad_crop(image, rng, image_size):
  if image.size != image_size[::-1]:
    raise ValueError(f"data.augment='pad_crop' does not resize images, and one of width and height "
                     f"{image.size} came for a model of {image_size[::-1]}; set "
                     "config.model.image_size, or use 'randaugment'")
  return randaugment(flip(pad_crop(image, rng), rng), rng)


# data.augment -> (image, rng, (height, width)) -> image of that size
IMAGES = {
    "none": _without_augmentation,
    "flip": lambda image, rng, size: flip(_without_augmentation(image, rng, size), rng),
    "digits": lambda image, rng, size: small_affine(_without_augmentation(image, rng, size), rng),
    "flip_crop": _flip_crop,
    "colour_jitter": lambda image, rng, size: colour_jitter(_flip_crop(image, rng, size), rng),
    "randaugment": lambda image, rng, size: randaugment(_flip_crop(image, rng, size), rng),
    "pad_crop": _pad_crop,
}
