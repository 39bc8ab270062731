"""Hugging Face image classification data: parquet files, read without running a loading script.

  hf:org/name[/SUBSET][@REVISION]   from the hub: read from its cache, or downloaded into it
  hf:PATH                           a folder with such files; takes precedence over a hub name

The name of a file or of its folder gives the split, as on the hub: train-00000-of-00002.parquet,
data/test-00000-of-00001.parquet, SUBSET/validation/0000.parquet. An image is a struct {bytes,
path}, and a label the number of a class. Class names are read from the file's metadata if
`datasets` wrote it; else the names are the numbers.

val is the data set's "validation" split. If it has none, every tenth image of "train" is held out
as val, and train is the rest; with @all at the end nothing is held out: train is all of "train",
and test serves as val. test is the "test" split if that has labels (hidden ones are -1), else the
same as val.

The files of a split stay in memory if they are smaller than 1 GiB in total; of larger ones, only
the most recently used row groups do.
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
# train-00000-of-00002.parquet; older files have part of a digest before the suffix.
FILE = re.compile(r"(?P<split>[a-z]+)(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]+)?)?"
                  r"\.parquet")
IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")   # preferred column names
PLAIN_FOLDERS = ("", "data")    # folders that are not subsets
CONVERTED = "refs/convert/parquet"    # the revision with the hub's own conversions to parquet
IN_MEMORY = 1 << 30     # bytes of a split's files
ROW_GROUPS = 8          # kept by each process if the files are larger


def _library(name: str, argument: str):
  """Imports a package of the extra `hf`."""
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
  """The files of a data set: {split: files in order}, and the names of other splits."""
  files: dict[str, tuple[pathlib.Path, ...]]
  others: tuple[str, ...]


def _split_all_suffix(argument: str) -> tuple[str, bool]:
  """(the argument without @all, whether it had @all)."""
  return argument.removesuffix("@all"), argument.endswith("@all")


@functools.cache
def place(argument: str) -> Place:
  """The files of the data set named after `hf:` (without @all), downloaded if necessary."""
  folder = pathlib.Path(argument).expanduser()
  if folder.is_dir():
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    scripts = sorted(path.name for path in folder.glob("*.py"))
    return _sorted_by_split(argument, folder, _files_of_subset(argument, names, scripts))
  repo, _, revision = argument.partition("@")
  parts = repo.split("/")
  if argument.startswith(("/", ".", "~")) or len(parts) not in (2, 3) or not all(parts):
    raise ValueError(f"data.name='hf:{printable(argument)}': no such folder"
                     + ("" if argument.startswith(("/", ".", "~")) else
                        ", and not a hub name: org/name, or org/name/SUBSET"))
  return _from_hub(argument, "/".join(parts[:2]), "".join(parts[2:]), revision or None)


def _files_of_subset(argument: str, names: Sequence[str], scripts: Sequence[str],
                     subset: str = ""):
  """The names of a subset's parquet files; without `subset`, there must be only one subset."""
  subsets: dict[str, list[str]] = {}
  for name in names:
    subsets.setdefault(_subset_of(name), []).append(name)
  shown = f"data.name='hf:{printable(argument)}'"
  if not names:
    why = (f" but a script, {scripts[0]}, which is not run: if the hub has converted the data "
           f"set, 'hf:org/name@{CONVERTED}' reads the result" if scripts else "")
    raise ValueError(f"{shown} has no parquet files{why}")
  if subset and subset not in subsets:
    raise ValueError(f"{shown} has no subset {subset!r}; it has "
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
  if _split_in_name(last) is None and folder.rpartition("/")[2]:
    folder = folder.rpartition("/")[0]
  return "" if folder in PLAIN_FOLDERS else folder


def _split_in_name(file: str) -> str | None:
  """The split in a file's name, or None."""
  match = FILE.fullmatch(file)
  return match["split"] if match else None


def _sorted_by_split(argument: str, folder: pathlib.Path, names: Sequence[str]) -> Place:
  found: dict[str, list[str]] = {}
  others = set()
  for name in sorted(names):
    parent, _, last = name.rpartition("/")
    split = _split_in_name(last) or parent.rpartition("/")[2]
    if split in SPLITS:
      found.setdefault(SPLITS[split], []).append(name)
    else:
      others.add(split or last)
  shown = f"data.name='hf:{printable(argument)}'"
  for files in found.values():
    counts = {int(match["count"]) for name in files
              if (match := FILE.fullmatch(name.rpartition("/")[2])) and match["count"]}
    if counts and counts != {len(files)}:
      raise ValueError(f"{shown}: there are {len(files)} files like {files[0]}, which says there "
                       f"are {' and '.join(map(str, sorted(counts)))}; download the others, or "
                       "remove those of another version")
  if "train" not in found:
    names = sorted([*found, *others])
    raise ValueError(f"{shown} has the splits {printable(', '.join(names))}; 'train' is needed, as "
                     "in train-00000-of-00001.parquet or train/0000.parquet")
  return Place({split: tuple(folder / name for name in files) for split, files in found.items()},
               tuple(sorted(others)))


def _from_hub(argument: str, repo: str, subset: str, revision: str | None) -> Place:
  hub = _library("huggingface_hub", argument)
  from huggingface_hub import errors

  shown = f"data.name='hf:{printable(argument)}'"
  where = {"repo_id": repo, "repo_type": "dataset", "revision": revision}
  pattern = f"{subset}/*.parquet" if subset else "*.parquet"
  endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
  command = " ".join(["hf download", repo, "--repo-type dataset",
                      *([f"--revision {revision}"] if revision else [])])
  try:
    listing = _list_repository(hub.HfApi(endpoint=endpoint), where)
    if listing is not None:   # raises errors before anything is downloaded
      _files_of_subset(argument, [name for name in listing if name.endswith(".parquet")],
                       [name for name in listing if name.endswith(".py")], subset)
    root = pathlib.Path(hub.snapshot_download(
        **where, allow_patterns=[pattern], endpoint=endpoint, local_files_only=listing is None))
  except errors.LocalEntryNotFoundError:
    raise FileNotFoundError(f"{shown} is not completely in the hub's cache, and the hub does not "
                            f"answer; with a network connection, download it by: {command}"
                            ) from None
  except errors.RevisionNotFoundError:
    raise ValueError(f"{shown}: the data set has no revision {revision!r}; leave it out for the "
                     "newest, or give a branch, a tag or a commit") from None
  except errors.GatedRepoError:
    raise ValueError(f"{shown} requires accepting its licence: do so on its page, then `hf auth "
                     "login`") from None
  except errors.RepositoryNotFoundError:
    raise ValueError(f"{shown}: no such folder, and no such data set on the hub, or a private one; "
                     "check the name, or `hf auth login`") from None
  except errors.HFValidationError:
    raise ValueError(f"{shown}: no such folder, and not a hub name: org/name, or org/name/SUBSET"
                     ) from None
  except errors.HfHubHTTPError as error:
    raise OSError(f"{shown}: {str(error).strip().splitlines()[0]}; try again later") from None
  names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.parquet"))
  return _sorted_by_split(argument, root, _files_of_subset(argument, names, (), subset))


def _list_repository(api, where) -> list[str] | None:
  """The names of a repository's files; None if the hub does not answer, or in offline mode.

  Errors that the hub itself answers, such as an unknown name, are raised.
  """
  from huggingface_hub import errors
  try:
    return api.list_repo_files(**where)
  except (errors.HfHubHTTPError, errors.HFValidationError):
    raise
  except Exception as error:   # from any library below: offline mode, no address, no connection
    logging.info("no answer from the hub: %s", error)
    return None


class Columns(NamedTuple):
  """The columns of a data set, and the names of its classes if they are known."""
  image: str
  label: str
  names: tuple[str, ...] | None


def _features(schema) -> dict[str, dict]:
  """{column: feature} that `datasets` wrote into a file's metadata; {} if there is none."""
  try:
    features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    return {key: value for key, value in features.items() if isinstance(value, dict)}
  except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
    return {}


def _choose_column(argument: str, what: str, found: list[str], preferred: Sequence[str],
                   schema) -> str:
  best = [name for name in preferred if name in found] or found
  if not best or (len(found) > 1 and best is found):
    kind = {"image": "an image, {bytes, path}", "label": "a label, the number of a class"}[what]
    how = "several columns that could be" if found else "no column that is"
    raise ValueError(f"data.name='hf:{printable(argument)}' has {how} {kind}: its columns are "
                     + ", ".join(f"{field.name} ({_short(field.type)})" for field in schema))
  return best[0]


def _short(kind) -> str:
  return printable(str(kind).replace("extension<", "").partition("<")[0])


@functools.cache
def columns(argument: str) -> Columns:
  """The columns, from the metadata of train's first file; reads no image."""
  import pyarrow.types as kinds
  schema = _open_parquet(argument, place(argument).files["train"][0]).schema_arrow
  features = _features(schema)
  images = [field.name for field in schema if kinds.is_struct(field.type)
            and {inner.name for inner in field.type} >= {"bytes", "path"}
            and features.get(field.name, {}).get("_type", "Image") == "Image"]
  image = _choose_column(argument, "image", images, IMAGES, schema)
  integers = [field.name for field in schema if kinds.is_integer(field.type)]
  labels = [name for name in integers if features.get(name, {}).get("_type") == "ClassLabel"]
  # Without metadata an integer may be anything: only columns named like a label are used.
  label = _choose_column(argument, "label",
                         labels or [name for name in integers if name in LABELS], LABELS, schema)
  names = features.get(label, {}).get("names")
  return Columns(image, label, tuple(map(printable, names)) if names else None)


def _open_parquet(argument: str, path: pathlib.Path):
  parquet = _library("pyarrow", argument)
  try:
    return parquet.ParquetFile(path, memory_map=True)
  except Exception as error:   # from Arrow, some of them OSErrors with long texts
    raise ValueError(f"cannot read {printable(str(path))}: {str(error).strip().splitlines()[0]}; "
                     "download it again") from None


@functools.cache
def labels(argument: str, split: str) -> np.ndarray:
  """All labels of one of the data set's own splits, int64."""
  column, parts = columns(argument).label, []
  for path in place(argument).files[split]:
    file = _open_parquet(argument, path)
    if column not in file.schema_arrow.names:
      raise ValueError(f"{printable(str(path))} has no column {column!r}, unlike train's files: "
                       "they are of different data sets")
    names = _features(file.schema_arrow).get(column, {}).get("names")
    if (tuple(map(printable, names)) if names else None) != columns(argument).names:
      raise ValueError(f"{printable(str(path))} has other classes than train's first file: they "
                       "are of different data sets")
    found = file.read([column])[column]
    if found.null_count:
      raise ValueError(f"{printable(str(path))}: {found.null_count} of its labels are missing; "
                       "remove these images, or give them labels")
    parts.append(found.to_numpy())
  return np.concatenate(parts).astype(np.int64)


def class_names(argument: str) -> tuple[str, ...]:
  """The names of a data set's classes. argument: with or without @all."""
  argument, _ = _split_all_suffix(argument)
  _library("pyarrow", argument)
  names = columns(argument).names
  return names or tuple(map(str, range(int(labels(argument, "train").max()) + 1)))


@functools.cache
def choose(argument: str, split: str) -> tuple[str, np.ndarray]:
  """(the data set's own split, indices of its images) for train, val or test."""
  argument, use_all = _split_all_suffix(argument)
  _library("pyarrow", argument)
  files = place(argument).files
  has = {key: key in files and labels(argument, key).size > 0 for key in ("train", "val", "test")}
  has["test"] = has["test"] and bool((labels(argument, "test") >= 0).all())
  if not has["train"]:
    raise ValueError(f"data.name='hf:{printable(argument)}' has no images in train")
  if use_all and not (has["val"] or has["test"]):
    raise ValueError(f"data.name='hf:{printable(argument)}@all' has neither a validation nor a "
                     "labelled test split; without @all, a tenth of train is held out")
  hold_out = not has["val"] and not use_all
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
  """Random access to the encoded images of some parquet files."""

  def __init__(self, argument: str, files: Sequence[pathlib.Path], column: str):
    self.column, self.files = column, [_open_parquet(argument, path) for path in files]
    groups = [(number, group, file.metadata.row_group(group).num_rows)
              for number, file in enumerate(self.files)
              for group in range(file.metadata.num_row_groups)]
    self.groups = [(number, group) for number, group, _ in groups]
    self.ends = np.cumsum([rows for _, _, rows in groups])
    fits = sum(path.stat().st_size for path in files) <= IN_MEMORY
    self.group = functools.lru_cache(None if fits else ROW_GROUPS)(self._group)

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
    self.name, _ = _split_all_suffix(argument)
    self.labels = labels(self.name, self.split)
    self.rows = Rows(self.name, place(self.name).files[self.split], columns(self.name).image)

  def __len__(self) -> int:
    return len(self.index)

  def open(self, index: int) -> Example:
    number = int(self.index[index])
    what = f"image {number} of {self.split} in hf:{printable(self.name)}"
    try:
      encoded = self.rows[number]
    except Exception as error:  # from Arrow
      raise BadRecord(f"cannot read {what}: {str(error).strip().splitlines()[0]}; download its "
                      "file again, or skip bad records with data.on_bad='skip'") from error
    if encoded is None:
      raise BadRecord(f"cannot read {what}: only a path to it is stored; write the data set with "
                      "the images in it, or skip bad records with data.on_bad='skip'")
    label = check_label(int(self.labels[number]), self.num_classes, what)
    return Example(rgb(io.BytesIO(encoded), what), label)

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))

  def __reduce__(self):
    """A worker process opens the files again."""
    return HfSource, self.arguments
