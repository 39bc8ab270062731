"""From an image file to RGB, or the news which record is bad and why: in training and in serving.

What is taken as it is: greyscale, palette and CMYK (ImageNet has some), a PNG that is called .jpg.
An image of several frames is its first one. 16-bit grey keeps its upper 8 bits; Pillow's own
conversion would make nearly all of it white. Transparency is dropped: a pixel has the colour that
is stored for it. An orientation in the EXIF data is not applied: the published accuracies are of
loaders that do not, and a photograph that a telephone stores on its side stays on its side. Where
that matters, turn the files (PIL.ImageOps.exif_transpose) before training and before serving. (TIFF
is the exception: Pillow itself turns it when it is read.)

What is refused: files that end early or hold no image, and modes whose range is not known. A JPEG
with a flipped bit usually decodes, in Pillow as elsewhere; the check sums of ArrayRecord notice it.
"""
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Endings of the files that Pillow reads by itself, whatever the case. Written down, so that a data
# set has the same images with each build of Pillow. Not here: what needs another program or holds
# no pixels (.eps, .ps, .wmf, .emf, .mpg), and scientific containers (.h5, .hdf, .fits, .grib).
SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".flc",
    ".fli", ".ftc", ".ftu", ".gbr", ".gif", ".icb", ".icns", ".ico", ".im", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".msp", ".pbm", ".pcd", ".pcx",
    ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi",
    ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm", ".xpm"})
SKIP = "replace or delete it, or pass over some with data.on_bad='skip'"


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


def rgb(file, name: str, way_out: str = SKIP, exif_transpose: bool = False) -> Image.Image:
  """Decodes a path, a file object or an open image, whole. BadRecord (with `name`) where that
  cannot be. exif_transpose: turned as its EXIF data say."""
  try:
    if isinstance(file, Image.Image):
      return _rgb(file, exif_transpose)
    with Image.open(file) as image:
      return _rgb(image, exif_transpose)
  except Exception as error:  # there is no list of what a damaged file makes Pillow raise
    raise BadRecord(f"cannot read {name}: {reason(error)}; {way_out}") from error


def _rgb(image: Image.Image, exif_transpose: bool) -> Image.Image:
  if exif_transpose:
    format = image.format   # which the turned one has lost
    image = ImageOps.exif_transpose(image)
    image.format = format
  if image.mode == "RGB":
    image.load()
    return image
  if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
  if image.mode in ("I", "F"):
    raise ValueError(f"its pixels are numbers of mode {image.mode}, whose range is not known: "
                     "scale them to 0..255 and save them in 8 bits")
  if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
    image = image.convert("RGBA")   # the same colours; Pillow warns of the direct way
  return image.convert("RGB")


def reason(error: Exception) -> str:
  """What a library says of a file, in one line; without the name or address of what it read."""
  if isinstance(error, UnidentifiedImageError):
    return "Pillow does not know its format"
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return printable(" ".join(str(error).split()) or type(error).__name__)


def printable(name: str) -> str:
  """A file's name that any terminal and any file can take: bytes that are no UTF-8 are escaped,
  and so are control characters."""
  def escaped(match):
    code = ord(match[0])
    return (f"\\x{code - 0xdc00:02x}" if 0xdc80 <= code <= 0xdcff   # how Python keeps such bytes
            else match[0].encode("unicode_escape").decode())
  return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escaped, name)


def check_label(label: int, num_classes: int, name: str) -> int:
  """The label, if it is the number of a class; else a BadRecord."""
  if not 0 <= label < num_classes:
    raise BadRecord(f"cannot use {name}: its label {label} is not in 0..{num_classes - 1}; correct "
                    "or delete it, or pass over some with data.on_bad='skip'")
  return int(label)
