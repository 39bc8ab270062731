"""export: writes a model as a file for another runtime, then reads the file back and compares it.

  program.py      what is exported: a function of images, and the metadata of its file
  onnx_file.py    ONNX, by jax2onnx; onnx_operators.py: how our layers become ONNX operators
  openvino_file.py  stablehlo_file.py  weights_file.py    the other formats
  int8.py         ONNX with 8-bit matrices, calibrated on images
  page.py         an HTML page that runs ONNX files in a browser
"""
import dataclasses
import hashlib
import importlib
import os
import pathlib
import tempfile
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from PIL import Image

from vitcompact import runtimes
from vitcompact.checks import check_fitting, image_shapes
from vitcompact.export.program import Program
from vitcompact.fold import fold
from vitcompact.preprocess import preprocess as preprocess_of

TOLERANCE = 1e-5        # as a share of the largest logit, float32
TOLERANCE_HALF = 2e-2   # the same for 16-bit weights
BATCHES = (1, 3)        # batch sizes with which a file is compared


class Format(NamedTuple):
  """module: the module of the format; suffix: of its files; write: the name of the function that
  writes one; read: of the function that makes it a `Runner`, if no runtime opens the format."""
  module: str
  suffix: str
  write: str = "write"
  read: str = ""


FORMATS = {
    "onnx": Format("onnx_file", ".onnx"), "openvino": Format("openvino_file", ".xml"),
    "stablehlo": Format("stablehlo_file", ".stablehlo"),
    "safetensors": Format("weights_file", ".safetensors"),
    "torch": Format("weights_file", ".pth", "write_torch", "read_torch"),
}


@dataclasses.dataclass(frozen=True)
class Exported:
  """An exported file and how well it agrees with the model.

  max_rel: the largest difference of a logit, as a share of the largest logit; top1_agreement: the
  share of images for which both predict the same class; images: the number of images compared;
  runtime: the one that ran the file; size: in bytes, of all its parts; sha256: of the file, or of
  OpenVINO's .bin followed by its .xml; folded: whether export folded the model.
  """
  path: str
  format: str
  runtime: str
  max_rel: float
  top1_agreement: float
  images: int
  tolerance: float
  size: int
  sha256: str
  folded: bool = False

  def __str__(self):
    allowed = "" if self.tolerance == np.inf else f" (at most {self.tolerance:g})"
    return (f"{self.path}: {self.size / 1e6:.1f} MB, {self.runtime} differs by {self.max_rel:.1e} "
            f"of the largest logit on {self.images} images{allowed}, the same class on "
            f"{100 * self.top1_agreement:.0f}%")


def export(model: nn.Module, variables, path, *, to: str | None = None, batch: int | None = None,
           pixels: bool = False, half: bool = False, classes=None, preprocess=None, images=None,
           int8=None, tokens: bool = False, tolerance: float | None = None,
           force: bool = False) -> Exported:
  """Writes a model as a file for another runtime, runs the file there, and compares the logits.

  Args:
    model, variables: a model in training form is folded first.
    path: of the file.
    to: "onnx", "openvino", "stablehlo", "safetensors" or "torch"; None: according to the suffix.
    batch: the batch size that the file takes; None: any.
    pixels: whether the file takes resized and cropped uint8 pixels (B, H, W, C) and normalises them
      itself; else it takes normalised float32.
    half: store weights as float16 (OpenVINO only).
    classes: names of the classes in the order of the logits, stored in the file.
    preprocess: how images are prepared; None: `vc.preprocess(model)`.
    images: (n, H, W, C) normalised float32, on which the file is compared; None: two photographs.
    int8: normalised calibration images for an ONNX file with 8-bit matrices; None: float32.
    tokens: whether the file has a second output, `kept` (B, patches): 1 where a patch still has a
      token at the end. Only to ONNX, and for isotropic models whose plan reduces tokens.
    tolerance: of differences, as a share of the largest logit; None: 1e-5 for float32, 2e-2 for
      half, and no limit for int8, whose error is only reported.
    force: overwrite an existing file.
  Raises:
    ValueError: the arguments do not fit together, a package is not installed, or the file's logits
      differ by more than the tolerance. In each case no file is left.
  """
  path, name = checked_path(path, to, force)
  pre = preprocess_of(model) if preprocess is None else preprocess
  # This machine may lack the device whose forms of attention `tune` chose.
  untuned = model.clone(execution=dataclasses.replace(model.execution, attention={}))
  check_fitting(untuned, variables, image_shapes(model))
  check_choices(name, model, batch, pixels, half, int8, tokens, classes)
  folded = not model.deploy
  if folded:
    model, variables = fold(model, variables)
  program = Program(model, variables, pre, batch, pixels, classes and tuple(classes),
                    tokens)
  if images is not None:
    if pixels:
      raise ValueError("images are normalised, but with pixels=True the file takes pixels; leave "
                       "images out")
    images = program.normalised("images", images)
  if int8 is not None:
    int8 = program.normalised("int8", int8)
  if tolerance is None:
    tolerance = np.inf if int8 is not None else TOLERANCE_HALF if half else TOLERANCE
  if not tolerance >= 0:
    raise ValueError(f"{tolerance=}: must be 0 or more")
  return _write_checked(program, path, name, half, images, int8, tolerance, folded)


