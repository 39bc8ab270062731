"""RandAugment `rand-m9-mstd0.5-inc1`: two of fifteen operations, each with probability 1/2.

This is timm's augmentation as used by DeiT's recipe: magnitude 9 of 10 with Gaussian noise of
standard deviation 0.5, and the set of operations whose strength increases with the magnitude.
"""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAGNITUDE, MAGNITUDE_STD, OPS_PER_IMAGE, PROBABILITY = 9.0, 0.5, 2, 0.5
BICUBIC = Image.Resampling.BICUBIC
FILL = (124, 116, 104)  # round(255 * ImageNet's mean): the colour outside the image


def rotate(degrees, width, height):
  """Rotation about the centre, counter-clockwise. Rounded like Pillow's own."""
  angle = -math.radians(degrees)
  cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
  x, y = width / 2, height / 2
  return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def shear_x(factor, width, height):
  return 1, factor, 0, 0, 1, 0


def shear_y(factor, width, height):
  return 1, 0, 0, factor, 1, 0


def translate_x(fraction, width, height):
  return 1, 0, fraction * width, 0, 1, 0


def translate_y(fraction, width, height):
  return 1, 0, 0, 0, 1, fraction * height


def solarize_add(image, add):
  """Adds `add` to dark values (below 128)."""
  return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


def posterize(image, bits):
  """Keeps the top bits. ImageOps.posterize is not used: since Pillow 13 it refuses 0 bits."""
  return image.point([v & ~(2 ** (8 - bits) - 1) for v in range(256)] * 3)


def posterize_bits(m):
  """The number of bits kept. For m = 10 it is 0, a black image, as in the published recipe."""
  return 4 - int(m / 10 * 4)


def solarize_threshold(m):
  return 256 - int(m / 10 * 256)


class Op(NamedTuple):
  """An operation that changes colours or moves pixels: one of `colours` and `matrix` is None."""
  argument: callable     # magnitude in 0..10 -> argument; rounded like timm's, m / 10 first
  colours: callable = None   # (image, argument) -> image
  matrix: callable = None    # (argument, width, height) -> (a, b, c, d, e, f), see `move`
  signed: bool = False   # whether the magnitude is negated with probability 1/2


def _enhance(enhancer) -> Op:
  return Op(lambda m: max(0.1, 1 + m / 10 * 0.9), signed=True,
            colours=lambda image, factor: enhancer(image).enhance(factor))


OPS = {
    "auto_contrast": Op(lambda m: None, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": Op(lambda m: None, lambda image, _: ImageOps.equalize(image)),
    "invert": Op(lambda m: None, lambda image, _: ImageOps.invert(image)),
    "rotate": Op(lambda m: m / 10 * 30, matrix=rotate, signed=True),
    "posterize": Op(posterize_bits, posterize),
    "solarize": Op(solarize_threshold, ImageOps.solarize),
    "solarize_add": Op(lambda m: int(m / 10 * 110), solarize_add),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": Op(lambda m: m / 10 * 0.3, matrix=shear_x, signed=True),
    "shear_y": Op(lambda m: m / 10 * 0.3, matrix=shear_y, signed=True),
    "translate_x": Op(lambda m: m / 10 * 0.45, matrix=translate_x, signed=True),
    "translate_y": Op(lambda m: m / 10 * 0.45, matrix=translate_y, signed=True),
}
NAMES = tuple(OPS)


def draw(rng: np.random.Generator) -> list[tuple[str, float]]:
  """The operations for one image, in order, with their magnitudes, some of them negative."""
  drawn = []
  for name in rng.choice(NAMES, OPS_PER_IMAGE):
    if rng.random() < PROBABILITY:
      m = float(np.clip(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0, 10))
      drawn.append((str(name), -m if OPS[name].signed and rng.random() < 0.5 else m))
  return drawn


def move(image: Image.Image, matrix, resample) -> Image.Image:
  """Affine transform by (a, b, c, d, e, f): pixel (x, y) comes from (ax + by + c, dx + ey + f)."""
  return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample,
                         fillcolor=FILL)


def apply(name: str, argument, image: Image.Image, resample=BICUBIC) -> Image.Image:
  """Applies one operation with its argument (degrees, bits, a factor, ...)."""
  op = OPS[name]
  if op.matrix:
    return move(image, op.matrix(argument, *image.size), resample)
  return op.colours(image, argument)


def randaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  for name, m in draw(rng):
    image = apply(name, OPS[name].argument(m), image)
  return image
