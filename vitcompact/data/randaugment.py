"""RandAugment `rand-m9-mstd0.5-inc1`: two of fifteen operations, each applied half of the time.

Source: the augmentation of timm as DeiT's recipe calls it: magnitude 9 of 10 with Gaussian noise
of standard deviation 0.5, the set of operations whose strength increases with the magnitude.
"""
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAGNITUDE, MAGNITUDE_STD, OPS_PER_IMAGE, PROBABILITY = 9.0, 0.5, 2, 0.5
FILL = (124, 116, 104)  # round(255 * ImageNet's mean): what is pulled in from outside the image


def _affine(image, matrix):
  """matrix (a, b, c, d, e, f): the pixel at (x, y) comes from (ax + by + c, dx + ey + f)."""
  return image.transform(image.size, Image.Transform.AFFINE, matrix,
                         resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def rotate(image, degrees):
  return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def shear_x(image, factor):
  return _affine(image, (1, factor, 0, 0, 1, 0))


def shear_y(image, factor):
  return _affine(image, (1, 0, 0, factor, 1, 0))


def translate_x(image, fraction):
  return _affine(image, (1, 0, fraction * image.width, 0, 1, 0))


def translate_y(image, fraction):
  return _affine(image, (1, 0, 0, 0, 1, fraction * image.height))


def solarize_add(image, add):
  """Dark values (below 128) become lighter by `add`."""
  return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


def posterize(image, bits):
  """Keeps the top bits. Not ImageOps.posterize, which since Pillow 13 refuses 0 bits."""
  return image.point([v & ~(2 ** (8 - bits) - 1) for v in range(256)] * 3)


def posterize_bits(m):
  """Bits that are kept: at m = 10 none, which is a black image, in the published recipe too."""
  return 4 - int(0.4 * m)


def solarize_threshold(m):
  return 256 - int(25.6 * m)


class Op(NamedTuple):
  apply: callable        # (image, argument) -> image
  argument: callable     # magnitude in 0..10 -> argument
  signed: bool = False   # whether the magnitude is negated half of the time


def _enhance(enhancer) -> Op:
  return Op(lambda image, factor: enhancer(image).enhance(factor),
            lambda m: max(0.1, 1 + 0.09 * m), signed=True)


OPS = {
    "auto_contrast": Op(lambda image, _: ImageOps.autocontrast(image), lambda m: None),
    "equalize": Op(lambda image, _: ImageOps.equalize(image), lambda m: None),
    "invert": Op(lambda image, _: ImageOps.invert(image), lambda m: None),
    "rotate": Op(rotate, lambda m: 3 * m, signed=True),
    "posterize": Op(posterize, posterize_bits),
    "solarize": Op(ImageOps.solarize, solarize_threshold),
    "solarize_add": Op(solarize_add, lambda m: int(11 * m)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": Op(shear_x, lambda m: 0.03 * m, signed=True),
    "shear_y": Op(shear_y, lambda m: 0.03 * m, signed=True),
    "translate_x": Op(translate_x, lambda m: 0.045 * m, signed=True),
    "translate_y": Op(translate_y, lambda m: 0.045 * m, signed=True),
}
NAMES = tuple(OPS)


def draw(rng: np.random.Generator) -> list[tuple[str, float]]:
  """The operations for one image, in order, with their magnitudes (negative: the other way)."""
  drawn = []
  for name in rng.choice(NAMES, OPS_PER_IMAGE):
    if rng.random() < PROBABILITY:
      m = float(np.clip(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0, 10))
      drawn.append((str(name), -m if OPS[name].signed and rng.random() < 0.5 else m))
  return drawn


def randaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  for name, m in draw(rng):
    image = OPS[name].apply(image, OPS[name].argument(m))
  return image
