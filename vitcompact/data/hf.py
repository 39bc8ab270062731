"""Hugging Face's image classification sets: parquet files, read without running a loading script.

  hf:org/name[/SUBSET][@REVISION]   of the hub: from its cache, or downloaded into it
  hf:PATH                           a folder with such files; a folder goes before a name of the hub

Whose images a file holds is told by its name, or its folder's, as on the hub:
train-00000-of-00002.parquet, data/test-00000-of-00001.parquet, SUBSET/validation/0000.parquet.
An image is a struct {bytes, path}, a label the number of a class, whose names are in the file's
metadata if `datasets` wrote it; else classes are called by their numbers.

val is the set's "validation" where it has one. Else every tenth image of its train is held out,
and train is the others. test is the set's "test" where that has labels (hidden ones are -1), else
what val is. With @all at the end nothing is held out: train is the whole, and test serves as val.

Files of a split are kept in memory where they have less than 1 GiB; of larger ones the row groups
that were read last are.
"""
import functools
import io
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from vitcompact.data.decode import BadRecord, Example, as_arrays, check_label, printable, rgb
from vitcompact.data.folder import other_split

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "eval": "test", "evaluation": "test", "val": "val", "valid": "val", "validation": "val",
          "dev": "val"}
# train-00000-of-00002.parquet; older files have the start of a digest after that.
FILE = re.compile(r"(?P<split>[a-z]+)(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]+)?)?"
                  r"\.parquet")
IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")   # of several, these
PLAIN_FOLDERS = ("", "data")    # which are no subset's
CONVERTED = "refs/convert/parquet"    # where the hub keeps what it made of other files
IN_MEMORY = 1 << 30     # bytes of a split's files
ROW_GROUPS = 8          # of larger ones, kept by each process


def _library(name: str, argument: str):
  """The extra's packages, imported by who uses them."""
  try:
    if name == "pyarrow":
      from pyarrow import parquet
      return parquet
    import huggingface_hub
    return huggingface_hub
  except ImportError:
    raise ValueError(f"data.name='hf:{printable(argument)}' needs {name}, which is not installed: "
                     "pip install 'vitcompact[hf]'") from None


class Place(NamedTuple):
  """Where a set lies: {split: files}, in their order, and the splits that are none of ours."""
  files: dict[str, tuple[pathlib.Path, ...]]
  others: tuple[str, ...]


def _parted(argument: str) -> tuple[str, bool]:
  """(argument without @all, whether it had it)."""
  return argument.removesuffix("@all"), argument.endswith("@all")


@functools.cache
def place(argument: str) -> Place:
  """The files of what stands after `hf:`, without @all; downloaded where they are not here."""
  folder = pathlib.Path(argument).expanduser()
  if folder.is_dir():
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    scripts = sorted(path.name for path in folder.glob("*.py"))
    return _sorted_by_split(argument, folder, _chosen(argument, names, scripts))
  repo, _, revision = argument.partition("@")
  parts = repo.split("/")
  if argument.startswith(("/", ".", "~")) or len(parts) not in (2, 3) or not all(parts):
    raise ValueError(f"data.name='hf:{printable(argument)}': no such folder"
                     + ("" if argument.startswith(("/", ".", "~")) else
                        ", and no name of the hub: org/name, or org/name/SUBSET"))
  return _of_hub(argument, "/".join(parts[:2]), "".join(parts[2:]), revision or None)


def _chosen(argument: str, names: Sequence[str], scripts: Sequence[str], subset: str = ""):
  """Of the names of parquet files those of the one subset."""
  subsets: dict[str, list[str]] = {}
  for name in names:
    subsets.setdefault(_subset_of(name), []).append(name)
  shown = f"data.name='hf:{printable(argument)}'"
  if not names:
    why = (f" but a script, {scripts[0]}, which is not run: if the hub has converted the set, "
           f"'hf:org/name@{CONVERTED}' reads that" if scripts else "")
    raise ValueError(f"{shown} has no parquet files{why}")
  if subset and subset not in subsets:
    raise ValueError(f"{shown} has no subset {subset!r}, but "
                     f"{', '.join(filter(None, subsets)) or 'none'}")
  if not subset and len(subsets) > 1:
    named = sorted(filter(None, subsets))
    raise ValueError(f"{shown} has several subsets; name one, as in 'hf:"
                     f"{printable(_with_subset(argument, named[0]))}': {', '.join(named)}")
  return subsets[subset] if subset else next(iter(subsets.values()))


