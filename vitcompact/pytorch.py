"""Reads other programs' files of weights safely, converts them to our files, and writes them back.

.safetensors and .npz files are read directly; .pth, .pt, .bin, .ckpt and .tar through torch, which
must be installed, as weights only: a file that would run code is refused, or read without its
objects that are not tensors. Weights in several files are read through their index.
"""
import argparse
import collections
import dataclasses
import datetime
import json
import pathlib
import re
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

import vitcompact as vc
from vitcompact import convert, files, foreign_config, trees

HINT = ("where it was made, torch.save({'model': model.state_dict()}, 'weights.pth') writes "
           "weights only")


class Record:
  """Placeholder for an object in a pickle whose class is not imported; its content is dropped."""

  def __new__(cls, *_, **__):
    return super().__new__(cls)

  def __init__(self, *_, **__):
    pass

  def __setstate__(self, _):
    pass


class Dict(Record):
  """Placeholder for an object of a dict class; its items are kept."""

  def __new__(cls, *_, **__):
    return collections.OrderedDict()


class List(Record):
  """Placeholder for an object of a list class; its items are kept."""

  def __new__(cls, *_, **__):
    return []


def safe_classes() -> list:
  """Classes of plain records that checkpoints may contain, some as (class, name in the file)."""
  core = np._core.multiarray
  numpy = [(getattr(core, name), f"numpy.{home}.multiarray.{name}")
           for name in ("scalar", "_reconstruct") for home in ("_core", "core")]
  numbers = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
  plain = [dict, list, tuple, set, frozenset, bool, int, float, complex, str, slice,
           datetime.datetime, datetime.date, datetime.timedelta]
  # DeiT's own checkpoints hold their command line as a Namespace.
  return [argparse.Namespace, np.ndarray, np.dtype, *numbers, *numpy, *plain,
          stand_in("collections.defaultdict", Dict), stand_in("collections.deque", List),
          *[stand_in(f"pathlib.{name}") for name in ("Path", "PosixPath", "WindowsPath")]]


def stand_in(name: str, kind: type[Record] = Record) -> tuple[type, str]:
  """(a placeholder class, the name of the class it replaces, which is neither imported nor run)."""
  name = name if "." in name else f"builtins.{name}"   # as in torch's errors
  return type(name, (kind,), {"__module__": "stands for"}), name


def read_checkpoint(path: str, *, ignore_records: bool = False,
                    allow: Sequence[str] = ()) -> Mapping:
  """The content of a checkpoint: a state dict, or a dict that contains some.

  path: of a file, of the index of several (model.safetensors.index.json), or of a directory.
  ignore_records: skip all objects in a PyTorch file that are not tensors.
  allow: skip the objects of these classes, such as omegaconf.dictconfig.DictConfig. Their code is
    never run.
  Raises ValueError if it cannot be read.
  """
  path = files.weights_in(path)
  if path.name.endswith(files.INDEX):
    return _read_shards(path, ignore_records, allow)
  return _read_file(path, ignore_records, allow)


def _read_file(path, ignore_records, allow):
  kind = files.kind_of(path)
  if kind == "safetensors" or path.suffix == ".safetensors":
    return convert.read_safetensors(path)[0]
  if kind == "pytorch":
    return _read_pickled(path, ignore_records, allow)
  if kind == "npz":
    try:
      with np.load(path, allow_pickle=False) as file:
        return {name: _bfloat16(array) for name, array in file.items()}
    except Exception as error:  # a damaged archive may raise anything
      reason = str(error).split("\n")[0]
      raise ValueError(f"{path}: refused: damaged, or more than arrays ({reason})") from None
  raise ValueError(f"{path} is {files.KINDS[kind]}; must be .safetensors, .npz or PyTorch's "
                   f"({', '.join(files.PICKLED)})")


def _bfloat16(array):
  """Restores bfloat16, which NumPy writes as two untyped bytes."""
  return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array


def _read_shards(index: pathlib.Path, ignore_records, allow):
  state = {}
  for name, listed in files.shards_of(index).items():
    shard = index.parent / name
    if not shard.is_file():
      raise FileNotFoundError(f"{shard}: no such file, but {index.name} lists {len(listed)} "
                              "tensors in it; fetch it into the same directory")
    found = _read_file(shard, ignore_records, allow)
    if missing := [tensor for tensor in listed if tensor not in found]:
      raise ValueError(f"{shard} holds no {trees.excerpt(missing)}, though {index.name} lists it; "
                       "fetch both again")
    state |= {tensor: found[tensor] for tensor in listed}
  return state


def _torch(hint: str):
  """The torch module, or ValueError(hint)."""
  try:
    import torch
  except ImportError:
    raise ValueError(hint) from None
  return torch


def write_pickled(path, state: Mapping[str, np.ndarray]):
  """Writes {name: array} as torch.save does."""
  torch = _torch(f"{path}: writing it needs torch (pip install torch); or export to .safetensors")
  torch.save({name: torch.from_numpy(array.copy()) for name, array in state.items()}, path)


def _read_pickled(path, ignore_records, allow):
  torch = _torch(f"{path} is a PyTorch file: reading it needs torch (pip install torch); or save "
                 "the weights as .safetensors where it is installed")
  records = {name: cls for cls, name in map(stand_in, allow)}
  while True:
    allowed = [*safe_classes(), *[(cls, name) for name, cls in records.items()]]
    try:
      with torch.serialization.safe_globals(allowed):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
      break
    except Exception as error:  # a broken or hostile file may raise anything
      if not _add_placeholder(path, str(error), records, ignore_records):
        raise _refusal(torch, path, error, allowed) from None
  if not isinstance(checkpoint, Mapping):
    raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors")
  return checkpoint


