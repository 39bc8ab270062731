"""The order of training images, which can be computed for any step on its own.

A run has `replicas` logical replicas, whatever its hardware: as many as the published recipe had
processes. A global batch is the concatenation of their parts: the k-th image of replica r is at
r * (batch_size / replicas) + k. Mixing and statistics over `replicas` groups therefore stay within
replicas; process i of P reads the i-th of P equal parts of each batch.

* One replica, no repeats: a plain shuffle, drawn from the seed and the epoch. Each epoch shows each
  image exactly once, and the next one follows without a gap: a batch may span two epochs.
* Otherwise, like the published samplers: the order depends on the epoch number but not on the seed;
  each image is repeated `repeats` times in a row; replica r takes the positions r, r + replicas,
  ..., and an epoch ends after its last whole batch. With repeats, an epoch uses the first
  N // 256 * 256 entries of the repeated order, and so sees about N / repeats of the images. (The
  published samplers pad the order with its own beginning, to a multiple of the replicas. Here there
  is no padding, so an epoch may have one batch less.)
"""
import dataclasses
import functools
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
  """Image `index` in its repetition `copy` of an epoch; seeds all randomness of that image."""
  epoch: int
  index: int
  copy: int


@functools.lru_cache(maxsize=4)  # a batch spans at most two epochs, and threads run ahead
def shuffled(count: int, *key: int) -> np.ndarray:
  """A permutation of 0..count-1 drawn from `key`, int32 (int64 if it does not fit)."""
  order = np.random.default_rng(key).permutation(count)
  return order.astype(np.int32) if count < 2**31 else order


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of images in a run. ValueError for inconsistent numbers."""
  count: int
  batch_size: int
  replicas: int
  repeats: int
  seed: int

  def __post_init__(self):
    if self.replicas < 1 or self.repeats < 1:
      raise ValueError(f"data.replicas={self.replicas} and data.repeats={self.repeats} must be 1 "
                       "or more")
    if self.batch_size % self.replicas:
      raise ValueError(f"batch_size={self.batch_size} must be divisible by data.replicas="
                       f"{self.replicas}: a batch holds equally many images of each")
    if self.seed < 0:
      raise ValueError(f"seed={self.seed} must be 0 or more")
    if not self.steps_per_epoch:
      note = (f", of which data.repeats={self.repeats} uses {self._entries()}" *
              (self.repeats > 1))
      raise ValueError(f"batch_size={self.batch_size} is more than the {self.count} training "
                       f"images{note}: use a smaller batch")

  @property
  def plain(self) -> bool:
    return self.replicas == self.repeats == 1

  def _entries(self) -> int:
    return self.count // 256 * 256 if self.repeats > 1 else self.count

  @property
  def steps_per_epoch(self) -> int:
    """Whole batches in an epoch (rounded down for a plain shuffle)."""
    return self._entries() // self.replicas // (self.batch_size // self.replicas)

  def position(self, step: int, slot: int) -> tuple[int, int]:
    """(epoch, position in the epoch) of image `slot` in the global batch `step`."""
    if self.plain:
      return divmod(step * self.batch_size + slot, self.count)
    epoch, step = divmod(step, self.steps_per_epoch)
    share = self.batch_size // self.replicas
    replica, k = divmod(slot, share)
    return epoch, (step * share + k) * self.replicas + replica

  def place(self, step: int, slot: int) -> Place:
    epoch, position = self.position(step, slot)
    key = (self.seed, epoch) if self.plain else (epoch,)
    index, copy = divmod(position, self.repeats)
    return Place(epoch, int(shuffled(self.count, *key)[index]), copy)

  def generator(self, place: Place) -> np.random.Generator:
    """The random generator of one repetition of an image, the same in every process."""
    return np.random.default_rng((self.seed, *place))