def _with_subset(argument: str, subset: str) -> str:
  repo, at, revision = argument.partition("@")
  return f"{repo}/{subset}{at}{revision}"


def _subset_of(name: str) -> str:
  """"" of data/train-00000-of-00001.parquet, "a" of a/train-... and of a/train/0000.parquet."""
  folder, _, last = name.rpartition("/")
  if _own_split(last) is None and folder.rpartition("/")[2]:
    folder = folder.rpartition("/")[0]
  return "" if folder in PLAIN_FOLDERS else folder


def _own_split(file: str) -> str | None:
  """The split that a file's name tells."""
  match = FILE.fullmatch(file)
  return match["split"] if match else None


def _sorted_by_split(argument: str, folder: pathlib.Path, names: Sequence[str]) -> Place:
  found: dict[str, list[str]] = {}
  others = set()
  for name in sorted(names):
    above, _, last = name.rpartition("/")
    own = _own_split(last) or above.rpartition("/")[2]
    if own in SPLITS:
      found.setdefault(SPLITS[own], []).append(name)
    else:
      others.add(own or last)
  shown = f"data.name='hf:{printable(argument)}'"
  for files in found.values():
    counts = {int(match["count"]) for name in files
              if (match := FILE.fullmatch(name.rpartition("/")[2])) and match["count"]}
    if counts and counts != {len(files)}:
      raise ValueError(f"{shown}: there are {len(files)} files like {files[0]}, which tells of "
                       f"{' and of '.join(map(str, sorted(counts)))}; fetch the others, or remove "
                       "those of another version")
  if "train" not in found:
    there = sorted([*found, *others])
    raise ValueError(f"{shown} has the splits {printable(', '.join(there))}; 'train' is needed, as "
                     "in train-00000-of-00001.parquet or train/0000.parquet")
  return Place({split: tuple(folder / name for name in files) for split, files in found.items()},
               tuple(sorted(others)))


def _of_hub(argument: str, repo: str, subset: str, revision: str | None) -> Place:
  hub = _library("huggingface_hub", argument)
  from huggingface_hub import errors

  shown = f"data.name='hf:{printable(argument)}'"
  where = {"repo_id": repo, "repo_type": "dataset", "revision": revision}
  pattern = f"{subset}/*.parquet" if subset else "*.parquet"
  endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
  command = " ".join(["hf download", repo, "--repo-type dataset",
                      *([f"--revision {revision}"] if revision else [])])
  try:
    there = _listed(hub.HfApi(endpoint=endpoint), where)
    if there is not None:   # refused before anything is downloaded
      _chosen(argument, [name for name in there if name.endswith(".parquet")],
              [name for name in there if name.endswith(".py")], subset)
    root = pathlib.Path(hub.snapshot_download(
        **where, allow_patterns=[pattern], endpoint=endpoint, local_files_only=there is None))
  except errors.LocalEntryNotFoundError:
    raise FileNotFoundError(f"{shown} is not in the hub's cache, or not whole, and there is no "
                            f"answer from the hub; with a network this fetches it: {command}"
                            ) from None
  except errors.RevisionNotFoundError:
    raise ValueError(f"{shown}: the set has no revision {revision!r}; leave it out for the newest, "
                     "or give a branch, a tag or a commit") from None
  except errors.GatedRepoError:
    raise ValueError(f"{shown} wants its licence accepted: do so on its page, then `hf auth login`"
                     ) from None
  except errors.RepositoryNotFoundError:
    raise ValueError(f"{shown}: no such folder, and no such set on the hub, or a private one; "
                     "check the name, or `hf auth login`") from None
  except errors.HFValidationError:
    raise ValueError(f"{shown}: no such folder, and no name of the hub: org/name, or "
                     "org/name/SUBSET") from None
  except errors.HfHubHTTPError as error:
    raise OSError(f"{shown}: {str(error).strip().splitlines()[0]}; try again later") from None
  names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.parquet"))
  return _sorted_by_split(argument, root, _chosen(argument, names, (), subset))


