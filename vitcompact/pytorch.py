"""Files of others' weights: read safely, converted to our files, and written back.

.safetensors and .npz files are read as they are; .pth, .pt, .bin, .ckpt and .tar through torch,
which has to be installed, as weights only: a file that would run code is refused, or read without
the objects that are no tensors. Weights in several files are read by their index.
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


class Dict(Record):
  """Stands for a class of dicts, whose items are kept."""

  def __new__(cls, *_, **__):
    return collections.OrderedDict()


class List(Record):
  """Stands for a class of lists, likewise."""

  def __new__(cls, *_, **__):
    return []


def harmless() -> list:
  """Classes that checkpoints keep plain records in, with the names that files have for them."""
  core = np._core.multiarray
  numpy = [(getattr(core, name), f"numpy.{home}.multiarray.{name}")
           for name in ("scalar", "_reconstruct") for home in ("_core", "core")]
  numbers = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
  plain = [dict, list, tuple, set, frozenset, bool, int, float, complex, str, slice,
           datetime.datetime, datetime.date, datetime.timedelta]
  # DeiT's own checkpoints keep their command line as a Namespace.
  return [argparse.Namespace, np.ndarray, np.dtype, *numbers, *numpy, *plain,
          stand_in("collections.defaultdict", Dict), stand_in("collections.deque", List),
          *[stand_in(f"pathlib.{name}") for name in ("Path", "PosixPath", "WindowsPath")]]


def stand_in(name: str, kind: type[Record] = Record) -> tuple[type, str]:
  """(a class, the name of that which it stands for): nothing of that name is imported or run."""
  name = name if "." in name else f"builtins.{name}"   # as torch's errors have it
  return type(name, (kind,), {"__module__": "stands for"}), name


def read_checkpoint(path: str, *, ignore_records: bool = False,
                    allow: Sequence[str] = ()) -> Mapping:
  """What a checkpoint holds: a state dict, or containers of some. ValueError where it cannot be
  read.

  path: of a file, of the index of several (model.safetensors.index.json), or of a directory.
  ignore_records: read a PyTorch file without its objects that are no tensors; allow: without those
    of these classes, such as omegaconf.dictconfig.DictConfig. Their code is never run.
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
  """NumPy writes bfloat16 as two bytes of no type."""
  return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array


def _read_shards(index: pathlib.Path, ignore_records, allow):
  state = {}
  for name, wanted in files.shards_of(index).items():
    shard = index.parent / name
    if not shard.is_file():
      raise FileNotFoundError(f"{shard}: no such file, but {index.name} tells that it holds "
                              f"{len(wanted)} tensors; fetch it into the same directory")
    found = _read_file(shard, ignore_records, allow)
    if missing := [tensor for tensor in wanted if tensor not in found]:
      raise ValueError(f"{shard} holds no {trees.some(missing)}, though {index.name} tells so; "
                       "fetch both again")
    state |= {tensor: found[tensor] for tensor in wanted}
  return state


def _torch(way_out: str):
  """The library, which nothing but files needs."""
  try:
    import torch
  except ImportError:
    raise ValueError(way_out) from None
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
    allowed = [*harmless(), *[(cls, name) for name, cls in records.items()]]
    try:
      with torch.serialization.safe_globals(allowed):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
      break
    except Exception as error:  # a broken or hostile file may raise anything
      if not _another_record(path, str(error), records, ignore_records):
        raise _refusal(torch, path, error, allowed) from None
  if not isinstance(checkpoint, Mapping):
    raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors")
  return checkpoint


def _another_record(path, said: str, records, ignore_records) -> bool:
  """Whether reading may go on: with one more class that is stood for, or one as another kind."""
  odd = re.search(r"[Cc]an only (SETITEM|append|extend).* got <class 'stands for\.([\w.]+)'", said)
  if odd and records.get(odd[2], Dict).__mro__[1] is Record:
    records[odd[2]] = stand_in(odd[2], Dict if odd[1] == "SETITEM" else List)[0]
    return True
  found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", said)
  if not found or not ignore_records or "blocked" in said:
    return False
  cls, name = stand_in(found[1])
  return records.setdefault(name, cls) is cls


