"""Which image stands where: the order of training, for any step, without going through the others.

A run has `replicas` logical replicas, whatever its hardware: as many as the published recipe had
processes. A global batch holds their shares one after another: the k-th image of replica r is at
r * (batch_size / replicas) + k. So mixing in `replicas` groups, and statistics over them, act
within replicas; process i of P reads the i-th of P equal parts of each batch.

* One replica, no repeats: a plain shuffle, drawn from the seed and the epoch. Epochs follow one
  another without a gap; each sees each image exactly once, and a batch may straddle two.
* Else, as the published samplers: one order for each epoch number, the same in every run; each
  entry `repeats` times in a row; replica r takes the positions r, r + replicas, ... and an epoch is
  as many whole batches as there are. With repeats the line is first cut to N // 256 * 256 entries,
  so an epoch sees about N / repeats of the images. (The published samplers fill the line up to a
  multiple of the replicas with its own beginning. That makes a batch more only where fewer than
  `replicas` images are missing from it; here images are never used twice to fill up.)
"""
import dataclasses
import functools
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
  """What stands at a place of the line: which showing of which image. It keys all randomness."""
  epoch: int
  index: int
  copy: int


@functools.lru_cache(maxsize=4)  # a batch straddles two epochs at most, and threads run ahead
def shuffled(count: int, *key: int) -> np.ndarray:
  """0..count-1 in the order that `key` draws, int32 (int64 for more than fit)."""
  order = np.random.default_rng(key).permutation(count)
  return order.astype(np.int32) if count < 2**31 else order


@dataclasses.dataclass(frozen=True)
class Order:
  """The line of a run. ValueError where the numbers cannot be."""
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
                       f"{self.replicas}, whose shares it holds")
    if self.seed < 0:
      raise ValueError(f"seed={self.seed} must be 0 or more")
    if not self.steps_per_epoch:
      what = f", cut to {self._entries()} for data.repeats={self.repeats}" * (self.repeats > 1)
      raise ValueError(f"batch_size={self.batch_size} is more than the {self.count} training "
                       f"images{what}: use a smaller batch")

  @property
  def plain(self) -> bool:
    return self.replicas == self.repeats == 1

  def _entries(self) -> int:
    return self.count // 256 * 256 if self.repeats > 1 else self.count

  @property
  def steps_per_epoch(self) -> int:
    """Whole batches of an epoch (of a plain shuffle: rounded down)."""
    return self._entries() // self.replicas // (self.batch_size // self.replicas)

  def position(self, step: int, slot: int) -> tuple[int, int]:
    """(epoch, position in the epoch's line) of an image of the global batch `step`."""
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
    """The random numbers of one showing of an image, whoever asks for them."""
    return np.random.default_rng((self.seed, *place))
