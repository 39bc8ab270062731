"""From the name of a data set to batches of uint8 images, reproducible from the seed.

The keys of a config's `data` section (all must be there; nothing has a hidden default):

  name      which data set, see sources.py
  augment   augmentation of training images on the host, see below
  workers   worker processes that decode and augment; 0: threads of this process
  on_bad    what to do about an unusable record: "stop", or "skip" to use the next one instead
  max_bad   how many records each process may skip after its start
  replicas  logical replicas of the recipe, not devices: mixing groups, see order.py (DeiT-S: 4)
  repeats   how many times in a row each image is shown: repeated augmentation      (DeiT: 3)
  eval_fit  in evaluation: "crop", or "warp" the whole image to the model's size
  eval_crop crop ratio in evaluation, 0: the model's own                            (DeiT: 0.875)
  erase     probability of random erasing                                           (DeiT: 0.25)
  smoothing label smoothing                                                         (DeiT: 0.1)
  mixup, cutmix     alpha of each, 0: off                                           (DeiT: 0.8, 1.0)

The last four are for `batch.py`, on the device, which mixes images within replicas.

Values of `augment`:

  none          resizes and crops as in evaluation, with a crop ratio of 1
  flip          mirrors half of the images
  digits        rotates, scales and shifts a little
  flip_crop     random resized crop and flip
  randaugment   flip_crop, then RandAugment: DeiT's recipe up to normalising
  pad_crop      randaugment with a shift by up to 4 pixels instead of the crop, for 32-pixel images
  colour_jitter flip_crop with colour jitter
  token_labels  LV-ViT's, with its token labels (labels.py)
"""
import dataclasses
from collections.abc import Iterable

import grain
import numpy as np
from absl import logging

from vitcompact.data import augment as aug
from vitcompact.data import labels
from vitcompact.data.batches import BAD, Batches
from vitcompact.data.decode import BadRecord, Example
from vitcompact.data.evaluation import Preprocess
from vitcompact.data.order import Order, Place
from vitcompact.data.sources import (
    ALLOWED,
    Source,
    choose,
    num_examples,
    parse,
    source,
)
from vitcompact.data.sources import SPLITS as SPLITS
from vitcompact.data.sources import class_names as class_names
from vitcompact.data.sources import num_classes as num_classes

AUGMENTS = (*aug.IMAGES, "token_labels")
ENDLESS = 2**40  # batches
TRIES = 100      # unusable records in a row that are an error
MAPS = 16        # label maps that are compared with the labels before training


def _pair(image_size) -> tuple[int, int]:
  return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
  """The rows of each batch that a process reads: the batch is split evenly over processes."""
  if batch_size % process_count:
    raise ValueError(f"{batch_size=} must be divisible by {process_count=}")
  share = batch_size // process_count
  return range(process_index * share, (process_index + 1) * share)


def stack(examples: Iterable[dict], count: int) -> dict:
  """`count` examples {name: array} -> {name: array (count, ...)}; images may be PIL images.

  Each example is copied at once, so that only one is held outside the batch.
  """
  batch = {}
  for i, example in enumerate(examples):
    for name, value in example.items():
      value = np.asarray(value)
      if name not in batch:
        batch[name] = np.empty((count, *value.shape), value.dtype)
      batch[name][i] = value
  return batch


def read(images: Source, index: int, on_bad: str) -> tuple[Example, list[int]]:
  """(image `index`, []), or (the next usable image, indices of the skipped ones) with "skip".

  The next image is usually of the same class, so that class frequencies stay about the same.
  """
  bad = []
  while True:
    try:
      return images.open(index), bad
    except BadRecord as error:
      if on_bad == "stop":
        raise
      bad.append(index)
      if len(bad) == min(TRIES, len(images)):
        raise ValueError(f"{len(bad)} records in a row cannot be used; the last: {error}") from None
      logging.warning("skipped: %s", error)
      index = (index + 1) % len(images)


@dataclasses.dataclass(frozen=True)
class TrainBatch:
  """Makes batch `step`, in any process."""
  images: Source
  order: Order
  rows: range
  image_size: tuple[int, int]
  augment: str
  on_bad: str

  def __call__(self, step: int) -> dict:
    bad = []
    examples = (self._example(self.order.place(int(step), row), bad) for row in self.rows)
    return stack(examples, len(self.rows)) | {BAD: tuple(bad)}

  def _example(self, place: Place, bad: list[int]) -> dict:
    example, skipped = read(self.images, place.index, self.on_bad)
    bad += skipped
    return self._augment(example, self.order.generator(place))

  def _augment(self, example: Example, rng: np.random.Generator) -> dict:
    if self.augment == "token_labels":
      fields = labels.augment_both(example, rng, self.image_size)
    else:
      fields = {"image": aug.IMAGES[self.augment](example.image, rng, self.image_size)}
    return fields | {"label": np.int32(example.label)}


def train_order(data, batch_size: int, seed: int) -> Order:
  """The order of images in a run. ValueError if there are fewer than one batch."""
  return Order(num_examples(data.name, "train"), batch_size, data.replicas, data.repeats, seed)


def steps_per_epoch(data, batch_size: int) -> int:
  """Whole batches in an epoch, for example 1251 for ImageNet with repeats in batches of 1024."""
  return train_order(data, batch_size, seed=0).steps_per_epoch


