"""Writes images into a few large files with random access, for data.name="arrayrecord:OUT".

  vitcompact prepare imagenet --tars DIR --out OUT
  vitcompact prepare folder --path PATH --out OUT
  vitcompact prepare verify --out OUT --decode

`imagenet` reads the official files without unpacking them: ILSVRC2012_img_train.tar (which contains
a tar for each class), ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which has the labels
of the val images. Their md5 sums and the numbers of images must be the published ones, except with
--unofficial, for a subset of the same form. Classes are numbered in the order of their WordNet ids,
as usual. The 50,000 validation images become the split val, which then serves as test too.

`folder` reads PATH/train/CLASS/*.jpg with PATH/val or PATH/test, and label maps, if there are any
(see vitcompact/data/folder.py). The bytes of the images are not changed.

Both write one file at a time. If they were stopped, run the same command again to resume.
`verify` reads everything: it checks sums, numbers of records, labels, and that each record is an
image (with --decode, that it decodes completely), and counts the images that have two labels.
"""
import hashlib
import io
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from PIL import Image

from vitcompact.data import decode, records
from vitcompact.data.classes import check_classes
from vitcompact.data.folder import Folder, has_split, split_folder

TRAIN, VAL, DEVKIT = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar",
                      "ILSVRC2012_devkit_t12.tar.gz")
MD5 = {TRAIN: "1d675b47d978889d74fa0da5fadfb00e", VAL: "29b22e2961454d5413ddabcf34fc5622",
       DEVKIT: "fa75699e90414af021442c21a62c3abf"}
COUNTS = {"train": 1_281_167, "val": 50_000}
CLASSES_PER_FILE = 10       # 100 files for train: a reader keeps all of them open
IMAGES_PER_FILE = 5_000     # except for ImageNet's train split


class Shard(NamedTuple):
  """A file to write: its split, its name, and a function that yields its records."""
  split: str
  file: str
  records: Callable[[], Iterator[bytes]]


def checked_image(data: bytes, name: str) -> bytes:
  """Returns the data if its first bytes are those of an image, else raises ValueError."""
  try:
    Image.open(io.BytesIO(data)).close()
  except Exception as error:
    raise ValueError(f"{decode.printable(name)} ({len(data)} bytes) is not an image: "
                     f"{decode.reason(error)}; replace or delete it") from error
  return data


# The official tars.

def open_tar(path, fileobj=None) -> tarfile.TarFile:
  try:
    return tarfile.open(path if fileobj is None else None, fileobj=fileobj)
  except FileNotFoundError:
    raise ValueError(f"no file {path}: --tars needs {TRAIN}, {VAL} and {DEVKIT}") from None
  except (tarfile.TarError, EOFError) as error:
    raise ValueError(f"{path} is damaged: {error}; download it again") from error


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  data = tar.extractfile(member).read()
  if len(data) != member.size:
    raise ValueError(f"{member.name} ends after {len(data)} of its {member.size} bytes: the tar is "
                     "truncated; download it again")
  return checked_image(data, member.name)


def files_of(tar: tarfile.TarFile, where) -> list[tarfile.TarInfo]:
  """The files in a tar, sorted by name; raises ValueError for a truncated tar."""
  try:
    return sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
  except (tarfile.TarError, EOFError) as error:
    raise ValueError(f"{where} is damaged: {error}; download it again") from error


