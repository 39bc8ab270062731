"""Decodes image files to RGB for training and serving, or says which record is bad and why.

Greyscale, palette and CMYK images are accepted (ImageNet has some), and so is a PNG named .jpg.
Of an image with several frames the first one is used. 16-bit grey keeps its upper 8 bits; Pillow's
own conversion would make nearly all of it white. Transparency is dropped: a pixel keeps its stored
colour. The EXIF orientation is not applied: the published accuracies come from loaders that ignore
it, and a photograph that a phone stored sideways stays sideways. If that matters, rotate the files
(PIL.ImageOps.exif_transpose) before training and before serving. (TIFF is the exception: Pillow
rotates it on reading.)

Truncated files, files that are not images, and modes with an unknown range are refused. A JPEG
with a flipped bit usually decodes without an error, in any decoder; ArrayRecord's checksums catch
it.
"""
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Suffixes, in any case, of the files that Pillow reads on its own. The list is fixed, so that a
# data set has the same images with every build of Pillow. Formats that need another program or hold
# no pixels (.eps, .ps, .wmf, .emf, .mpg) are left out, and so are scientific ones (.h5, .hdf,
# .fits, .grib).
SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".flc",
    ".fli", ".ftc", ".ftu", ".gbr", ".gif", ".icb", ".icns", ".ico", ".im", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".msp", ".pbm", ".pcd", ".pcx",
    ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi",
    ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm", ".xpm"})
SKIP = "replace or delete it, or skip bad records with data.on_bad='skip'"


class BadRecord(ValueError):
  """A record that cannot be used. The text names it; `data.on_bad` says how it is handled."""


class Example(NamedTuple):
  """One image of a source: RGB, the number of its class, and LV-ViT's label map if there is one."""
  image: Image.Image
  label: int
  label_map: np.ndarray | None = None  # float16 (2, 5, 18, 18), see labels.py


def as_arrays(example: Example) -> dict:
  """{"image": uint8 (h, w, 3), "label": int}."""
  return {"image": np.asarray(example.image), "label": example.label}


def rgb(file, name: str, hint: str = SKIP, exif_transpose: bool = False) -> Image.Image:
  """Decodes a path, a file object or an open image. Raises BadRecord (with `name`) on failure.
  exif_transpose: whether to rotate it according to its EXIF data."""
  try:
    if isinstance(file, Image.Image):
      return _rgb(file, exif_transpose)
    with Image.open(file) as image:
      return _rgb(image, exif_transpose)
  except Exception as error:  # a damaged file can make Pillow raise almost anything
    raise BadRecord(f"cannot read {name}: {reason(error)}; {hint}") from error


def _rgb(image: Image.Image, exif_transpose: bool) -> Image.Image:
  if exif_transpose:
    format = image.format   # exif_transpose drops it
    image = ImageOps.exif_transpose(image)
    image.format = format
  if image.mode == "RGB":
    image.load()
    return image
  if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
  if image.mode in ("I", "F"):
    raise ValueError(f"its pixels are numbers of mode {image.mode}, whose range is unknown: scale "
                     "them to 0..255 and save them as 8 bits")
  if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
    image = image.convert("RGBA")   # gives the same colours; Pillow warns about direct conversion
  return image.convert("RGB")


def reason(error: Exception) -> str:
  """A library's error in one line, without the name or address of what it read."""
  if isinstance(error, UnidentifiedImageError):
    return "Pillow does not know its format"
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return printable(" ".join(str(error).split()) or type(error).__name__)


def printable(name: str) -> str:
  """A file name that is safe to print and to write: bytes that are not UTF-8 and control characters
  are escaped."""
  def escaped(match):
    code = ord(match[0])
    return (f"\\x{code - 0xdc00:02x}" if 0xdc80 <= code <= 0xdcff   # a surrogate-escaped byte
            else match[0].encode("unicode_escape").decode())
  return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escaped, name)


def check_label(label: int, num_classes: int, name: str) -> int:
  """Returns the label if it is the number of a class, else raises BadRecord."""
  if not 0 <= label < num_classes:
    raise BadRecord(f"cannot use {name}: its label {label} is not in 0..{num_classes - 1}; correct "
                    "or delete it, or skip bad records with data.on_bad='skip'")
  return int(label)
