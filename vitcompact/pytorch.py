"""Files of PyTorch weights: read safely, converted to our files, and written back.

.safetensors and .npz files are read as they are; .pth, .pt, .bin, .ckpt and .tar through torch,
which has to be installed, as weights only: a file that would run code is refused, or read without
the objects that are no tensors where records are ignored.
"""
import argparse
import dataclasses
import pathlib
import re
from collections.abc import Mapping

import numpy as np

import vitcompact as vc
from vitcompact import convert, files, trees

WAY_OUT = ("where it was made, torch.save({'model': model.state_dict()}, 'weights.pth') writes "
           "weights only")


class Record:
  """Stands for an object of a class that is not looked for: what a file has of it is dropped."""

  def __new__(cls, *_, **__):
    return super().__new__(cls)

  def __init__(self, *_, **__):
    pass

  def __setstate__(self, _):
    pass


def harmless() -> list:
  """Classes that checkpoints keep plain records in, with the names that files have for them."""
  core = np._core.multiarray
  numpy = [(getattr(core, name), f"numpy.{home}.multiarray.{name}")
           for name in ("scalar", "_reconstruct") for home in ("_core", "core")]
  numbers = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
  # DeiT's own checkpoints keep their command line as a Namespace.
  return [argparse.Namespace, np.ndarray, np.dtype, *numbers, *numpy,
          *[(Record, f"pathlib.{name}") for name in ("Path", "PosixPath", "WindowsPath")]]


def read_checkpoint(path: str, *, ignore_records: bool = False) -> Mapping:
  """What a checkpoint holds: a state dict, or containers of some. ValueError where it cannot be
  read."""
  kind = files.kind_of(path)
  if kind == "safetensors" or pathlib.Path(path).suffix == ".safetensors":
    return convert.read_safetensors(path)[0]
  if kind == "pytorch":
    return _read_pickled(path, ignore_records)
  if kind == "npz":
    try:
      with np.load(path, allow_pickle=False) as file:
        return dict(file)
    except Exception as error:  # a damaged archive may raise anything
      reason = str(error).split("\n")[0]
      raise ValueError(f"{path}: refused: damaged, or more than arrays ({reason})") from None
  raise ValueError(f"{path} is {files.KINDS[kind]}; must be .safetensors, .npz or PyTorch's "
                   f"({', '.join(files.PICKLED)})")


def _read_pickled(path, ignore_records):
  try:
    import torch
  except ImportError:
    raise ValueError(f"{path} is a PyTorch file: reading it needs torch (pip install torch); or "
                     "save the weights as .safetensors where it is installed") from None
  allowed = harmless()
  while True:
    try:
      with torch.serialization.safe_globals(allowed):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
      break
    except Exception as error:  # a broken or hostile file may raise anything
      # torch's own text recommends to switch the protection off.
      name = re.search(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", str(error))
      if not name:
        kind = type(error).__name__
        raise ValueError(f"{path}: refused: damaged, or more than weights ({kind}); {WAY_OUT}"
                         ) from None
      record = (Record, name[1])
      blocked = "blocked" in str(error)   # modules that torch never reads a name of, such as os
      if not ignore_records or blocked or record in allowed:
        ignore = "" if blocked else ", or --ignore-records leaves such objects out"
        raise ValueError(f"{path}: refused: it holds more than weights, {name[1]}; {WAY_OUT}"
                         f"{ignore}") from None
      allowed.append(record)   # its name is read, nothing of that name is imported or run
  if not isinstance(checkpoint, Mapping):
    raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors")
  return checkpoint


def is_ours(path: str) -> bool:
  """Whether `vc.save` wrote a file. What `to_torch` wrote says which model it is of too, but has
  PyTorch's names."""
  if pathlib.Path(path).suffix != ".safetensors" or files.kind_of(path) != "safetensors":
    return False
  names, about = files.read_header(path)
  return "fields" in about and any(name.startswith("params/") for name in names)


def from_checkpoint(checkpoint, name: str | None, out, *, reset_head: bool = False,
                    force: bool = False, weights: str | None = None, dtype: str = "float32",
                    classes=None, allow_nonfinite: bool = False, ignore_records: bool = False,
                    **fields) -> list[str]:
  """Writes the model of a checkpoint to `out`; returns lines that tell what was done.

  name: of the model that PyTorch's weights are of; None for a file that `vc.save` wrote, which says
    so itself. weights: which of several sets a checkpoint holds, such as "model" or "model_ema".
    dtype, classes: see `convert.save`. fields: as in `vc.create_model`, such as image_size=384.
  """
  if (ours := is_ours(checkpoint)) and name is not None:
    raise ValueError(f"{checkpoint} says which model it is of; leave --model out")
  if not ours and name is None:
    raise ValueError("--model is missing, as in --model deit_small_patch16_224; known: "
                     f"{', '.join(vc.list_models())}")
  source = preprocess = None
  if name is None:
    source, variables = convert.load(checkpoint, allow_nonfinite=allow_nonfinite)
    state, name = convert.tensors_of(source, variables), source.variant
    model = convert.altered(source, **fields)
    if classes is None and model.num_classes == source.num_classes and not reset_head:
      classes = convert.classes_of(checkpoint)
    if "crop" in convert.read_metadata(checkpoint):
      preprocess = vc.preprocess(checkpoint)
      if model.image_size != source.image_size:   # a run's own crop is of its size of images
        preprocess = dataclasses.replace(preprocess, crop=vc.preprocess(model).crop)
  else:
    state = read_checkpoint(checkpoint, ignore_records=ignore_records)
    model = vc.create_model(name, **fields)
  loaded = convert.read_state_dict(model, state, reset_head=reset_head, source=source,
                                   weights=weights, allow_nonfinite=allow_nonfinite)
  convert.save(out, model, loaded.variables, force=force, dtype=dtype, classes=classes,
               preprocess=preprocess, allow_nonfinite=allow_nonfinite)
  return [f"{out}: {name}, {trees.size(loaded.variables['params']):,} parameters",
          *loaded.lines()]


def to_torch(checkpoint, out, *, names: str = "timm", force: bool = False) -> list[str]:
  """Writes the PyTorch state dict of one of our files; returns lines that tell what was done."""
  model, variables = convert.load(checkpoint)
  state = vc.to_torch(model, variables, names=names)
  convert.write_safetensors(out, state, convert.metadata(model), force=force)
  return [f"{out}: {model.variant}, {len(state)} tensors"]
