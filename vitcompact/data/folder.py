"""Images in class folders: PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg, PATH/test/CLASS/*.jpg.

The classes are the class folders of train, sorted by name as text: 1, 10, 2. Images are the files
directly in a class folder that have a known suffix (`decode.SUFFIXES`, in either case). Everything
else is left out, and a warning counts and names it: hidden files and folders, leftovers of other
programs (.ipynb_checkpoints, __MACOSX), files with other suffixes, folders inside a class. A val or
test folder without class folders has no labels, and is treated as missing.

Label maps, for data.augment="token_labels", are read from PATH/label_maps/train/CLASS/NAME.npy,
float16 (2, 5, 18, 18), where NAME is the name of the image without its suffix.
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
  """If only one of val and test exists, it serves as both; returns its name and warns once.

  This is common practice for ImageNet, and it means that nothing is held out: a checkpoint chosen
  by its accuracy on val is chosen on the same images on which it is reported.
  """
  other = {"val": "test", "test": "val"}[split]
  _warn(f"{printable(where)} has no {split}{why}: {other} serves as both val and test")
  return other


def _shown(path) -> str:
  return printable(os.fspath(path))


def _entries(folder: pathlib.Path) -> list[os.DirEntry]:
  """The entries of a folder, sorted by name."""
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError as error:
    raise ValueError(f"cannot list {_shown(folder)}: {error.strerror}; repair it, or remove it "
                     "from the data set") from error


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name in LEFT_BEHIND


def images_below(folder: str) -> list[str]:
  """Paths of the images in a folder and its subfolders, sorted by name, without hidden ones."""
  found = []
  for entry in _entries(pathlib.Path(folder)):
    if _is_hidden(entry.name):
      continue
    if entry.is_dir():
      found += images_below(entry.path) if not entry.is_symlink() else []
    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
      found.append(entry.path)
  return found


def _class_folders(folder: pathlib.Path) -> tuple[str, ...]:
  """The sorted names of the class folders, as they are on disk."""
  names = []
  for entry in _entries(folder):
    if _is_hidden(entry.name):
      continue
    if entry.is_symlink() and not os.path.exists(entry.path):
      raise ValueError(f"{_shown(entry.path)} is a link to nothing: repair or remove it (without "
                       "its folder a class would be missing, and the others would be renumbered)")
    if os.path.isdir(entry):
      names.append(entry.name)
  return tuple(names)


def has_split(root: str, split: str) -> bool:
  """Whether PATH/split exists and has class folders."""
  path = pathlib.Path(root) / split
  return path.is_dir() and bool(_class_folders(path))


def split_folder(root: str, split: str) -> pathlib.Path:
  """The folder of a split; see `other_split`."""
  path = pathlib.Path(root)
  subfolders = ([entry.name for entry in _entries(path) if os.path.isdir(entry)]
                if path.is_dir() else [])
  if not (path / "train").is_dir():
    holds = f" (PATH holds {printable(', '.join(subfolders[:5]))}{', ...' * (len(subfolders) > 5)})"
    raise ValueError(f"no folder {_shown(path / 'train')}: 'folder:PATH' needs PATH/train/CLASS/"
                     f"*.jpg and PATH/val or PATH/test of the same form{holds * bool(subfolders)}")
  if split == "train" or has_split(root, split):
    return path / split
  other = {"val": "test", "test": "val"}[split]
  hints = [f"{name} is not read: rename it to {split}" for name in subfolders
           if name != split and name.lower() in (split, *OTHER_NAMES[split])]
  hints += [f"{name} holds no class folders" for name in (split, other)
            if (path / name).is_dir() and not has_split(root, name)]
  why = f" ({'; '.join(hints)})" * bool(hints)
  if not has_split(root, other):
    raise ValueError(f"no folder {_shown(path / split)}, nor {_shown(path / other)}, with classes"
                     f"{why}: one of them must have CLASS/*.jpg")
  return path / other_split(split, str(path), why)


@functools.cache
def list_classes(root: str) -> tuple[str, ...]:
  """The sorted names of the class folders of train, in the order of their labels.

  These are the names on disk; `class_names` has them as text.
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
    alike.setdefault(_fold_case(name), []).append(printable(name))
  for pair in (pair for pair in alike.values() if len(pair) > 1):
    _warn(f"{_shown(train)} has classes whose names differ only in case or in the encoding of "
          f"accents: {', '.join(map(repr, pair))}; if they are one class, merge them")
  return names


