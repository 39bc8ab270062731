"""Images in class folders: PATH/train/CLASS/*.jpg, with PATH/val and PATH/test beside train."""
import functools
import pathlib

import numpy as np
from absl import logging
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def split_folder(root: str, split: str) -> pathlib.Path:
  """The folder of a split. Where only one of val and test exists it serves as both.

  That is ImageNet's custom, and it means that nothing is held out: a checkpoint chosen by its
  accuracy on val has then been chosen on the images that it is reported on. A line says so.
  """
  path = pathlib.Path(root)
  if not (path / "train").is_dir():
    raise ValueError(f"no folder {path / 'train'}: 'folder:PATH' needs PATH/train/CLASS/*.jpg and "
                     "PATH/val or PATH/test of the same form")
  if (path / split).is_dir():
    return path / split
  other = path / {"val": "test", "test": "val"}[split]
  if not other.is_dir():
    raise ValueError(f"no folder {path / split}, nor {other}: one of them must hold CLASS/*.jpg")
  logging.warning("no folder %s: %s serves as both val and test", path / split, other)
  return other


@functools.cache
def list_classes(root: str) -> tuple[str, ...]:
  """The names of the class folders of train, sorted; their order is the numbering of labels."""
  train = split_folder(root, "train")
  names = tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
  if not names:
    raise ValueError(f"{train} holds no class folders: expected {train}/CLASS/*.jpg")
  return names


@functools.cache
def list_files(root: str, split: str) -> tuple[tuple[pathlib.Path, ...], np.ndarray]:
  """All images of a split, sorted by class and name, and their labels, int32."""
  folder, classes = split_folder(root, split), list_classes(root)
  unknown = sorted(e.name for e in folder.iterdir() if e.is_dir() and e.name not in classes)
  if unknown:
    raise ValueError(f"{folder / unknown[0]} is a class that {root}/train does not have: "
                     "add its training images, or remove it")
  files, labels = [], []
  for label, name in enumerate(classes):
    found = [p for p in sorted((folder / name).glob("*")) if p.suffix.lower() in SUFFIXES]
    if not found and split == "train":
      raise ValueError(f"{folder / name} holds no images ({', '.join(sorted(SUFFIXES))})")
    files += found
    labels += [label] * len(found)
  if not files:
    raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}) in class folders")
  return tuple(files), np.asarray(labels, np.int32)


class Folder:
  """Random access to one split: folder[i] -> {"image": uint8 (h, w, 3), "label": int}.

  Images keep the size that they have on disk. One that cannot be decoded whole is a ValueError
  that names it: half an image under a true label would be learned in silence.
  """

  def __init__(self, root: str, split: str):
    self.files, self.labels = list_files(root, split)
    self.class_names = list_classes(root)
    self.num_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict:
    path = self.files[index]
    try:
      with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
      raise ValueError(f"cannot read image {index}, {path}: {error}; "
                       "replace the file or delete it") from error
    return {"image": pixels, "label": int(self.labels[index])}
