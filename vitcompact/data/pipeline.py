"""From the name of a data set to batches of uint8 images, the same ones whenever asked again.

The keys of a config's `data` section (all must be there; nothing has a hidden default):

  name      which data set, see sources.py
  augment   of training images, on the host: see below
  workers   worker processes that decode and augment; 0: threads of this process
  on_bad    a record that cannot be used: "stop", or "skip" for the next one in its place
  max_bad   records that may be passed over at the most, by each process since its start
  replicas  of the recipe, not of the hardware: who shares a mix, see order.py  (DeiT-S: 4)
  repeats   showings of an image in a row                                       (DeiT: 3)
  eval_fit  in evaluation, "crop", or "warp" the whole image to the model's size
  eval_crop share of the image that evaluation crops, 0: the model's own        (DeiT: 0.875)
  erase     probability of random erasing                                       (DeiT: 0.25)
  smoothing label smoothing                                                     (DeiT: 0.1)
  mixup, cutmix     the alphas of the two mixes, 0: off                         (DeiT: 0.8, 1.0)

The last four are for `batch.py`, on the device; it mixes in groups that are the replicas.

What `augment` does: "flip" mirrors every other image; "digits" turns, scales and shifts a little;
"flip_crop" is a random resized crop and a flip; "randaugment" is these two and then RandAugment,
which is DeiT's recipe up to normalising; "pad_crop" is the same with a shift by up to 4 pixels in
place of the crop, for images of 32 pixels; "colour_jitter" is flip_crop with jitter; "token_labels"
is LV-ViT's, with its labels of places (labels.py). "none" resizes and crops as in evaluation,
without a margin.
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
TRIES = 100      # records in a row that cannot be used
MAPS = 16        # label maps that are compared with the labels before training


def _pair(image_size) -> tuple[int, int]:
  return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
  """Which images of each batch a process reads: one of as many equal parts as there are."""
  if batch_size % process_count:
    raise ValueError(f"{batch_size=} must be divisible by {process_count=}")
  share = batch_size // process_count
  return range(process_index * share, (process_index + 1) * share)


def stack(examples: Iterable[dict], count: int) -> dict:
  """`count` times {name: array} -> {name: array (count, ...)}; images may still be PIL's.

  Each is written to its place at once: images that wait for each other cost fresh memory.
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
  """Image `index`, or where it cannot be used and may be skipped the next; and those passed over.

  The next one is mostly of the same class, so that the classes keep their shares.
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
      logging.warning("passed over: %s", error)
      index = (index + 1) % len(images)


@dataclasses.dataclass(frozen=True)
class TrainBatch:
  """Batch `step`: a function, so that any process can make any batch."""
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
    example, passed_over = read(self.images, place.index, self.on_bad)
    bad += passed_over
    return self._augmented(example, self.order.generator(place))

  def _augmented(self, example: Example, rng: np.random.Generator) -> dict:
    if self.augment == "token_labels":
      fields = labels.augment_both(example, rng, self.image_size)
    else:
      fields = {"image": aug.IMAGES[self.augment](example.image, rng, self.image_size)}
    return fields | {"label": np.int32(example.label)}


def train_order(data, batch_size: int, seed: int) -> Order:
  """Which image stands where in a run. ValueError where there is no whole batch."""
  return Order(num_examples(data.name, "train"), batch_size, data.replicas, data.repeats, seed)


def steps_per_epoch(data, batch_size: int) -> int:
  """Whole batches of an epoch: of ImageNet with repeats, in batches of 1024, 1251."""
  return train_order(data, batch_size, seed=0).steps_per_epoch


def _check(data) -> None:
  kind, _ = parse(data.name)
  choose("data.augment", data.augment, AUGMENTS)
  choose("data.on_bad", data.on_bad, ("stop", "skip"))
  if data.max_bad < 0:
    raise ValueError(f"data.max_bad={data.max_bad} must be 0 or more")
  if data.augment not in ALLOWED.get(kind, (data.augment,)):
    raise ValueError(f"data.augment={data.augment!r} would change what {kind} mean; "
                     f"use one of {', '.join(ALLOWED[kind])}")


def _check_maps(data, images: Source) -> None:
  if images.num_classes > labels.MAX_CLASSES:
    raise ValueError(f"data.augment='token_labels' takes up to {labels.MAX_CLASSES} classes, whose "
                     f"numbers float16 can hold, and {data.name} has {images.num_classes}; use "
                     "'randaugment'")
  if read(images, 0, data.on_bad)[0].label_map is None:
    raise ValueError(f"data.augment='token_labels' needs labels of places, and {data.name} has "
                     "none: see vitcompact/data/labels.py, or use 'randaugment'")
  some = [read(images, int(index), data.on_bad)[0]
          for index in np.linspace(0, len(images), min(MAPS, len(images)), endpoint=False)]
  known = sum(labels.names_class(example.label_map, example.label) for example in some)
  if known < len(some) / 2:
    logging.warning("the label maps of %s name the class of the image itself in only %d of %d "
                    "images: were they made for classes in another order?", data.name, known,
                    len(some))


def train_batches(data, *, image_size, batch_size: int, seed: int, process_index: int = 0,
                  process_count: int = 1) -> Batches:
  """Endless batches {"image": uint8 (b, H, W, 3), "label": int32 (b,)}, b of this process.

  With augment="token_labels" also "label_map", float16 (b, 2, 5, 18, 18), and "label_box",
  float32 (b, 4). `order.py` says which image stands where: a global batch is the same, augmentation
  included, whatever the number of processes, workers or restarts; process i of P makes the i-th of
  P equal parts of it.
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
  """Batch `step` of an evaluation."""
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
    """Image `index`; or black with mask 0 beyond the last, and for a bad record that is skipped."""
    try:
      if index < len(self.images):
        image, label, _ = self.images.open(index)
        return {"image": self.preprocess.resize(image), "label": np.int32(label),
                "mask": np.float32(1)}
    except BadRecord as error:
      if self.on_bad == "stop":
        raise
      logging.warning("passed over: %s", error)
      bad.append(index)
    shape = *self.preprocess.image_size, len(self.preprocess.mean)
    return {"image": np.zeros(shape, np.uint8), "label": np.int32(0), "mask": np.float32(0)}


def shows_whole(name: str) -> bool:
  """Whether the images of a data set are made at the model's size, so that no crop may cut them."""
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

  Images are as `preprocess.resize` gives them: those of a file served by `vc.preprocess` are the
  same. The last batch is filled with black images whose mask is 0, and so is a bad record that is
  skipped; every process yields equally many. Generated images (digits, shapes) come at the model's
  size and are shown whole, whatever the crop.
  """
  make_batch = _eval_batch(data, split, preprocess, batch_size,
                           _rows(batch_size, process_index, process_count))
  steps = -(-len(make_batch.images) // batch_size)
  return Batches(grain.MapDataset.range(steps).map(make_batch), data.workers, data.max_bad)


def sample(data, split: str, count: int, preprocess: Preprocess) -> np.ndarray:
  """uint8 (n, H, W, C): `count` images (or all, if there are fewer) as `eval_batches` shows them.

  Evenly spread over the split: the first ones of a split are often all of one class.
  """
  make_batch = _eval_batch(data, split, preprocess, 1, range(1))
  total = len(make_batch.images)
  indices = np.linspace(0, total, min(count, total), endpoint=False).astype(int)
  batches = [make_batch(index) for index in indices]
  return np.concatenate([batch["image"] for batch in batches if batch["mask"][0]])