def _write_checked(program: Program, path: pathlib.Path, name: str, half: bool, images, int8,
                   tolerance: float, folded: bool) -> Exported:
  """Writes a file of the format `name`, and leaves it only if it agrees with the program."""
  format = FORMATS[name]
  module = importlib.import_module(f"vitcompact.export.{format.module}")
  try:
    # In the same directory, so that the finished file can be moved into place by a rename.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
      partial = pathlib.Path(folder, path.stem + format.suffix)
      getattr(module, format.write)(program, partial, **({"half": True} if half else {}))
      if int8 is not None:
        from vitcompact.export import int8 as quantised

        quantised.write(partial, program, int8)
      run = getattr(module, format.read)(program, partial) if format.read else \
          runtimes.load(partial)
      max_rel, agreement, count = _compare(program, run, images)
      if not max_rel <= tolerance:   # also true for NaN
        raise ValueError(f"{path.name} differs from the model by {max_rel:.2g} of its largest "
                         f"logit in {run.runtime}, more than tolerance={tolerance:g}; nothing was "
                         "written. Rounding may swap two tokens with nearly equal scores: try "
                         "other images")
      parts = [pathlib.Path(folder, p) for p in sorted(os.listdir(folder))]
      size, digest = sum(p.stat().st_size for p in parts), _digest(parts)
      for part in parts:
        os.replace(part, path.parent / f"{path.stem}{part.suffix}")
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error}; free some space, or give another path"
                  ) from error
  return Exported(str(path), name, run.runtime, max_rel, agreement, count, tolerance, size, digest,
                  folded)


def photographs(preprocess, count: int) -> np.ndarray:
  """uint8 (count, H, W, C): scikit-learn's photographs and their mirror images, resized and
  cropped; noise for models that do not take 1 or 3 channels."""
  if len(preprocess.mean) not in (1, 3):
    shape = (count, *preprocess.image_size, len(preprocess.mean))
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  import sklearn.datasets

  pair = sklearn.datasets.load_sample_images().images
  prepared = [preprocess.resize(Image.fromarray(view)) for image in pair
              for view in (image, image[:, ::-1])]
  return np.stack([prepared[i % len(prepared)] for i in range(count)])


def _compare(program: Program, run: runtimes.Runner, images):
  """(largest relative difference, share of equal classes, number of images) of a file and its
  model."""
  sizes = BATCHES if program.batch is None else (program.batch,)
  worst, same, count = 0.0, 0, 0
  for size in sizes:
    batch = program.prepared(photographs(program.preprocess, size)) if images is None else \
        np.resize(images, (size, *images.shape[1:]))
    expected, got = program.logits(batch), np.asarray(run(batch))
    if got.shape != expected.shape:
      raise ValueError(f"in {run.runtime} the logits of {size} images have shape {got.shape}, the "
                       f"model's {expected.shape}; nothing was written")
    if not np.isfinite(expected).all():
      raise ValueError("the model's own logits are NaN or infinite on the images compared: check "
                       "its variables, or give other images")
    gap = np.abs(got.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30)
    worst, count = float(np.maximum(worst, gap)), count + size   # np.maximum keeps NaN
    same += int((got.argmax(-1) == expected.argmax(-1)).reshape(size, -1).all(axis=-1).sum())
  return worst, same / count, count


def checked_path(path, to: str | None = None, force: bool = False) -> tuple[pathlib.Path, str]:
  """(path, format) of a file to write; ValueError if they do not match or the file exists."""
  path = pathlib.Path(path)
  suffixes = {format.suffix: name for name, format in FORMATS.items()}
  if to is None:
    if path.suffix not in suffixes:
      raise ValueError(f"{path}: its suffix is not that of a format; end it in "
                       f"{', '.join(suffixes)}, or give to=")
    to = suffixes[path.suffix]
  if to not in FORMATS:
    raise ValueError(f"to={to!r}: must be one of {', '.join(FORMATS)}")
  if path.suffix != FORMATS[to].suffix:
    raise ValueError(f"{path}: a file for {to} must end in {FORMATS[to].suffix}")
  if not path.parent.is_dir():
    raise ValueError(f"{path}: there is no directory {path.parent}; create it first")
  dirs = [p for p in (path, path.with_suffix(".bin") if to == "openvino" else path) if p.is_dir()]
  if dirs:
    raise ValueError(f"{dirs[0]} is a directory: give another name")
  existing = [p for p in (path, path.with_suffix(".bin") if to == "openvino" else path)
              if p.exists()]
  if existing and not force:
    raise ValueError(f"{existing[0]} exists; give another name, or overwrite it with force")
  return path, to


def check_choices(to, model, batch, pixels, half, int8, tokens, classes):
  """Raises ValueError for options that the format `to` does not support."""
  if batch is not None and not (type(batch) is int and batch > 0):
    raise ValueError(f"batch={batch!r}: must be a positive whole number, or None for any")
  weights_only = to in ("safetensors", "torch")
  if weights_only and (pixels or batch is not None):
    raise ValueError(f"a file for {to} holds weights, not a program: leave batch and pixels out")
  if tokens and to != "onnx":
    raise ValueError(f"tokens=True is only for onnx, not {to}")
  if model.dtype != "float32" and to in ("onnx", "openvino"):
    raise ValueError(f"dtype={model.dtype!r}: a file for {to} computes in float32; give "
                     "model.clone(dtype='float32')")
  if half and to != "openvino":
    raise ValueError(f"half=True is only for openvino, not {to}; vitcompact convert --dtype "
                     "float16 writes smaller .safetensors")
  if int8 is not None and to != "onnx":
    raise ValueError(f"int8 is only for onnx, not {to}; OpenVINO reads ONNX files, too")
  if classes is not None and len(classes) != model.num_classes:
    raise ValueError(f"{len(classes)} names of classes for a model with "
                     f"num_classes={model.num_classes}")


def _digest(paths) -> str:
  """The sha256 of the concatenated files."""
  digest = hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      while block := file.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()


__all__ = ["Exported", "Program", "export", "photographs"]
