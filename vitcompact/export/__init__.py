"""export: a model as a file for another runtime, which is read back and compared before it counts.

  program.py      what is exported: a function of images, and what its file tells
  onnx_file.py    ONNX, by jax2onnx; onnx_operators.py: its translation of our layers
  openvino_file.py  stablehlo_file.py  weights_file.py    the other formats
  int8.py         ONNX with matrices of 8 bits, calibrated on images
  page.py         a page that runs ONNX files in a browser
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
from vitcompact.doors import check_fitting, image_shapes
from vitcompact.export.program import Program
from vitcompact.fold import fold
from vitcompact.preprocess import preprocess as preprocess_of

TOLERANCE = 1e-5        # of the largest logit, float32
TOLERANCE_HALF = 2e-2   # weights of 16 bits
BATCHES = (1, 3)        # sizes at which a file is compared


class Format(NamedTuple):
  """home: the module with its writer; suffix: of the file; write: the writer's name; read: of the
  function that makes it a function of images, where no runtime does."""
  home: str
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
  """A file that computes what the model does.

  max_rel: largest difference of a logit, of the largest logit; top1_agreement: share of images on
  which the likeliest class is the model's; images: how many were compared; runtime: in which; size:
  in bytes, with all that belongs to it; sha256: of the file, of OpenVINO's two .bin comes first;
  folded: whether the model had to be.
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
  """Writes a model as a file for another runtime, reads it back there, and compares the logits.

  Args:
    model, variables: in training form they are folded first.
    path: of the file.
    to: "onnx", "openvino", "stablehlo", "safetensors" or "torch"; None: as the path's suffix says.
    batch: images that the file takes at once; None: any number.
    pixels: whether the file takes uint8 pixels (B, H, W, C), resized and cut, and normalises them
      itself; else normalised float32.
    half: weights stored as float16 (OpenVINO).
    classes: names of the classes, in the order of the logits, which the file then tells.
    preprocess: how images are prepared; None: `vc.preprocess(model)`.
    images: (n, H, W, C) normalised float32, on which the file is compared; None: two photographs.
    int8: normalised images on which an ONNX file with 8-bit matrices is calibrated; None: float32.
    tokens: whether the file has a second output, `kept` (B, patches): 1 where a patch still has a
      token at the end. Of isotropic models whose plan reduces tokens, to ONNX.
    tolerance: of differences, as a share of the largest logit; None: 1e-5 for float32, 2e-2 for
      half, and with int8 none: what is lost is told, not refused.
    force: overwrite a file that exists.
  Raises:
    ValueError: something does not fit, is not installed, or the file computes something else. No
      file is left then.
  """
  path, name = checked_path(path, to, force)
  pre = preprocess_of(model) if preprocess is None else preprocess
  # Here may be no device that has the forms it was tuned to.
  anywhere = model.clone(execution=dataclasses.replace(model.execution, attention={}))
  check_fitting(anywhere, variables, image_shapes(model))
  check_choices(name, model, batch, pixels, half, int8, tokens, classes)
  folded = not model.deploy
  if folded:
    model, variables = fold(model, variables)
  program = Program(model, variables, pre, batch, pixels, classes and tuple(classes),
                    tokens)
  if images is not None:
    if pixels:
      raise ValueError("images are normalised, and with pixels=True the file normalises pixels "
                       "itself; leave images out")
    images = program.normalised("images", images)
  if int8 is not None:
    int8 = program.normalised("int8", int8)
  if tolerance is None:
    tolerance = np.inf if int8 is not None else TOLERANCE_HALF if half else TOLERANCE
  if not tolerance >= 0:
    raise ValueError(f"{tolerance=}: must be 0 or more")
  return _written(program, path, name, half, images, int8, tolerance, folded)


def _written(program: Program, path: pathlib.Path, name: str, half: bool, images, int8,
             tolerance: float, folded: bool) -> Exported:
  """A file of the format of that name, once it computes what the program does."""
  format = FORMATS[name]
  home = importlib.import_module(f"vitcompact.export.{format.home}")
  try:
    # Beside the file, so that it can be moved to its place at once.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
      partial = pathlib.Path(folder, path.stem + format.suffix)
      getattr(home, format.write)(program, partial, **({"half": True} if half else {}))
      if int8 is not None:
        from vitcompact.export import int8 as quantised

        quantised.write(partial, program, int8)
      run = getattr(home, format.read)(program, partial) if format.read else \
          runtimes.opened(partial)
      max_rel, agreement, count = _compare(program, run, images)
      if not max_rel <= tolerance:   # NaN is no agreement
        raise ValueError(f"{path.name} differs from the model by {max_rel:.2g} of its largest "
                         f"logit in {run.runtime}, more than tolerance={tolerance:g}; nothing was "
                         "written. Two tokens that score alike may change places: give other "
                         "images")
      parts = [pathlib.Path(folder, p) for p in sorted(os.listdir(folder))]
      size, digest = sum(p.stat().st_size for p in parts), _digest(parts)
      for part in parts:
        os.replace(part, path.parent / f"{path.stem}{part.suffix}")
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error}; make room, or name another place") from error
  return Exported(str(path), name, run.runtime, max_rel, agreement, count, tolerance, size, digest,
                  folded)


