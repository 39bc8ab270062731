"""Images in class folders: PATH/train/CLASS/*.jpg, with PATH/val and PATH/test beside train.

The class folders of train, sorted by name as text, are the classes: 1, 10, 2. Images are the files
that end like one (`decode.SUFFIXES`, in either case) and lie directly in a class folder. All else
is left out, and a warning counts and names it: hidden files and folders, what other programs leave
behind (.ipynb_checkpoints, __MACOSX), files that end otherwise, folders inside of a class. A val or
test without class folders is not labelled, and counts as not there.

Labels of places, for data.augment="token_labels", are looked for in PATH/label_maps/train/CLASS,
one .npy of float16 (2, 5, 18, 18) under the name of each image.
"""
import functools
import os
import pathlib
import unicodedata

import numpy as np
from absl import logging

from vitcompact.data import labels
from vitcompact.data.decode import (
    SUFFIXES,
    BadRecord,
    Example,
    as_arrays,
    printable,
    reason,
    rgb,
)

LEFT_BEHIND = {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN",
               "System Volume Information", "#recycle", "_gsdata_"}
OTHER_NAMES = {"val": ("valid", "validation", "dev"), "test": ("testing",)}


@functools.cache
def _warn(text: str) -> None:
  logging.warning("%s", text)


def other_split(split: str, where: str, why: str = "") -> str:
  """Where only one of val and test exists it serves as both, and a line says so, once.

  That is ImageNet's custom, and it means that nothing is held out: a checkpoint chosen by its
  accuracy on val has then been chosen on the images that it is reported on.
  """
  other = {"val": "test", "test": "val"}[split]
  _warn(f"{printable(where)} has no {split}{why}: {other} serves as both val and test")
  return other


def _shown(path) -> str:
  return printable(os.fspath(path))


def _entries(folder: pathlib.Path) -> list[os.DirEntry]:
  """What lies in a folder, by name."""
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError as error:
    raise ValueError(f"cannot list {_shown(folder)}: {error.strerror}; mend it, or remove it from "
                     "the data set") from error


def _hidden(name: str) -> bool:
  return name.startswith(".") or name in LEFT_BEHIND


def images_below(folder: str) -> list[str]:
  """Paths of the images in a folder and in those below it, by name; hidden ones are passed over."""
  found = []
  for entry in _entries(pathlib.Path(folder)):
    if _hidden(entry.name):
      continue
    if entry.is_dir():
      found += images_below(entry.path) if not entry.is_symlink() else []
    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
      found.append(entry.path)
  return found


def _class_folders(folder: pathlib.Path) -> tuple[str, ...]:
  """Names as they are on the disk, by which they are sorted."""
  names = []
  for entry in _entries(folder):
    if _hidden(entry.name):
      continue
    if entry.is_symlink() and not os.path.exists(entry.path):
      raise ValueError(f"{_shown(entry.path)} is a link to nothing: mend or remove it (without its "
                       "folder a class would be missing, and the others be numbered anew)")
    if os.path.isdir(entry):
      names.append(entry.name)
  return tuple(names)


def has_split(root: str, split: str) -> bool:
  """Whether PATH/split is there and labelled, that is with class folders."""
  path = pathlib.Path(root) / split
  return path.is_dir() and bool(_class_folders(path))


def split_folder(root: str, split: str) -> pathlib.Path:
  """The folder of a split; see `other_split`."""
  path = pathlib.Path(root)
  there = [entry.name for entry in _entries(path) if os.path.isdir(entry)] if path.is_dir() else []
  if not (path / "train").is_dir():
    holds = f" (PATH holds {printable(', '.join(there[:5]))}{', ...' * (len(there) > 5)})"
    raise ValueError(f"no folder {_shown(path / 'train')}: 'folder:PATH' needs PATH/train/CLASS/"
                     f"*.jpg and PATH/val or PATH/test of the same form{holds * bool(there)}")
  if split == "train" or has_split(root, split):
    return path / split
  other = {"val": "test", "test": "val"}[split]
  hints = [f"{name} is not read: rename it to {split}" for name in there
           if name != split and name.lower() in (split, *OTHER_NAMES[split])]
  hints += [f"{name} holds no class folders" for name in (split, other)
            if (path / name).is_dir() and not has_split(root, name)]
  why = f" ({'; '.join(hints)})" * bool(hints)
  if not has_split(root, other):
    raise ValueError(f"no folder {_shown(path / split)}, nor {_shown(path / other)}, with classes"
                     f"{why}: one of them must hold CLASS/*.jpg")
  return path / other_split(split, str(path), why)


