"""Images in a few large ArrayRecord files, written by `vitcompact prepare`.

  PATH/manifest.json              the classes, and the records, bytes and sha256 of each file
  PATH/train-000.arrayrecord      a record is a msgpack dict: "image", the unchanged bytes of an
                                  image file; "label"; "name", for messages; and, with token labels,
                                  "label_map", float16 (2, 5, 18, 18) as bytes

ArrayRecord has a checksum for each record: a flipped bit is detected when the record is read.
"""
import functools
import hashlib
import io
import json
import os
import pathlib

import msgpack
import numpy as np

from vitcompact.data import labels
from vitcompact.data.decode import (
    BadRecord,
    Example,
    as_arrays,
    check_label,
    printable,
    reason,
    rgb,
)
from vitcompact.data.folder import other_split

FORMAT = "vitcompact-records-1"
MANIFEST = "manifest.json"
SPLITS = ("train", "val", "test")


def pack(image: bytes, label: int, name: str, label_map: np.ndarray | None = None) -> bytes:
  """The bytes of a record. name: of the image, for messages; it may have any characters."""
  record = {"image": image, "label": label, "name": printable(name)}
  if label_map is not None:
    record["label_map"] = labels.checked(label_map).astype("<f2").tobytes()
  return msgpack.packb(record)


def unpack(record: bytes, num_classes: int = labels.MAX_CLASSES, label_maps: bool = True):
  """The inverse of `pack`: (image, label, name, label map or None); ValueError for other bytes.

  num_classes: of the data, which limits the label maps; label_maps=False leaves them out."""
  try:
    fields = msgpack.unpackb(record)
    label_map = fields.get("label_map") if label_maps else None
    if label_map is not None:
      label_map = labels.checked(np.frombuffer(label_map, "<f2").reshape(labels.SHAPE), num_classes)
    return fields["image"], int(fields["label"]), fields["name"], label_map
  except (KeyError, TypeError, AttributeError, ValueError, msgpack.UnpackException) as error:
    raise ValueError(f"not a record of {FORMAT} ({type(error).__name__}: {error})") from error


def sha256(path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def reader(paths):
  """Random access to the bytes of all records of some files."""
  from array_record.python import array_record_data_source
  return array_record_data_source.ArrayRecordDataSource([str(path) for path in paths])


def write_shard(path: pathlib.Path, records) -> dict:
  """Writes a file completely or not at all, and returns its entry of the manifest."""
  from array_record.python import array_record_module
  partial = path.with_name(path.name + ".partial")
  writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
  count = 0
  try:
    for record in records:
      writer.write(record)
      count += 1
  finally:
    writer.close()
  if len(reader([partial])) != count:
    raise ValueError(f"{partial} holds {len(reader([partial]))} records, not the {count} written: "
                     "is the disk full?")
  with open(partial, "rb") as file:
    os.fsync(file.fileno())
  os.replace(partial, path)
  return {"file": path.name, "records": count, "bytes": path.stat().st_size, "sha256": sha256(path)}


@functools.cache
def read_manifest(root: str) -> dict:
  """The manifest of a directory, checked against the sizes of its files."""
  root = pathlib.Path(root)
  hint = "write it with `vitcompact prepare`"
  try:
    manifest = json.loads((root / MANIFEST).read_text())
  except FileNotFoundError:
    raise ValueError(f"no {root / MANIFEST}: 'arrayrecord:PATH' needs prepared files in PATH; "
                     f"{hint}") from None
  except (ValueError, OSError, RecursionError) as error:
    raise ValueError(f"{root / MANIFEST} is damaged: {reason(error)}; {hint}") from None
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    raise ValueError(f"{root / MANIFEST} is not of {FORMAT}; {hint}")
  names = manifest.get("class_names")
  if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
    raise ValueError(f"{root / MANIFEST} does not name its classes in class_names; {hint}")
  if not manifest["complete"]:
    raise ValueError(f"{root} is not complete: run the same `vitcompact prepare` again, "
                     "it continues where it stopped")
  for shard in (shard for shards in manifest["splits"].values() for shard in shards):
    path = root / shard["file"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
      raise ValueError(f"{path} has {size} bytes, not the {shard['bytes']} of the manifest: remove "
                       "it and run the same `vitcompact prepare` again")
  return manifest


def shards_of(root: str, split: str) -> list[dict]:
  """The manifest's entries of a split. If only one of val and test exists, it serves as both."""
  splits = read_manifest(root)["splits"]
  if not splits.get(split) and split != "train":
    split = other_split(split, root)
  if not splits.get(split):
    raise ValueError(f"{root} has no images of the split {split!r}, only {sorted(splits)}")
  return splits[split]


def class_names(root: str) -> tuple[str, ...]:
  return tuple(read_manifest(root)["class_names"])


class Records:
  """Random access to one split: records[i] -> {"image": uint8 (h, w, 3), "label": int}.

  label_maps: whether to read label maps, if the records have any.
  """

  def __init__(self, root: str, split: str, label_maps: bool = True):
    shards = shards_of(root, split)
    self.root, self.split, self.label_maps = root, split, label_maps
    self.class_names = class_names(root)
    self.num_classes = len(self.class_names)
    self.records = reader(pathlib.Path(root) / shard["file"] for shard in shards)
    count = sum(shard["records"] for shard in shards)
    if len(self.records) != count:
      raise ValueError(f"the files of {split} in {root} hold {len(self.records)} records, not the "
                       f"{count} of the manifest: see `vitcompact prepare verify`")

  def __len__(self) -> int:
    return len(self.records)

  def read(self, index: int):
    """(bytes of an image file, label, name, label map or None)."""
    try:
      return unpack(self.records[index], self.num_classes, self.label_maps)
    except Exception as error:  # array_record raises RuntimeError, IndexError and others
      raise BadRecord(f"cannot read record {index} of {self.split} in {self.root}: "
                      f"{reason(error)}; prepare it again, or skip bad records with "
                      "data.on_bad='skip'") from error

  def open(self, index: int) -> Example:
    data, label, name, label_map = self.read(index)
    what = f"image {index} of {self.split} in {self.root}, {name}"
    return Example(rgb(io.BytesIO(data), what), check_label(label, self.num_classes, what),
                   label_map)

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))
