"""The 1,797 handwritten digits that come with scikit-learn: real images, no download."""
import functools

import numpy as np
from PIL import Image

from vitcompact.data.decode import Example, as_arrays

FOLDS = 5


@functools.cache
def _images_and_labels() -> tuple[np.ndarray, np.ndarray]:
  """uint8 (1797, 8, 8) in 0..255 and int (1797,), in scikit-learn's order."""
  from sklearn.datasets import load_digits  # a second of import that only this data set pays
  digits = load_digits()
  return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


@functools.cache
def split_indices(split: str, fold: int = 0) -> np.ndarray:
  """The indices of the images in a split: 1,257 train, 180 val, 360 test, fixed for ever.

  Images are sorted by class (keeping scikit-learn's order within a class). Of each ten consecutive
  ones, numbers 0 and 5 are test, number 2 is val and the others train, so that class frequencies
  are the same in all three to within one image. The writers are not recorded, and probably appear
  in all three splits: test has new images, but not new writers.

  Fold k shifts these numbers by k: each image is in the test split of one of the five folds, whose
  sizes differ by an image or two.
  """
  by_class = np.argsort(_images_and_labels()[1], kind="stable")
  tenth = np.arange(len(by_class)) % 10
  test, val = tenth % 5 == fold, tenth == (fold + 2) % 10
  return by_class[{"test": test, "val": val, "train": ~test & ~val}[split]]


class Digits:
  """Random access to one split: digits[i] -> {"image": uint8 (height, width, 3), "label": int}."""
  class_names = tuple("0123456789")
  num_classes = 10

  def __init__(self, split: str, image_size: tuple[int, int], fold: int = 0):
    indices = split_indices(split, fold)
    self.images, self.labels = (array[indices] for array in _images_and_labels())
    self.image_size = image_size

  def __len__(self) -> int:
    return len(self.labels)

  def open(self, index: int) -> Example:
    height, width = self.image_size
    gray = Image.fromarray(self.images[index]).resize((width, height), Image.Resampling.BICUBIC)
    return Example(gray.convert("RGB"), int(self.labels[index]))

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))