@functools.cache
def list_classes(root: str) -> tuple[str, ...]:
  """The names of the class folders of train, sorted; their order is the numbering of labels.

  As they are on the disk; `class_names` has them as text.
  """
  train = split_folder(root, "train")
  names = _class_folders(train)
  if not names:
    raise ValueError(f"{_shown(train)} holds no class folders: expected {_shown(train)}/CLASS/"
                     "*.jpg")
  numbers = [int(name) for name in names if name.isdecimal()]
  if len(numbers) == len(names) and numbers != sorted(numbers):
    at = next(i for i, number in enumerate(sorted(numbers)) if numbers[i] != number)
    _warn(f"the classes of {_shown(train)} are numbers, and are sorted as text: output {at} is the "
          f"class {names[at]!r}")
  alike = {}
  for name in names:
    alike.setdefault(_folded(name), []).append(printable(name))
  for pair in (pair for pair in alike.values() if len(pair) > 1):
    _warn(f"{_shown(train)} has classes whose names differ in case or accents' form alone: "
          f"{', '.join(map(repr, pair))}; if they are one class, merge them")
  return names


def _folded(name: str) -> str:
  return unicodedata.normalize("NFC", name).casefold()


def class_names(root: str) -> tuple[str, ...]:
  """The classes in the order of their numbers, as text that any file can carry."""
  return tuple(map(printable, list_classes(root)))


class LeftOut:
  """What a listing does not use: how much of each kind, and the first of it."""

  def __init__(self):
    self.kinds: dict[str, tuple[int, str]] = {}

  def add(self, kind: str, name: str) -> None:
    count, first = self.kinds.get(kind, (0, name))
    self.kinds[kind] = count + 1, first

  def __str__(self) -> str:
    return ", ".join(f"{count} {kind} ({printable(first)}{', ...' * (count > 1)})"
                     for kind, (count, first) in sorted(self.kinds.items()))


def _images(folder: pathlib.Path, left_out: LeftOut) -> list[str]:
  """The names of the images of a class, sorted."""
  names = []
  for entry in _entries(folder):
    name, suffix = entry.name, os.path.splitext(entry.name)[1].lower()
    if _hidden(name):
      left_out.add("hidden", f"{folder.name}/{name}")
    elif entry.is_dir(follow_symlinks=False):
      left_out.add("folder inside a class", f"{folder.name}/{name}")
    elif suffix in SUFFIXES:
      names.append(name)
    else:
      left_out.add(f"*{printable(suffix)}" if suffix else "without an ending",
                   f"{folder.name}/{name}")
  return names


def _no_images(left_out: LeftOut) -> str:
  there = f", only {left_out}" if left_out.kinds else ""
  return f"holds no images (*.jpg, *.png, *.tif and others){there}"


def _check_known(folder: pathlib.Path, there, root: str, classes: tuple[str, ...]) -> None:
  """Refuses a split with classes that train does not have."""
  unknown = sorted(set(there) - set(classes))
  if unknown:
    close = [name for name in classes if _folded(name) == _folded(unknown[0])]
    way_out = (f"rename it to {printable(close[0])!r}, as it is there" if close else
               "add its training images, or remove it; if nobody knows the classes of its images, "
               f"move {_shown(folder)} elsewhere")
    raise ValueError(f"{_shown(folder / unknown[0])} is a class that {printable(root)}/train does "
                     f"not have: {way_out}")