def _fold_case(name: str) -> str:
  return unicodedata.normalize("NFC", name).casefold()


def class_names(root: str) -> tuple[str, ...]:
  """The names of the classes in the order of their labels, as text that is safe to write."""
  return tuple(map(printable, list_classes(root)))


class LeftOut:
  """The files that a listing does not use: the count and the first name of each kind."""

  def __init__(self):
    self.kinds: dict[str, tuple[int, str]] = {}

  def add(self, kind: str, name: str) -> None:
    count, first = self.kinds.get(kind, (0, name))
    self.kinds[kind] = count + 1, first

  def __str__(self) -> str:
    return ", ".join(f"{count} {kind} ({printable(first)}{', ...' * (count > 1)})"
                     for kind, (count, first) in sorted(self.kinds.items()))


def _images(folder: pathlib.Path, left_out: LeftOut) -> list[str]:
  """The sorted names of the images of a class."""
  names = []
  for entry in _entries(folder):
    name, suffix = entry.name, os.path.splitext(entry.name)[1].lower()
    if _is_hidden(name):
      left_out.add("hidden", f"{folder.name}/{name}")
    elif entry.is_dir(follow_symlinks=False):
      left_out.add("folder inside a class", f"{folder.name}/{name}")
    elif suffix in SUFFIXES:
      names.append(name)
    else:
      left_out.add(f"*{printable(suffix)}" if suffix else "without a suffix",
                   f"{folder.name}/{name}")
  return names


def _no_images(left_out: LeftOut) -> str:
  others = f", only {left_out}" if left_out.kinds else ""
  return f"holds no images (*.jpg, *.png, *.tif and others){others}"


def _check_known(folder: pathlib.Path, names, root: str, classes: tuple[str, ...]) -> None:
  """Raises ValueError for a split with classes that train does not have."""
  unknown = sorted(set(names) - set(classes))
  if unknown:
    close = [name for name in classes if _fold_case(name) == _fold_case(unknown[0])]
    hint = (f"rename it to {printable(close[0])!r}, as in train" if close else
               "add its training images, or remove it; if the classes of its images are unknown, "
               f"move {_shown(folder)} elsewhere")
    raise ValueError(f"{_shown(folder / unknown[0])} is a class that {printable(root)}/train does "
                     f"not have: {hint}")


@functools.cache
def list_files(root: str, split: str) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
  """(folder of a split, names of its images as bytes, sorted by class and name, labels int32).

  Names are without the class and in one array: a million objects would be slow to send to workers.
  """
  folder, classes = split_folder(root, split), list_classes(root)
  class_folders = set(_class_folders(folder))
  _check_known(folder, class_folders, root, classes)
  left_out, files, numbers, empty = LeftOut(), [], [], []
  for entry in _entries(folder):
    if _is_hidden(entry.name):
      left_out.add("hidden", entry.name)
    elif entry.name not in class_folders:
      left_out.add("outside the class folders", entry.name)
  for label, name in enumerate(classes):
    found = _images(folder / name, left_out) if name in class_folders else []
    if not found:
      empty.append(name)
    files += map(os.fsencode, found)
    numbers += [label] * len(found)
  if empty and split == "train":
    _images(folder / empty[0], left_out := LeftOut())
    raise ValueError(f"{_shown(folder / empty[0])} {_no_images(left_out)}: add some, or remove the "
                     "folder if it is not a class")
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

  Images keep the size that they have on disk. An image that cannot be decoded completely raises
  BadRecord: training on half an image would go unnoticed.
  label_maps: whether to read label maps, if the folder has any.
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
    """Raises ValueError for two images of a class that would share one label map."""
    seen, last = {}, None   # of the current class: files are sorted by class
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
    """The image's label map, or None if the folder has no label maps."""
    if self.maps is None:
      return None
    path = self.map_path(index)
    try:
      return labels.checked(np.load(path, allow_pickle=False), self.num_classes)
    except Exception as error:  # numpy raises many
      raise BadRecord(f"cannot read the label map of image {index}, {_shown(path)}: "
                      f"{reason(error)}; make it again for these data, use data.augment="
                      "'randaugment', or skip bad records with data.on_bad='skip'") from error

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))