def validation_classes(path) -> list[str]:
  """The WordNet id of each validation image, from the development kit."""
  from scipy.io import loadmat
  with open_tar(path) as tar:
    members = {pathlib.PurePath(m.name).name: m for m in files_of(tar, path)}
    try:
      numbers = tar.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read().split()
      synsets = loadmat(io.BytesIO(tar.extractfile(members["meta.mat"]).read()),
                        squeeze_me=True)["synsets"]
    except KeyError as error:
      raise ValueError(f"{path} does not contain {error.args[0]}: is it the development kit of "
                       "tasks 1 and 2?") from None
  names = {int(number): str(name)
           for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
  return [names[int(number)] for number in numbers]


def train_records(path, classes: list[str], names: dict[str, int]) -> Iterator[bytes]:
  with open_tar(path) as outer:
    for name in classes:
      member = outer.getmember(f"{name}.tar")
      with open_tar(f"{path}:{member.name}", outer.extractfile(member)) as inner:
        for image in files_of(inner, f"{path}:{member.name}"):
          yield records.pack(read_member(inner, image), names[name], image.name)


def val_records(path, members, labels: list[int]) -> Iterator[bytes]:
  with open_tar(path) as tar:
    for member in members:
      number = int(re.search(r"_(\d+)\.JPEG$", member.name)[1])
      yield records.pack(read_member(tar, member), labels[number - 1], member.name)


def imagenet_shards(tars: pathlib.Path) -> tuple[list[str], list[Shard]]:
  """(classes, files to write) from the three official files."""
  with open_tar(tars / TRAIN) as outer:
    classes = [m.name.removesuffix(".tar") for m in files_of(outer, tars / TRAIN)]
  names = {name: label for label, name in enumerate(classes)}
  shards = []
  for i in range(0, len(classes), CLASSES_PER_FILE):
    part = classes[i:i + CLASSES_PER_FILE]
    shards.append(Shard("train", f"train-{len(shards):03d}.arrayrecord",
                        lambda part=part: train_records(tars / TRAIN, part, names)))
  val_classes = validation_classes(tars / DEVKIT)
  if unknown := sorted(set(val_classes) - set(names)):
    raise ValueError(f"{tars / DEVKIT} labels a validation image as {unknown[0]}, a class that "
                     f"{tars / TRAIN} does not have")
  labels = [names[name] for name in val_classes]
  with open_tar(tars / VAL) as tar:
    members = files_of(tar, tars / VAL)
  if len(members) != len(labels):
    raise ValueError(f"{tars / VAL} has {len(members)} files, and {tars / DEVKIT} has labels for "
                     f"{len(labels)}")
  for i in range(0, len(members), IMAGES_PER_FILE):
    part = members[i:i + IMAGES_PER_FILE]
    shards.append(Shard("val", f"val-{i // IMAGES_PER_FILE:03d}.arrayrecord",
                        lambda part=part: val_records(tars / VAL, part, labels)))
  return classes, shards


def check_md5(tars: pathlib.Path, out: pathlib.Path, say) -> None:
  """Checks the md5 sums of the official files; a file that has passed is not read again."""
  known = out / "tars.json"
  try:
    verified = dict(json.loads(known.read_text())) if known.is_file() else {}
  except (ValueError, TypeError, RecursionError):
    verified = {}   # damaged: the sums are computed again
  for name, wanted in MD5.items():
    path = tars / name
    if not path.is_file():
      raise ValueError(f"no file {path}: --tars needs {', '.join(MD5)}")
    stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    if verified.get(name) == stamp:
      continue
    say(f"{path}: computing its md5 sum")
    with open(path, "rb") as file:
      md5 = hashlib.file_digest(file, "md5").hexdigest()
    if md5 != wanted:
      raise ValueError(f"{path} has the md5 sum {md5}, the official file {wanted}: download it "
                       "again, or give --unofficial for a data set of the same form")
    verified[name] = stamp
    write_json(known, verified)


# Folders.

def folder_records(images: Folder, indices: range) -> Iterator[bytes]:
  for i in indices:
    path = images.path(i)
    data = checked_image(pathlib.Path(path).read_bytes(), path)
    yield records.pack(data, int(images.labels[i]), path, images.label_map(i))


def folder_shards(path: str) -> tuple[list[str], list[Shard], dict[str, int]]:
  """(classes, files to write, number of images in each split) of class folders."""
  shards, counts = [], {}
  split_folder(path, "val")   # val or test must be there
  for split in records.SPLITS:
    if split != "train" and not has_split(path, split):
      continue
    images = Folder(path, split)
    counts[split] = len(images)
    for i in range(0, len(images), IMAGES_PER_FILE):
      indices = range(i, min(i + IMAGES_PER_FILE, len(images)))
      shards.append(Shard(split, f"{split}-{i // IMAGES_PER_FILE:03d}.arrayrecord",
                          lambda images=images, indices=indices: folder_records(images, indices)))
  return list(images.class_names), shards, counts


# Writing.

def write_json(path: pathlib.Path, value: dict) -> None:
  """Writes JSON; replaces an existing file only when the new one is completely on disk."""
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w") as file:
    json.dump(value, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def begin(out: pathlib.Path, source: str, classes: list[str]) -> dict:
  """The manifest to continue from: a new one, or that of an earlier run of the same command."""
  path = out / records.MANIFEST
  new = {"format": records.FORMAT, "source": source, "complete": False, "class_names": classes,
         "splits": {}}
  if not path.is_file():
    if any(out.glob("*.arrayrecord")):
      raise ValueError(f"{out} has ArrayRecord files but no {records.MANIFEST}: choose another "
                       "--out, or remove them")
    return new
  try:
    manifest = dict(json.loads(path.read_text()))
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(f"{path} is damaged, or another program wrote it ({error}): choose another "
                     "--out") from None
  for key in ("format", "source"):
    if manifest.get(key) != new[key]:
      raise ValueError(f"{out} was prepared from other data (its {key} differs): choose another "
                       "--out")
  check_classes(f"{out}, which an earlier run wrote,", manifest.get("class_names", ()),
                classes, "Choose another --out")
  return manifest


def write(out: pathlib.Path, source: str, classes: list[str], shards: list[Shard], say,
          counts: dict[str, int] | None = None) -> dict:
  """Writes the missing files, one at a time, and returns the manifest. counts: the number of images
  that each split must have in the end."""
  out.mkdir(parents=True, exist_ok=True)
  manifest = begin(out, source, classes)
  for number, shard in enumerate(shards, 1):
    lines = manifest["splits"].setdefault(shard.split, [])
    existing = next((line for line in lines if line["file"] == shard.file), None)
    path = out / shard.file
    if existing and path.is_file() and path.stat().st_size == existing["bytes"]:
      continue
    manifest["complete"] = False
    line = records.write_shard(path, shard.records())
    lines[:] = sorted([*(old for old in lines if old is not existing), line],
                      key=lambda line: line["file"])
    write_json(out / records.MANIFEST, manifest)
    say(f"{number}/{len(shards)} {shard.file}: {line['records']} images")
  found = {split: sum(line["records"] for line in lines)
           for split, lines in manifest["splits"].items()}
  if counts and found != counts:
    raise ValueError(f"{out} has {found} images and should have {counts}: choose another --out")
  manifest["complete"] = True
  write_json(out / records.MANIFEST, manifest)
  say(f"{decode.printable(str(out))}: {found}, {len(classes)} classes")
  return manifest


def prepare_imagenet(tars, out, *, official: bool = True, say=print) -> dict:
  tars, out = pathlib.Path(tars), pathlib.Path(out)
  if official:
    out.mkdir(parents=True, exist_ok=True)
    check_md5(tars, out, say)
  classes, shards = imagenet_shards(tars)
  return write(out, "imagenet", classes, shards, say, COUNTS if official else None)


def prepare_folder(path, out, *, say=print) -> dict:
  path = os.path.abspath(path)
  classes, shards, counts = folder_shards(path)
  return write(pathlib.Path(out), f"folder:{path}", classes, shards, say, counts)


def verify(out, *, whole_images: bool = False, say=print) -> int:
  """Reads everything back and raises ValueError for an error. Returns the number of images that
  have more than one label."""
  records.read_manifest.cache_clear()
  manifest, out = records.read_manifest(str(out)), pathlib.Path(out)
  labels_of = {}
  for split, lines in manifest["splits"].items():
    for line in lines:
      path = out / line["file"]
      if records.sha256(path) != line["sha256"]:
        raise ValueError(f"{path} does not have the sha256 of the manifest: remove it and prepare "
                         "it again")
    images = records.Records(str(out), split)
    for i in range(len(images)):
      data, label, name, _ = images.read(i)
      decode.check_label(label, images.num_classes, name)
      if whole_images:
        images.open(i)
      else:
        checked_image(data, name)
      labels_of.setdefault(hashlib.blake2b(data, digest_size=16).digest(), set()).add(label)
    say(f"{split}: {len(images)} images are unchanged since they were written")
  ambiguous = sum(len(labels) > 1 for labels in labels_of.values())
  say(f"{ambiguous} images have more than one label")
  return ambiguous