@functools.cache
def list_files(root: str, split: str) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
  """The folder of a split; its images' names, bytes, sorted by class and name; labels, int32.

  Names are without the class, in one array: a million objects would have to be sent to each worker.
  """
  folder, classes = split_folder(root, split), list_classes(root)
  there = set(_class_folders(folder))
  _check_known(folder, there, root, classes)
  left_out, files, numbers, empty = LeftOut(), [], [], []
  for entry in _entries(folder):
    if _hidden(entry.name):
      left_out.add("hidden", entry.name)
    elif entry.name not in there:
      left_out.add("outside of the class folders", entry.name)
  for label, name in enumerate(classes):
    found = _images(folder / name, left_out) if name in there else []
    if not found:
      empty.append(name)
    files += map(os.fsencode, found)
    numbers += [label] * len(found)
  if empty and split == "train":
    _images(folder / empty[0], left_out := LeftOut())
    raise ValueError(f"{_shown(folder / empty[0])} {_no_images(left_out)}: add some, or remove the "
                     "folder if it is no class")
  if not files:
    raise ValueError(f"{_shown(folder)} {_no_images(left_out)}: expected {_shown(folder)}/CLASS/"
                     "*.jpg")
  if empty:
    _warn(f"{_shown(folder)} has no images of {len(empty)} of the {len(classes)} classes: "
          f"{', '.join(map(repr, map(printable, empty[:3])))}{', ...' * (len(empty) > 3)}")
  if left_out.kinds:
    _warn(f"{_shown(folder)}: {len(files)} images; left out: {left_out}")
  return folder, np.asarray(files), np.asarray(numbers, np.int32)


class Folder:
  """Random access to one split: folder[i] -> {"image": uint8 (h, w, 3), "label": int}.

  Images keep the size that they have on disk. One that cannot be decoded whole is a BadRecord that
  names it: half an image under a true label would be learned in silence.
  label_maps: whether labels of places are read, if the folder has any.
  """

  def __init__(self, root: str, split: str, label_maps: bool = True):
    self.folder, self.files, self.labels = list_files(root, split)
    self.class_folders, self.class_names = list_classes(root), class_names(root)
    self.num_classes = len(self.class_names)
    maps = pathlib.Path(root) / "label_maps" / self.folder.name
    self.maps = maps if label_maps and maps.is_dir() else None
    if self.maps:
      self._check_names()

  def _check_names(self) -> None:
    """Refuses two images of a class that would share one label map."""
    seen, last = {}, None   # of one class: they are sorted by class
    for index, (label, file) in enumerate(zip(self.labels.tolist(), self.files, strict=True)):
      if label != last:
        seen, last = {}, label
      other = seen.setdefault(os.path.splitext(file)[0], index)
      if other != index:
        raise ValueError(f"{_shown(self.path(other))} and {_shown(self.path(index))} would share "
                         f"the label map {_shown(self.map_path(index))}: rename one of them")

  def __len__(self) -> int:
    return len(self.files)

  def path(self, index: int) -> str:
    return os.path.join(self.folder, self.class_folders[self.labels[index]],
                        os.fsdecode(self.files[index]))

  def map_path(self, index: int) -> pathlib.Path:
    name = os.path.splitext(os.fsdecode(self.files[index]))[0]
    return self.maps / self.class_folders[self.labels[index]] / f"{name}.npy"

  def open(self, index: int) -> Example:
    path = self.path(index)
    image = rgb(path, f"image {index}, {_shown(path)}")
    return Example(image, int(self.labels[index]), self.label_map(index))

  def label_map(self, index: int) -> np.ndarray | None:
    """The image's labels of places, or None where the folder has none at all."""
    if self.maps is None:
      return None
    path = self.map_path(index)
    try:
      return labels.checked(np.load(path, allow_pickle=False), self.num_classes)
    except Exception as error:  # numpy raises many
      raise BadRecord(f"cannot read the label map of image {index}, {_shown(path)}: "
                      f"{reason(error)}; make it anew for these data, use data.augment="
                      "'randaugment', or pass over some with data.on_bad='skip'") from error

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))
