"""Images in class folders: PATH/train/CLASS/*.jpg, with PATH/val and PATH/test beside train.

Labels of places, for data.augment="token_labels", are looked for in PATH/label_maps/train/CLASS,
one .npy of float16 (2, 5, 18, 18) under the name of each image.
"""
import functools
import os
import pathlib

import numpy as np
from absl import logging

from vitcompact.data import labels
from vitcompact.data.decode import BadRecord, Example, as_arrays, rgb

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@functools.cache
def other_split(split: str, where: str) -> str:
  """Where only one of val and test exists it serves as both, and a line says so, once.

  That is ImageNet's custom, and it means that nothing is held out: a checkpoint chosen by its
  accuracy on val has then been chosen on the images that it is reported on.
  """
  other = {"val": "test", "test": "val"}[split]
  logging.warning("%s has no %s: %s serves as both val and test", where, split, other)
  return other


def split_folder(root: str, split: str) -> pathlib.Path:
  """The folder of a split; see `other_split`."""
  path = pathlib.Path(root)
  if not (path / "train").is_dir():
    raise ValueError(f"no folder {path / 'train'}: 'folder:PATH' needs PATH/train/CLASS/*.jpg and "
                     "PATH/val or PATH/test of the same form")
  if (path / split).is_dir():
    return path / split
  other = path / {"val": "test", "test": "val"}[split]
  if not other.is_dir():
    raise ValueError(f"no folder {path / split}, nor {other}: one of them must hold CLASS/*.jpg")
  return path / other_split(split, str(path))


@functools.cache
def list_classes(root: str) -> tuple[str, ...]:
  """The names of the class folders of train, sorted; their order is the numbering of labels."""
  train = split_folder(root, "train")
  names = tuple(sorted(entry.name for entry in os.scandir(train) if entry.is_dir()))
  if not names:
    raise ValueError(f"{train} holds no class folders: expected {train}/CLASS/*.jpg")
  return names


@functools.cache
def list_files(root: str, split: str) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
  """The folder of a split; its images' names, bytes, sorted by class and name; labels, int32.

  Names are without the class, in one array: a million objects would have to be sent to each worker.
  """
  folder, classes = split_folder(root, split), list_classes(root)
  unknown = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name not in classes)
  if unknown:
    raise ValueError(f"{folder / unknown[0]} is a class that {root}/train does not have: "
                     "add its training images, or remove it")
  files, numbers = [], []
  for label, name in enumerate(classes):
    there = os.listdir(folder / name) if (folder / name).is_dir() else []
    found = sorted(file for file in there if os.path.splitext(file)[1].lower() in SUFFIXES)
    if not found and split == "train":
      raise ValueError(f"{folder / name} holds no images ({', '.join(sorted(SUFFIXES))})")
    files += map(os.fsencode, found)
    numbers += [label] * len(found)
  if not files:
    raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}) in class folders")
  return folder, np.asarray(files), np.asarray(numbers, np.int32)


class Folder:
  """Random access to one split: folder[i] -> {"image": uint8 (h, w, 3), "label": int}.

  Images keep the size that they have on disk. One that cannot be decoded whole is a BadRecord that
  names it: half an image under a true label would be learned in silence.
  """

  def __init__(self, root: str, split: str):
    self.folder, self.files, self.labels = list_files(root, split)
    self.class_names = list_classes(root)
    self.num_classes = len(self.class_names)
    maps = pathlib.Path(root) / "label_maps" / self.folder.name
    self.maps = maps if maps.is_dir() else None

  def __len__(self) -> int:
    return len(self.files)

  def path(self, index: int) -> str:
    return os.path.join(self.folder, self.class_names[self.labels[index]],
                        os.fsdecode(self.files[index]))

  def open(self, index: int) -> Example:
    path = self.path(index)
    image = rgb(path, f"image {index}, {path}")
    return Example(image, int(self.labels[index]), self.label_map(index))

  def label_map(self, index: int) -> np.ndarray | None:
    """The image's labels of places, or None where the folder has none at all."""
    if self.maps is None:
      return None
    path = self.maps / self.class_names[self.labels[index]] / os.fsdecode(self.files[index])
    path = path.with_suffix(".npy")
    try:
      return labels.checked(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
      raise BadRecord(f"cannot read the label map of image {index}, {path}: {error}") from error

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))