def _add_placeholder(path, message: str, records, ignore_records) -> bool:
  """Whether to read again: adds a placeholder for the class in torch's error, or changes its kind.
  """
  odd = re.search(r"[Cc]an only (SETITEM|append|extend).* got <class 'stands for\.([\w.]+)'",
                  message)
  if odd and records.get(odd[2], Dict).__mro__[1] is Record:
    records[odd[2]] = stand_in(odd[2], Dict if odd[1] == "SETITEM" else List)[0]
    return True
  found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", message)
  if not found or not ignore_records or "blocked" in message:
    return False
  cls, name = stand_in(found[1])
  return records.setdefault(name, cls) is cls


def _refusal(torch, path, error, allowed):
  # Not torch's own message, which recommends switching the protection off.
  name = re.search(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", str(error))
  if not name:
    return ValueError(f"{path}: refused: damaged, or more than weights ({type(error).__name__}); "
                      f"{HINT}")
  if "blocked" in str(error):   # modules that torch never allows, such as os
    return ValueError(f"{path}: refused: it holds more than weights, {name[1]}; {HINT}")
  try:
    with torch.serialization.safe_globals(allowed):
      names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or [name[1]]
  except Exception:   # an old torch, or an old file
    names = [name[1]]
  options = " ".join(f"--allow {name}" for name in names[:3])
  return ValueError(f"{path}: refused: it holds more than weights, {trees.excerpt(names, 8)}; "
                    f"{HINT}, or {options} reads it without objects of these classes, or "
                    "--ignore-records without any")


def is_ours(path) -> bool:
  """Whether `vc.save` wrote a file. Files from `to_torch` also name their model, but have PyTorch's
  names."""
  path = pathlib.Path(path)
  if path.suffix != ".safetensors" or path.is_dir() or files.kind_of(path) != "safetensors":
    return False
  names, about = files.read_header(path)
  return "fields" in about and any(name.startswith("params/") for name in names)


def from_checkpoint(checkpoint, name: str | None, out, *, reset_head: bool = False,
                    force: bool = False, weights: str | None = None, dtype: str = "float32",
                    classes=None, allow_nonfinite: bool = False, ignore_records: bool = False,
                    allow: Sequence[str] = (), **fields) -> list[str]:
  """Writes the model of a checkpoint to `out`; returns lines that say what was done.

  checkpoint, allow, ignore_records: see `read_checkpoint`.
  name: of the model; None for a file that `vc.save` wrote, which names its model, and for weights
    with timm's or transformers' config.json in the same directory.
  weights: which set to take if the checkpoint has several, such as "model" or "model_ema".
  dtype, classes: see `convert.save`. fields: as in `vc.create_model`, such as image_size=384.
  """
  path = files.weights_in(checkpoint)
  if (ours := is_ours(path)) and name is not None:
    raise ValueError(f"{checkpoint} says which model it is of; leave --model out")
  source, preprocess, lines = None, None, []
  if ours:
    source, variables = convert.load(path, allow_nonfinite=allow_nonfinite)
    state, name = convert.tensors_of(source, variables), source.variant
    model = convert.with_fields(source, **fields)
    if classes is None and model.num_classes == source.num_classes and not reset_head:
      classes = convert.classes_of(path)
    if "crop" in convert.read_metadata(path):
      preprocess = vc.preprocess(path)
      if model.image_size != source.image_size:   # the run's crop is for its own image size
        preprocess = dataclasses.replace(preprocess, crop=vc.preprocess(model).crop)
  else:
    if name is None:
      spec = foreign_config.spec_next_to(path)
      name, fields = spec.model, {**spec.fields, **fields}
      lines.append(spec.line())
    state = read_checkpoint(path, ignore_records=ignore_records, allow=allow)
    model = vc.create_model(name, **fields)
    if lines and classes is None and spec.classes and not reset_head:
      classes = spec.classes if len(spec.classes) == model.num_classes else None
  loaded = convert.read_state_dict(model, state, reset_head=reset_head, source=source,
                                   weights=weights, allow_nonfinite=allow_nonfinite)
  convert.save(out, model, loaded.variables, force=force, dtype=dtype, classes=classes,
               preprocess=preprocess, allow_nonfinite=allow_nonfinite)
  return [f"{out}: {name}, {trees.size(loaded.variables['params']):,} parameters", *lines,
          *loaded.lines()]


def read_for(model, path) -> dict:
  """Variables of `model` from another program's file, read and warned about as in `vc.from_torch`.
  """
  return vc.from_torch(model, read_checkpoint(path))


def to_torch(checkpoint, out, *, names: str = "timm", force: bool = False) -> list[str]:
  """Writes the PyTorch state dict of one of our files; returns lines that say what was done."""
  model, variables = convert.load(checkpoint)
  state = vc.to_torch(model, variables, names=names)
  classes = convert.classes_of(checkpoint)
  about = {"classes": json.dumps(classes)} if classes else {}
  convert.write_safetensors(out, state, {**convert.metadata(model), **about}, force=force)
  return [f"{out}: {model.variant}, {len(state)} tensors"]
