"""Files of named arrays: .safetensors, written atomically and checked on reading, and others."""
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vitcompact import trees

CONVERT = "vitcompact convert"   # the command that converts other files to ours
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DIGEST = "sha256"                           # its key in a file's metadata
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl")
INDEX = ".index.json"   # suffix of an index, which lists the tensors in each of several files
# Names of weights in a directory, as transformers, timm and open_clip write them, preferred first.
USUAL = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
         "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
KINDS = {
    "pytorch": "a PyTorch file", "npz": "a NumPy .npz file", "zip": "a zip archive",
    "hdf5": "an HDF5 file", "gzip": "compressed by gzip", "empty": "empty",
    "lfs": "a Git LFS pointer, which stands for the file (git lfs pull fetches it)",
    "html": "a web page, as a failed download leaves", "text": "text", "unknown": "of unknown kind",
}


def sha256(path) -> str:
  """The SHA-256 of a file's bytes, in hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path, arrays: Mapping[str, Any], about: Mapping[str, str], *,
                      force: bool = False):
  """Writes {name: array} and string metadata atomically.

  A digest of everything in the file is added to the metadata; `read_safetensors` checks it.
  """
  path = _path(path, "a path that ends in .safetensors")
  if path.suffix != ".safetensors":
    raise ValueError(f"{path}: must end in .safetensors")
  if path.exists() and not force:
    raise ValueError(f"{path} exists; give another name, or ask to overwrite it with force")
  arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  try:
    partial.touch()
    mode = partial.stat().st_mode   # by umask: safetensors would let only the owner read
    safetensors.numpy.save_file(arrays, partial,
                                metadata={**about, DIGEST: _digest(arrays, about)})
    _sort_metadata(partial)
    partial.chmod(mode)
    os.replace(partial, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise OSError(f"{path} cannot be written: {error}; make room, or name another place") from error
  finally:
    partial.unlink(missing_ok=True)


def _sort_metadata(path: pathlib.Path):
  """Sorts the metadata in a header: safetensors writes them in random order, so that files of equal
  contents would have other digests."""
  with open(path, "r+b") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size, "the same header, in another order"
    file.seek(8)
    file.write(text.ljust(size))


def read_safetensors(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """({name: array}, metadata) of a .safetensors file; ValueError if it does not match its digest.

  A file without our digest, old or from another program, is read unchecked.
  """
  with _open(path) as file:
    about = file.metadata() or {}
    arrays = {name: _tensor(path, file, name) for name in file.keys()}  # noqa: SIM118
  digest = about.pop(DIGEST, None)
  if digest not in (None, _digest(arrays, about)):
    raise ValueError(f"{path} is damaged: its contents do not match the {DIGEST} that was written "
                     "with them; copy or make the file again")
  return arrays, about


def read_header(path) -> tuple[list[str], dict[str, str]]:
  """(names, metadata) of a .safetensors file; the arrays are neither read nor checked."""
  with _open(path) as file:
    return list(file.keys()), {key: value for key, value in (file.metadata() or {}).items()
                               if key != DIGEST}


def check_ours(path, names, about):
  """Raises ValueError for .safetensors with PyTorch's names, such as timm's or `to_torch`'s."""
  ours = {"model", "fields", "plan"} <= about.keys()
  if not ours or (names and not any(name.startswith("params/") for name in names)):
    has = f"its metadata has {sorted(about)}, not model, fields, plan"
    raise ValueError(f"{path} is not one of our files: "
                     f"{has if not ours else 'it has PyTorch names'}; `{CONVERT} {path} --model "
                     f"{about.get('model', 'NAME')} --out NEW.safetensors` makes one of PyTorch "
                     "weights")


def classes_in(path, about) -> list[str] | None:
  """The class names in the metadata of one of our files, or None."""
  if "classes" not in about:
    return None
  try:
    return checked_classes(json.loads(about["classes"]),
                            json.loads(about["fields"])["num_classes"])
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise ValueError(f"{path}: its metadata has no valid class names: {error}") from None


def crop_in(path, about) -> float | None:
  """The crop in the metadata of one of our files: a share, or None if images are warped."""
  try:
    crop = json.loads(about["crop"])
  except (ValueError, RecursionError):
    crop = about["crop"]
  if crop is not None and not (type(crop) in (int, float) and 0 < crop <= 1):
    raise ValueError(f"{path}: its metadata has no valid crop: {str(crop)[:60]!r}; make the file "
                     "again")
  return crop


def checked_classes(classes, count: int) -> list[str]:
  """The class names as a list; ValueError unless there is one for each of `count` logits."""
  if isinstance(classes, (str, Mapping)) or not all(isinstance(name, str) for name in classes):
    raise ValueError("classes must be a sequence of names, in the order of the logits")
  if len(classes) != count:
    raise ValueError(f"{len(classes)} names of classes for a model with num_classes={count}")
  return list(classes)


