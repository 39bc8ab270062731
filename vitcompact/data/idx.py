"""IDX files, the format of MNIST and its family: Fashion-MNIST, KMNIST, EMNIST.

PATH contains train-images-idx3-ubyte and train-labels-idx1-ubyte, and for the test split t10k-...
or test-..., each with or without .gz. In a folder of several data sets (EMNIST's) file names have a
prefix: `idx:PATH/emnist-digits` means the files emnist-digits-train-images-idx3-ubyte and so on.

val is read from val-... if those files exist; else every tenth image of train is held out as val,
and train is the rest. Images are grey, one byte per pixel, and are converted to RGB.
"""
import functools
import gzip
import math
import os
import pathlib
import re
import struct
import zlib

import numpy as np
from PIL import Image

from vitcompact.data.decode import Example, as_arrays, printable
from vitcompact.data.folder import other_split

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val",
          "t10k": "test", "test": "test"}
# train-images-idx3-ubyte.gz; some copies have a dot before idx.
FILE = re.compile(rf"(?:(?P<set>.+)-)?(?P<split>{'|'.join(SPLITS)})-(?P<what>images|labels)"
                  r"[-.]idx\d-ubyte(?P<gz>\.gz)?")
DIMENSIONS = {"images": 3, "labels": 1}
UNSIGNED_BYTE = 8

FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist",   # Debian's since bookworm
                   "/usr/share/dataset-fashion-mnist")
FASHION_VARIABLE = "FASHION_MNIST_DIR"
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
                   "Sneaker", "Bag", "Ankle boot")


def fashion_mnist() -> str:
  """The folder of Fashion-MNIST's four files: that of the environment variable, or Debian's."""
  given = os.environ.get(FASHION_VARIABLE)
  for folder in (given,) if given else FASHION_FOLDERS:
    if pathlib.Path(folder).is_dir():
      return folder
  where = f"{FASHION_VARIABLE}={given}" if given else FASHION_FOLDERS[0]
  raise ValueError(f"data.name='fashion_mnist': no folder {where}; on Debian and Ubuntu `apt "
                   "install dataset-fashion-mnist`, elsewhere put the four files of github.com/"
                   f"zalandoresearch/fashion-mnist into a folder and set {FASHION_VARIABLE} to it")


def _parse_path(path: str) -> tuple[pathlib.Path, str | None]:
  """(folder, name of a data set in it or None) of the path after `idx:`."""
  folder = pathlib.Path(path)
  if folder.is_dir():
    return folder, None
  if folder.parent.is_dir() and any((found := FILE.fullmatch(name)) and found["set"] == folder.name
                                    for name in os.listdir(folder.parent)):
    return folder.parent, folder.name
  raise ValueError(f"data.name='idx:{printable(path)}': no such folder, and no files "
                   f"{printable(folder.name)}-train-images-idx3-ubyte[.gz] in its parent")


@functools.cache
def files(path: str) -> dict[tuple[str, str], pathlib.Path]:
  """{(split, "images" | "labels"): file}; raises ValueError if a split has only one of both."""
  folder, name = _parse_path(path)
  found, sets = {}, set()
  for entry in sorted(os.listdir(folder)):   # x comes before x.gz, which has the same content
    match = FILE.fullmatch(entry)
    if not match or (name is not None and match["set"] != name):
      continue
    sets.add(match["set"])
    found.setdefault((SPLITS[match["split"]], match["what"]), folder / entry)
  if len(sets) > 1:
    named = sorted(one or "" for one in sets)
    raise ValueError(f"data.name='idx:{printable(path)}' has several data sets; name one, as in "
                     f"'idx:{printable(path)}/{named[-1]}': {', '.join(filter(None, named))}")
  for split in ("train", "val", "test"):
    present = [what for what in DIMENSIONS if (split, what) in found]
    if len(present) == 1 or (split == "train" and not present):
      missing = next(what for what in DIMENSIONS if what not in present)
      prefix = "t10k" if split == "test" else split
      raise ValueError(f"data.name='idx:{printable(path)}' has no file of {split}'s {missing}: "
                       f"{prefix}-{missing}-idx{DIMENSIONS[missing]}-ubyte, or the same with .gz, "
                       "is needed")
  return found


def read(file: pathlib.Path, what: str) -> np.ndarray:
  """uint8 (n, height, width) of images, (n,) of labels. ValueError if the file is damaged."""
  try:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as opened:
      content = opened.read()
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"cannot read {printable(str(file))}: {error}; download it again") from None
  rank = DIMENSIONS[what]
  if len(content) < 4 * (1 + rank) or content[:4] != bytes((0, 0, UNSIGNED_BYTE, rank)):
    raise ValueError(f"{printable(str(file))} is not an IDX file of {what}: it begins with "
                     f"{content[:4].hex() or 'nothing'}, not 000008{rank:02x}")
  shape = struct.unpack(f">{rank}I", content[4:4 * (1 + rank)])
  values = np.frombuffer(content, np.uint8, offset=4 * (1 + rank))
  if len(values) != math.prod(shape):
    raise ValueError(f"{printable(str(file))} should have {' x '.join(map(str, shape))} bytes of "
                     f"data, and has {len(values)}: it is truncated or damaged; download it again")
  return values.reshape(shape)


@functools.cache
def load(path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
  """(images, labels) of a split that has files; raises ValueError if their numbers differ."""
  found = files(path)
  images, labels = (read(found[split, what], what) for what in DIMENSIONS)
  if len(images) != len(labels):
    raise ValueError(f"{printable(str(found[split, 'images']))} has {len(images)} images, and "
                     f"{found[split, 'labels'].name} {len(labels)} labels: they are of different "
                     "data sets")
  if not images.size:
    raise ValueError(f"{printable(str(found[split, 'images']))} has no pixels: {images.shape}")
  return images, labels


@functools.cache
def classes(path: str) -> int:
  """The number of classes: train's largest label plus 1."""
  return int(load(path, "train")[1].max()) + 1


def class_names(path: str) -> tuple[str, ...]:
  return tuple(map(str, range(classes(path))))


def choose(path: str, split: str) -> tuple[str, np.ndarray]:
  """(split whose files are read, indices of the images in them) for train, val or test."""
  found = files(path)
  own_val = ("val", "images") in found
  chosen = split
  if split == "test" and ("test", "images") not in found:
    chosen = other_split("test", f"idx:{path}")
  if chosen == "val" and not own_val:
    chosen = "train"
  index = np.arange(len(load(path, chosen)[1]))
  if chosen == "train" and not own_val:
    index = index[(index % 10 == 9) == (split != "train")]
  return chosen, index


class Idx:
  """Random access to one split: idx[i] -> {"image": uint8 (h, w, 3), "label": int}."""

  def __init__(self, path: str, split: str, names: tuple[str, ...] = ()):
    self.arguments = path, split, names
    self.class_names = names or class_names(path)
    self.num_classes = len(self.class_names)
    chosen, index = choose(path, split)
    images, labels = load(path, chosen)
    if labels.max() >= self.num_classes:
      known = f"train's are 0..{classes(path) - 1}" if not names else ", ".join(names)
      raise ValueError(f"{printable(str(files(path)[chosen, 'labels']))} has the label "
                       f"{labels.max()}, and there are {self.num_classes} classes ({known})")
    self.images, self.labels = images[index], labels[index]

  def __len__(self) -> int:
    return len(self.labels)

  def open(self, index: int) -> Example:
    return Example(Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index]))

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))

  def __reduce__(self):
    """A worker process reads the files again."""
    return Idx, self.arguments
