"""preprocess: how a named model's evaluation prepares an image.

It equals timm's evaluation, on files as timm's loader opens them, to within one grey level. It
differs on purpose in four cases: 16-bit grey keeps its upper 8 bits, as in training here (Pillow's
conversion makes nearly all of it white); pixels of unknown range (32-bit integers and floats) are
refused; small images of a model's own size are not cropped; and the images of a model with one
channel are normalised by one number. As in timm, transparency is dropped, only the first of several
frames is used, and the EXIF orientation is ignored unless `exif_transpose` is set (but Pillow
itself rotates a TIFF).
"""
import dataclasses
import json
import os

import flax.linen as nn
import numpy as np

from vitcompact import convert, files
from vitcompact.checks import check_model
from vitcompact.data.evaluation import Preprocess
from vitcompact.models import variant_of


def preprocess(model: nn.Module | str | os.PathLike) -> Preprocess:
  """How images are prepared for a model, at `model.image_size` (as in timm if timm has the model).

  Given the path of a file of ours, it is the evaluation of the run that wrote it, whose crop may
  differ. Other names of weights, such as "hf-hub:org/name" or a folder, work as in `pretrained`.

  If a model does not have three channels, each is normalised by the average mean and std; a model
  with a single channel gets grey images.
  """
  if isinstance(model, str | os.PathLike):
    if not os.fspath(model).endswith(".safetensors"):
      from vitcompact.hub import as_file  # which imports this module

      model = as_file(model)
    return _preprocess_of_file(model)
  check_model(model)
  row = variant_of(model.variant)
  size = tuple(np.broadcast_to(model.image_size, 2).tolist())
  crop = row.crop_384 if row.crop_384 and min(size) >= 384 else row.crop
  mean, std = row.mean, row.std
  if model.in_chans != len(mean):
    mean, std = ((sum(values) / len(values),) * model.in_chans for values in (mean, std))
  return Preprocess(mean, std, crop, row.interpolation, size, row.crop_mode)


def _preprocess_of_file(path) -> Preprocess:
  """As `preprocess`, for a file; older files have no crop, and get their model's."""
  pre, about = preprocess(convert.read_model(path)), convert.read_metadata(path)
  if "pixels" in about:   # pretrained weights may use another mean and std than the model
    try:
      pixels = json.loads(about["pixels"])
      mean, std = (tuple(map(float, pixels[name])) for name in ("mean", "std"))
      pre = dataclasses.replace(pre, **{**pixels, "mean": mean, "std": std})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
      raise ValueError(f"{path}: its metadata has no valid mean and std ({error!r}); make the file "
                       "again") from None
  return dataclasses.replace(pre, crop=files.crop_in(path, about)) if "crop" in about else pre