def _listed(api, where) -> list[str] | None:
  """The names of a repository's files; None where the hub gives no answer, or is not to be asked.

  What the hub does answer, such as that there is no such set, is raised.
  """
  from huggingface_hub import errors
  try:
    return api.list_repo_files(**where)
  except (errors.HfHubHTTPError, errors.HFValidationError):
    raise
  except Exception as error:   # of whichever library asks: offline, no address, no connection
    logging.info("no answer from the hub: %s", error)
    return None


class Columns(NamedTuple):
  """A set's columns, and the names of its classes where they are told."""
  image: str
  label: str
  names: tuple[str, ...] | None


def _told_features(schema) -> dict[str, dict]:
  """{column: feature} that `datasets` wrote into a file's metadata."""
  try:
    told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    return {key: value for key, value in told.items() if isinstance(value, dict)}
  except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
    return {}


def _one(argument: str, what: str, found: list[str], known: Sequence[str], schema) -> str:
  best = [name for name in known if name in found] or found
  if not best or (len(found) > 1 and best is found):
    wanted = {"image": "an image, {bytes, path}", "label": "a label, the number of a class"}[what]
    how = "several columns that could be" if found else "no column that is"
    raise ValueError(f"data.name='hf:{printable(argument)}' has {how} {wanted}: its columns are "
                     + ", ".join(f"{field.name} ({_short(field.type)})" for field in schema))
  return best[0]


def _short(kind) -> str:
  return printable(str(kind).replace("extension<", "").partition("<")[0])


@functools.cache
def columns(argument: str) -> Columns:
  """Read off the metadata of train's first file; no image is read."""
  import pyarrow.types as kinds
  schema = _opened(argument, place(argument).files["train"][0]).schema_arrow
  told = _told_features(schema)
  images = [field.name for field in schema if kinds.is_struct(field.type)
            and {inner.name for inner in field.type} >= {"bytes", "path"}
            and told.get(field.name, {}).get("_type", "Image") == "Image"]
  image = _one(argument, "image", images, IMAGES, schema)
  whole = [field.name for field in schema if kinds.is_integer(field.type)]
  labels = [name for name in whole if told.get(name, {}).get("_type") == "ClassLabel"]
  # Without metadata a number may be anything: only a column that is called a label is one.
  label = _one(argument, "label", labels or [name for name in whole if name in LABELS], LABELS,
               schema)
  names = told.get(label, {}).get("names")
  return Columns(image, label, tuple(map(printable, names)) if names else None)


def _opened(argument: str, path: pathlib.Path):
  parquet = _library("pyarrow", argument)
  try:
    return parquet.ParquetFile(path, memory_map=True)
  except Exception as error:   # of Arrow, some of them OSErrors of many lines
    raise ValueError(f"cannot read {printable(str(path))}: {str(error).strip().splitlines()[0]}; "
                     "fetch it again") from None


@functools.cache
def labels(argument: str, split: str) -> np.ndarray:
  """All labels of one of the set's own splits, int64."""
  column, parts = columns(argument).label, []
  for path in place(argument).files[split]:
    file = _opened(argument, path)
    if column not in file.schema_arrow.names:
      raise ValueError(f"{printable(str(path))} has no column {column!r}, as train's files have: "
                       "they are of two sets")
    told = _told_features(file.schema_arrow).get(column, {}).get("names")
    if (tuple(map(printable, told)) if told else None) != columns(argument).names:
      raise ValueError(f"{printable(str(path))} has other classes than train's first file: they "
                       "are of two sets")
    found = file.read([column])[column]
    if found.null_count:
      raise ValueError(f"{printable(str(path))}: {found.null_count} of its labels are missing; "
                       "remove these images, or give them labels")
    parts.append(found.to_numpy())
  return np.concatenate(parts).astype(np.int64)