def photographs(preprocess, count: int) -> np.ndarray:
  """uint8 (count, H, W, C): scikit-learn's photographs and their mirror images, prepared; of models
  that take no photographs, noise."""
  if len(preprocess.mean) not in (1, 3):
    shape = (count, *preprocess.image_size, len(preprocess.mean))
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  import sklearn.datasets

  pair = sklearn.datasets.load_sample_images().images
  prepared = [preprocess.resize(Image.fromarray(view)) for image in pair
              for view in (image, image[:, ::-1])]
  return np.stack([prepared[i % len(prepared)] for i in range(count)])


def _compare(program: Program, run: runtimes.Runner, images):
  """(largest difference, share of equal classes, images) of a file and its model."""
  sizes = BATCHES if program.batch is None else (program.batch,)
  worst, same, count = 0.0, 0, 0
  for size in sizes:
    some = program.prepared(photographs(program.preprocess, size)) if images is None else \
        np.resize(images, (size, *images.shape[1:]))
    wanted, got = program.logits(some), np.asarray(run(some))
    if got.shape != wanted.shape:
      raise ValueError(f"in {run.runtime} the outputs of {size} images have shape {got.shape}, the "
                       f"model's {wanted.shape}; nothing was written")
    if not np.isfinite(wanted).all():
      raise ValueError("the model's own logits are NaN or infinite on the images compared: look at "
                       "its variables, or give images")
    gap = np.abs(got.astype(np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    worst, count = float(np.maximum(worst, gap)), count + size   # maximum keeps NaN
    same += int((got.argmax(-1) == wanted.argmax(-1)).reshape(size, -1).all(axis=-1).sum())
  return worst, same / count, count


def checked_path(path, to: str | None = None, force: bool = False) -> tuple[pathlib.Path, str]:
  """The path of a file to write and its format; ValueError where the two do not go together, or
  where something is there."""
  path = pathlib.Path(path)
  suffixes = {format.suffix: name for name, format in FORMATS.items()}
  if to is None:
    if path.suffix not in suffixes:
      raise ValueError(f"{path}: its suffix names no format; end it in {', '.join(suffixes)}, or "
                       "give to=")
    to = suffixes[path.suffix]
  if to not in FORMATS:
    raise ValueError(f"to={to!r}: must be one of {', '.join(FORMATS)}")
  if path.suffix != FORMATS[to].suffix:
    raise ValueError(f"{path}: a file for {to} ends in {FORMATS[to].suffix}")
  if not path.parent.is_dir():
    raise ValueError(f"{path}: there is no directory {path.parent}; make it first")
  taken = [p for p in (path, path.with_suffix(".bin") if to == "openvino" else path) if p.is_dir()]
  if taken:
    raise ValueError(f"{taken[0]} is a directory: give another name")
  others = [p for p in (path, path.with_suffix(".bin") if to == "openvino" else path) if p.exists()]
  if others and not force:
    raise ValueError(f"{others[0]} exists; give another name, or ask to overwrite it with force")
  return path, to


def check_choices(to, model, batch, pixels, half, int8, tokens, classes):
  """Refuses what a format does not have."""
  if batch is not None and not (type(batch) is int and batch > 0):
    raise ValueError(f"batch={batch!r}: must be a whole number of images, or None for any")
  weights_only = to in ("safetensors", "torch")
  if weights_only and (pixels or batch is not None):
    raise ValueError(f"a file for {to} holds weights, not a program: leave batch and pixels out")
  if tokens and to != "onnx":
    raise ValueError(f"tokens=True is for onnx, not {to}")
  if model.dtype != "float32" and to in ("onnx", "openvino"):
    raise ValueError(f"dtype={model.dtype!r}: a file for {to} computes in float32; give "
                     "model.clone(dtype='float32')")
  if half and to != "openvino":
    raise ValueError(f"half=True is for openvino, not {to}; vitcompact convert --dtype float16 "
                     "writes smaller .safetensors")
  if int8 is not None and to != "onnx":
    raise ValueError(f"int8 is for onnx, not {to}; OpenVINO reads that file, too")
  if classes is not None and len(classes) != model.num_classes:
    raise ValueError(f"{len(classes)} names of classes for a model with "
                     f"num_classes={model.num_classes}")


def _digest(paths) -> str:
  """Of files, one after another."""
  digest = hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      while block := file.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()


__all__ = ["Exported", "Program", "export", "photographs"]
