"""From the bytes of an image file to RGB, or the news which record is bad and why.

What is taken as it is: greyscale, palette and CMYK (ImageNet has some), a PNG that is called .jpg.
An animation is its first frame. 16-bit grey keeps its upper 8 bits; Pillow's own conversion would
make nearly all of it white. What is refused: files that end early or hold no image, and modes
whose range is not known. A JPEG with a flipped bit usually decodes, in Pillow as elsewhere; the
check sums of ArrayRecord notice it.
"""
from typing import NamedTuple

import numpy as np
from PIL import Image


class BadRecord(ValueError):
  """A record that cannot be used. The text names it; `data.on_bad` says what then happens."""


class Example(NamedTuple):
  """What a source opens: an RGB image, the number of its class, and LV-ViT's labels of places."""
  image: Image.Image
  label: int
  label_map: np.ndarray | None = None  # float16 (2, 5, 18, 18), see labels.py


def as_arrays(example: Example) -> dict:
  """{"image": uint8 (h, w, 3), "label": int}."""
  return {"image": np.asarray(example.image), "label": example.label}


def rgb(file, name: str) -> Image.Image:
  """Decodes a path or a file object, whole. BadRecord (with `name`) where that cannot be."""
  try:
    with Image.open(file) as image:
      if image.mode == "RGB":
        image.load()
        return image
      if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
      if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers of mode {image.mode}, whose range is not known")
      return image.convert("RGB")
  except Exception as error:  # there is no list of what a damaged file makes Pillow raise
    raise BadRecord(f"cannot read {name}: {error}; replace or delete it, or pass over some with "
                    "data.on_bad='skip'") from error


def check_label(label: int, num_classes: int, name: str) -> int:
  """The label, if it is the number of a class; else a BadRecord."""
  if not 0 <= label < num_classes:
    raise BadRecord(f"cannot use {name}: its label {label} is not in 0..{num_classes - 1}; correct "
                    "or delete it, or pass over some with data.on_bad='skip'")
  return int(label)