def class_names(argument: str) -> tuple[str, ...]:
  """argument: with or without @all."""
  argument, _ = _parted(argument)
  _library("pyarrow", argument)
  names = columns(argument).names
  return names or tuple(map(str, range(int(labels(argument, "train").max()) + 1)))


@functools.cache
def choose(argument: str, split: str) -> tuple[str, np.ndarray]:
  """(the set's own split, which of its images) for train, val or test."""
  argument, everything = _parted(argument)
  _library("pyarrow", argument)
  files = place(argument).files
  has = {key: key in files and labels(argument, key).size > 0 for key in ("train", "val", "test")}
  has["test"] = has["test"] and bool((labels(argument, "test") >= 0).all())
  if not has["train"]:
    raise ValueError(f"data.name='hf:{printable(argument)}' has no images in train")
  if everything and not (has["val"] or has["test"]):
    raise ValueError(f"data.name='hf:{printable(argument)}@all' has neither a validation nor a "
                     "labelled test; leave @all out, and a tenth of train is held out")
  hold_out = not has["val"] and not everything
  chosen = split
  if split == "test" and not has["test"]:
    chosen = other_split(split, f"hf:{argument}")
  if chosen == "val" and not has["val"]:
    chosen = "train" if hold_out else other_split("val", f"hf:{argument}")
  index = np.arange(len(labels(argument, chosen)))
  if hold_out and chosen == "train":
    index = index[(index % 10 == 9) == (split != "train")]
  return chosen, index


class Rows:
  """Random access to the images of some parquet files, as they are encoded."""

  def __init__(self, argument: str, files: Sequence[pathlib.Path], column: str):
    self.column, self.files = column, [_opened(argument, path) for path in files]
    groups = [(number, group, file.metadata.row_group(group).num_rows)
              for number, file in enumerate(self.files)
              for group in range(file.metadata.num_row_groups)]
    self.groups = [(number, group) for number, group, _ in groups]
    self.ends = np.cumsum([rows for _, _, rows in groups])
    small = sum(path.stat().st_size for path in files) <= IN_MEMORY
    self.group = functools.lru_cache(None if small else ROW_GROUPS)(self._group)

  def _group(self, at: int):
    number, group = self.groups[at]
    return self.files[number].read_row_group(group, [self.column])[self.column]

  def __getitem__(self, row: int) -> bytes | None:
    at = int(np.searchsorted(self.ends, row, side="right"))
    first = int(self.ends[at - 1]) if at else 0
    return (self.group(at)[row - first].as_py() or {}).get("bytes")


class HfSource:
  """Random access to one split: source[i] -> {"image": uint8 (h, w, 3), "label": int}."""

  def __init__(self, argument: str, split: str):
    self.arguments = argument, split
    self.split, self.index = choose(argument, split)
    self.class_names = class_names(argument)
    self.num_classes = len(self.class_names)
    self.name, _ = _parted(argument)
    self.labels = labels(self.name, self.split)
    self.rows = Rows(self.name, place(self.name).files[self.split], columns(self.name).image)

  def __len__(self) -> int:
    return len(self.index)

  def open(self, index: int) -> Example:
    number = int(self.index[index])
    what = f"image {number} of {self.split} in hf:{printable(self.name)}"
    try:
      encoded = self.rows[number]
    except Exception as error:  # of Arrow
      raise BadRecord(f"cannot read {what}: {str(error).strip().splitlines()[0]}; fetch its file "
                      "again, or pass over some with data.on_bad='skip'") from error
    if encoded is None:
      raise BadRecord(f"cannot read {what}: only a path to it is stored; write the set with its "
                      "images in it, or pass over some with data.on_bad='skip'")
    label = check_label(int(self.labels[number]), self.num_classes, what)
    return Example(rgb(io.BytesIO(encoded), what), label)

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))

  def __reduce__(self):
    """A worker process opens the files again."""
    return HfSource, self.arguments
