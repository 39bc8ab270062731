"""LV-ViT's token labels, on the host: a label map is augmented together with its image.

A label map is float16 (2, 5, 18, 18): for each of 18 x 18 positions of the whole image, the five
highest logits of an annotating network and their classes (whole numbers up to 2048 are exact in
float16). Outside the image all values are 0, which favours no class after the softmax of
`batch.label_targets`.

The published order differs from DeiT's: flip, RandAugment on the image in its full size, then the
random resized crop, each with bilinear or bicubic resampling at random. Flips and affine operations
are applied to the map too (nearest position); the crop is not: its box is returned instead. The
authors pass their box (top, left, height, width) to a function that takes (x1, y1, x2, y2), so that
the map and the image are cropped differently. Here the box is (left, top, right, bottom).
"""
import numpy as np
from PIL import Image, ImageOps

from vitcompact.data import augment, randaugment
from vitcompact.data.decode import Example

SHAPE = (2, 5, 18, 18)
MAX_CLASSES = 2049  # 0 to 2048: float16 rounds larger numbers to other classes
RESAMPLE = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def move_map(label_map: np.ndarray, matrix, width: int, height: int) -> np.ndarray:
  """The map (..., h, w) of a transformed image, whose pixel (x, y) comes from matrix * (x, y)."""
  h, w = label_map.shape[-2:]
  a, b, c, d, e, f = matrix
  y, x = np.mgrid[:h, :w] + 0.5  # centres of positions
  x, y = x * (width / w), y * (height / h)
  x, y = a * x + b * y + c, d * x + e * y + f
  column, row = (np.floor(v * n / size).astype(int) for v, n, size in ((x, w, width),
                                                                       (y, h, height)))
  inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
  moved = label_map[..., np.clip(row, 0, h - 1), np.clip(column, 0, w - 1)]
  return np.where(inside, moved, 0).astype(label_map.dtype)


def augment_both(example: Example, rng: np.random.Generator, image_size: tuple[int, int]) -> dict:
  """{"image", "label_map", "label_box"}; label_box: float32 (4,), in shares of the whole image."""
  image, label_map = example.image, example.label_map
  if rng.random() < 0.5:
    image, label_map = ImageOps.mirror(image), label_map[..., ::-1]
  for name, m in randaugment.draw(rng):
    op = randaugment.OPS[name]
    argument = op.argument(m)
    image = randaugment.apply(name, argument, image, RESAMPLE[rng.integers(2)])
    if op.matrix:
      label_map = move_map(label_map, op.matrix(argument, *image.size), *image.size)
  box = augment.crop_box(*image.size, rng)
  small = augment.resized_crop(image, box, image_size, RESAMPLE[rng.integers(2)])
  return {"image": small, "label_map": np.ascontiguousarray(label_map),
          "label_box": np.float32(np.divide(box, image.size * 2))}


def names_class(label_map: np.ndarray, label: int) -> bool:
  """Whether a label map contains a class, at any position."""
  return bool(((label_map[1] == label) & (label_map[0] != 0)).any())


def checked(label_map: np.ndarray, num_classes: int = MAX_CLASSES) -> np.ndarray:
  """Returns the map if it fits a data set with `num_classes` classes, else raises ValueError."""
  if label_map.shape != SHAPE or label_map.dtype != np.float16:
    raise ValueError(f"it is {label_map.dtype} {label_map.shape}, not float16 {SHAPE}")
  if not np.isfinite(label_map).all():
    raise ValueError("it has values that are not finite")
  classes = label_map[1]
  if (classes != np.floor(classes)).any() or classes.min() < 0 or classes.max() >= num_classes:
    wrong = next(c for c in classes.flat if c != np.floor(c) or not 0 <= c < num_classes)
    raise ValueError(f"it contains the class {wrong:g}, and the data have 0..{num_classes - 1}: it "
                     "was made for other classes")
  return label_map
