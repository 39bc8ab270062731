"""preprocess: how a named model's evaluation prepares an image.

It is timm's evaluation, of files as timm's loader opens them, to one grey level. Where it is not,
on purpose: 16-bit grey keeps its upper 8 bits, as in training here, and not whatever Pillow's
conversion leaves (nearly all of it white); pixels whose range is unknown, 32-bit integers and
floats, are refused; small images of a model's own size are left whole; and a model of one channel
is normalised by one number. What is as in timm, and may surprise: transparency is dropped, of
several frames the first counts, and an orientation in the EXIF data is not applied unless
`exif_transpose` asks for it (but Pillow itself turns a TIFF).
"""
import dataclasses
import json
import os

import flax.linen as nn
import numpy as np

from vitcompact import convert, files
from vitcompact.data.evaluation import Preprocess
from vitcompact.doors import check_model
from vitcompact.models import variant_of


def preprocess(model: nn.Module | str | os.PathLike) -> Preprocess:
  """The evaluation of the named model (timm's where timm has the model), at `model.image_size`; or,
  given the path of a file of ours, that of the run that wrote it, whose crop may be another. Other
  names of weights, such as "hf-hub:org/name" or a folder, are taken as by `pretrained`.

  A model of another number of channels than three is normalised by the mean of mean and of std in
  each; one of a single channel is shown images in grey.
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
  return Preprocess(mean, std, crop, row.interpolation, size, row.crop_mode)


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