def weights_in(path) -> pathlib.Path:
  """The file of weights, or the index of several, that a path stands for.

  For a directory, it is the file with a usual name, or the only one. Raises ValueError if a
  directory leaves the choice open, or if the file is one of several.
  """
  path = _path(path, "the path of a file")
  if path.is_dir():
    usual = [path / name for name in USUAL if (path / name).is_file()]
    inside = _weights_inside(path)
    if usual or len(inside) == 1:
      return usual[0] if usual else path / inside[0]
    has = f"choose one: {trees.excerpt(inside)}" if inside else "no file of weights is in it"
    raise ValueError(f"{path} is a directory, not a file of weights; {has}")
  if (shard := re.fullmatch(r"(.+)-\d+-of-(\d+)(\.\w+)", path.name)) and int(shard[2]) > 1:
    index = path.with_name(f"{shard[1]}{shard[3]}{INDEX}")
    if index.is_file():
      raise ValueError(f"{path} is one of {int(shard[2])} files of one model; give {index}")
  return path


def shards_of(index) -> dict[str, list[str]]:
  """{name of a file in the index's directory: names of its tensors}."""
  index = _path(index, "the path of an index")
  try:
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
  except FileNotFoundError:
    raise FileNotFoundError(f"{index}: no such file") from None
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise ValueError(f"{index} is not an index of weights, {{'weight_map': {{tensor: file}}}}: "
                     f"{type(error).__name__} {error}") from None
  shards = {}
  for tensor, file in files:
    if not isinstance(file, str) or file in ("", ".", "..") or pathlib.PurePath(file).name != file:
      raise ValueError(f"{index}: {tensor} is in {str(file)[:60]!r}, which is not the name of a "
                       "file in its directory")
    shards.setdefault(file, []).append(tensor)
  if not shards:
    raise ValueError(f"{index}: its weight_map is empty")
  return shards


def _weights_inside(path) -> list[str]:
  return [p.name for suffix in (".safetensors", ".npz", *PICKLED)
          for p in sorted(path.glob(f"*{suffix}")) if p.is_file()]


def kind_of(path) -> str:
  """What a file is, by its first bytes and then its suffix: "safetensors" or a key of `KINDS`.

  Raises ValueError or FileNotFoundError, one line, if it is not a file.
  """
  path = _path(path, "the path of a file")
  if path.is_dir():
    inside = _weights_inside(path)
    has = f"in it: {trees.excerpt(inside)}" if inside else "no file of weights is in it"
    raise ValueError(f"{path} is a directory, not a file of weights; {has}")
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  with open(path, "rb") as file:
    start = file.read(1024)
  if start[8:9] == b"{" and (path.suffix == ".safetensors" or not any(start[5:8])):
    return "safetensors"
  if start.startswith(b"PK\x03\x04"):
    return _kind_of_zip(path, start)
  if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
    return "pytorch"   # a pickle, as torch.save wrote before version 1.6
  for sign, kind in ((b"\x89HDF", "hdf5"), (b"\x1f\x8b", "gzip"),
                     (b"version https://git-lfs", "lfs")):
    if start.startswith(sign):
      return kind
  if start.lstrip()[:1] == b"<" and b"<html" in start.lower():
    return "html"
  if path.suffix in PICKLED and start:
    return "pytorch"
  return "empty" if not start else "text" if _is_text(start) else "unknown"


def _path(path, expected) -> pathlib.Path:
  if not isinstance(path, (str, os.PathLike)):
    raise ValueError(f"{type(path).__name__} given, expected {expected}")
  return pathlib.Path(path)


def _kind_of_zip(path, start):
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except zipfile.BadZipFile:   # truncated
    names = ["data.pkl"] if b"data.pkl" in start or path.suffix in PICKLED else []
  if any(name.endswith("data.pkl") for name in names):
    return "pytorch"
  return "npz" if any(name.endswith(".npy") for name in names) else "zip"


def _is_text(start):
  return all(byte >= 32 or byte in b"\t\n\r" for byte in start)


def _open(path):
  kind = kind_of(path)
  if kind in ("pytorch", "npz"):
    raise ValueError(f"{path} is {KINDS[kind]}, expected a .safetensors file of ours; `{CONVERT} "
                     f"{path} --model NAME --out NEW.safetensors` makes it")
  if kind in ("text", "unknown", "empty"):
    reason = KINDS[kind] if kind != "unknown" else "its first bytes are not those of one"
    raise ValueError(f"{path} is not a complete .safetensors file: {reason}; copy or download it "
                     "again")
  if kind != "safetensors":
    raise ValueError(f"{path} is {KINDS[kind]}, expected a .safetensors file")
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not a complete .safetensors file: {error}; copy or download it "
                     "again") from None


def _tensor(path, file, name):
  try:
    return file.get_tensor(name)
  except (AttributeError, TypeError, safetensors.SafetensorError) as error:
    # For example float8, which NumPy does not have.
    dtype = file.get_slice(name).get_dtype()
    raise ValueError(f"{path}: {name} is {dtype}, which cannot be read; save it as float32, "
                     f"float16 or bfloat16 ({error})") from None


def _digest(arrays, about) -> str:
  """sha256 of names, dtypes, shapes, values and metadata."""
  sha = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
  sha.update(trees.digest(arrays).encode())
  return sha.hexdigest()