def _refusal(torch, path, error, allowed):
  # torch's own text recommends to switch the protection off.
  name = re.search(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", str(error))
  if not name:
    return ValueError(f"{path}: refused: damaged, or more than weights ({type(error).__name__}); "
                      f"{WAY_OUT}")
  if "blocked" in str(error):   # modules that torch never reads a name of, such as os
    return ValueError(f"{path}: refused: it holds more than weights, {name[1]}; {WAY_OUT}")
  try:
    with torch.serialization.safe_globals(allowed):
      names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or [name[1]]
  except Exception:   # an old torch, or an old file
    names = [name[1]]
  options = " ".join(f"--allow {name}" for name in names[:3])
  return ValueError(f"{path}: refused: it holds more than weights, {trees.some(names, 8)}; "
                    f"{WAY_OUT}, or {options} reads it without objects of these classes, or "
                    "--ignore-records without any")


def is_ours(path) -> bool:
  """Whether `vc.save` wrote a file. What `to_torch` wrote says which model it is of too, but has
  PyTorch's names."""
  path = pathlib.Path(path)
  if path.suffix != ".safetensors" or path.is_dir() or files.kind_of(path) != "safetensors":
    return False
  names, about = files.read_header(path)
  return "fields" in about and any(name.startswith("params/") for name in names)


def from_checkpoint(checkpoint, name: str | None, out, *, reset_head: bool = False,
                    force: bool = False, weights: str | None = None, dtype: str = "float32",
                    classes=None, allow_nonfinite: bool = False, ignore_records: bool = False,
                    allow: Sequence[str] = (), **fields) -> list[str]:
  """Writes the model of a checkpoint to `out`; returns lines that tell what was done.

  checkpoint, allow, ignore_records: see `read_checkpoint`.
  name: of the model that the weights are of; None for a file that `vc.save` wrote, which says so
    itself, and where timm's or transformers' config.json lies beside them.
  weights: which of several sets a checkpoint holds, such as "model" or "model_ema".
  dtype, classes: see `convert.save`. fields: as in `vc.create_model`, such as image_size=384.
  """
  path = files.weights_in(checkpoint)
  if (ours := is_ours(path)) and name is not None:
    raise ValueError(f"{checkpoint} says which model it is of; leave --model out")
  source, preprocess, lines = None, None, []
  if ours:
    source, variables = convert.load(path, allow_nonfinite=allow_nonfinite)
    state, name = convert.tensors_of(source, variables), source.variant
    model = convert.altered(source, **fields)
    if classes is None and model.num_classes == source.num_classes and not reset_head:
      classes = convert.classes_of(path)
    if "crop" in convert.read_metadata(path):
      preprocess = vc.preprocess(path)
      if model.image_size != source.image_size:   # a run's own crop is of its size of images
        preprocess = dataclasses.replace(preprocess, crop=vc.preprocess(model).crop)
  else:
    if name is None:
      told = foreign_config.read_beside(path)
      name, fields = told.model, {**told.fields, **fields}
      lines.append(told.line())
    state = read_checkpoint(path, ignore_records=ignore_records, allow=allow)
    model = vc.create_model(name, **fields)
    if lines and classes is None and told.classes and not reset_head:
      classes = told.classes if len(told.classes) == model.num_classes else None
  loaded = convert.read_state_dict(model, state, reset_head=reset_head, source=source,
                                   weights=weights, allow_nonfinite=allow_nonfinite)
  convert.save(out, model, loaded.variables, force=force, dtype=dtype, classes=classes,
               preprocess=preprocess, allow_nonfinite=allow_nonfinite)
  return [f"{out}: {name}, {trees.size(loaded.variables['params']):,} parameters", *lines,
          *loaded.lines()]


def read_for(model, path) -> dict:
  """Variables of `model` from a file of others', as `vc.from_torch` takes it and warns."""
  return vc.from_torch(model, read_checkpoint(path))


def to_torch(checkpoint, out, *, names: str = "timm", force: bool = False) -> list[str]:
  """Writes the PyTorch state dict of one of our files; returns lines that tell what was done."""
  model, variables = convert.load(checkpoint)
  state = vc.to_torch(model, variables, names=names)
  classes = convert.classes_of(checkpoint)
  about = {"classes": json.dumps(classes)} if classes else {}
  convert.write_safetensors(out, state, {**convert.metadata(model), **about}, force=force)
  return [f"{out}: {model.variant}, {len(state)} tensors"]