def _check(data) -> None:
  kind, _ = parse(data.name)
  choose("data.augment", data.augment, AUGMENTS)
  choose("data.on_bad", data.on_bad, ("stop", "skip"))
  if data.max_bad < 0:
    raise ValueError(f"data.max_bad={data.max_bad} must be 0 or more")
  if data.augment not in ALLOWED.get(kind, (data.augment,)):
    raise ValueError(f"data.augment={data.augment!r} would change the meaning of {kind}; "
                     f"use one of {', '.join(ALLOWED[kind])}")


def _check_maps(data, images: Source) -> None:
  if images.num_classes > labels.MAX_CLASSES:
    raise ValueError(f"data.augment='token_labels' takes at most {labels.MAX_CLASSES} classes, as "
                     f"float16 cannot count further, and {data.name} has {images.num_classes}; use "
                     "'randaugment'")
  if read(images, 0, data.on_bad)[0].label_map is None:
    raise ValueError(f"data.augment='token_labels' needs label maps, and {data.name} has none: see "
                     "vitcompact/data/labels.py, or use 'randaugment'")
  samples = [read(images, int(index), data.on_bad)[0]
             for index in np.linspace(0, len(images), min(MAPS, len(images)), endpoint=False)]
  matches = sum(labels.names_class(example.label_map, example.label) for example in samples)
  if matches < len(samples) / 2:
    logging.warning("the label maps of %s contain the class of their image in only %d of %d "
                    "images: were they made for classes in another order?", data.name, matches,
                    len(samples))


def train_batches(data, *, image_size, batch_size: int, seed: int, process_index: int = 0,
                  process_count: int = 1) -> Batches:
  """Endless batches {"image": uint8 (b, H, W, 3), "label": int32 (b,)}, b images of this process.

  With augment="token_labels" also "label_map", float16 (b, 2, 5, 18, 18), and "label_box",
  float32 (b, 4). `order.py` defines the order of images: a global batch is the same, augmentation
  included, for any number of processes, workers or restarts; process i of P makes the i-th of P
  equal parts of it.
  """
  _check(data)
  rows, size = _rows(batch_size, process_index, process_count), _pair(image_size)
  order = train_order(data, batch_size, seed)
  images = source(data.name, "train", image_size=size,
                  label_maps=data.augment == "token_labels")
  if data.augment == "token_labels":
    _check_maps(data, images)
  make_batch = TrainBatch(images, order, rows, size, data.augment, data.on_bad)
  return Batches(grain.MapDataset.range(ENDLESS).map(make_batch), data.workers, data.max_bad)


@dataclasses.dataclass(frozen=True)
class EvalBatch:
  """Makes batch `step` of an evaluation."""
  images: Source
  batch_size: int
  rows: range
  preprocess: Preprocess
  on_bad: str

  def __call__(self, step: int) -> dict:
    bad = []
    first = int(step) * self.batch_size
    examples = (self._example(first + row, bad) for row in self.rows)
    return stack(examples, len(self.rows)) | {BAD: tuple(bad)}

  def _example(self, index: int, bad: list[int]) -> dict:
    """Image `index`; past the last one, or for a skipped record, a black image with mask 0."""
    try:
      if index < len(self.images):
        image, label, _ = self.images.open(index)
        return {"image": self.preprocess.resize(image), "label": np.int32(label),
                "mask": np.float32(1)}
    except BadRecord as error:
      if self.on_bad == "stop":
        raise
      logging.warning("skipped: %s", error)
      bad.append(index)
    shape = *self.preprocess.image_size, len(self.preprocess.mean)
    return {"image": np.zeros(shape, np.uint8), "label": np.int32(0), "mask": np.float32(0)}


def shows_whole(name: str) -> bool:
  """Whether a data set generates images of the model's size, which evaluation must not crop."""
  return parse(name)[0] in ALLOWED


def _eval_batch(data, split, preprocess, batch_size, rows) -> EvalBatch:
  _check(data)
  images = source(data.name, split, image_size=preprocess.image_size, label_maps=False)
  if shows_whole(data.name):
    preprocess = dataclasses.replace(preprocess, crop=1.0, crop_mode="center")
  return EvalBatch(images, batch_size, rows, preprocess, data.on_bad)


def eval_batches(data, split: str, preprocess: Preprocess, *, batch_size: int,
                 process_index: int = 0, process_count: int = 1) -> Batches:
  """One pass in order: {"image": uint8 (b, H, W, C), "label": int32 (b,), "mask": float32 (b,)}.

  Images are resized by `preprocess.resize`, exactly as `vc.preprocess` does when serving. Black
  images with mask 0 fill up the last batch and replace skipped records; every process yields the
  same number of batches. Generated images (digits, shapes) have the model's size and are never
  cropped.
  """
  make_batch = _eval_batch(data, split, preprocess, batch_size,
                           _rows(batch_size, process_index, process_count))
  steps = -(-len(make_batch.images) // batch_size)
  return Batches(grain.MapDataset.range(steps).map(make_batch), data.workers, data.max_bad)


def sample(data, split: str, count: int, preprocess: Preprocess) -> np.ndarray:
  """uint8 (n, H, W, C): `count` images (or all, if there are fewer), prepared as for evaluation.

  They are evenly spread over the split, as the first images of a split are often of one class.
  """
  make_batch = _eval_batch(data, split, preprocess, 1, range(1))
  total = len(make_batch.images)
  if total < count and split == "train":
    logging.warning("%s has only %d training images, fewer than %d: all are used", data.name, total,
                    count)
  indices = np.linspace(0, total, min(count, total), endpoint=False).astype(int)
  batches = [make_batch(index) for index in indices]
  return np.concatenate([batch["image"] for batch in batches if batch["mask"][0]])
