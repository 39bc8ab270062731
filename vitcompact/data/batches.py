"""Batches prepared ahead of their use, by threads or by processes; the state is the position."""
import os
from collections.abc import Callable

import grain
from absl import flags

BAD = "bad_records"  # in a batch on its way: the indices of records that could not be used


def prepare_ahead(dataset: grain.MapDataset, workers: int) -> grain.DatasetIterator:
  """Iterates in order, a few batches ahead: in threads, or in each of `workers` processes.

  Grain's own default is 500 batches ahead: at 1024 images of 224 x 224, 77 GB.
  """
  threads = 1 if workers else min(4, os.cpu_count() or 1)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=2 * threads))
  if workers:
    if not flags.FLAGS.is_parsed():  # a script or notebook without absl.app: Grain reads flags
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(workers))
  return iter(dataset)


class Batches(grain.DatasetIterator):
  """Batch 0, 1, 2, ... of `make_batch(step)`. `get_state()` and `set_state()` resume exactly.

  Grain's own state with worker processes names each worker. Ours is the number of the next batch,
  {"next_index": n}, so that a run may go on with another number of workers.

  bad_records: the indices of records of this process that were passed over since it started; more
  than max_bad of them are a ValueError.
  """

  def __init__(self, make_batch: Callable[[int], dict], steps: int, workers: int,
               max_bad: int = 0):
    super().__init__()
    self.make_batch, self.workers = make_batch, workers
    self.dataset = grain.MapDataset.range(steps).map(make_batch)
    self.position, self.ahead = 0, None
    self.max_bad, self.bad_records = max_bad, set()

  def start_prefetch(self) -> None:
    if self.ahead is None:
      self.ahead = prepare_ahead(self.dataset[self.position:], self.workers)
      self.ahead.start_prefetch()

  def __next__(self) -> dict:
    self.start_prefetch()
    try:
      batch = next(self.ahead)
    except StopIteration:
      self.close()  # an evaluation is over: its threads and processes go
      raise
    self.position += 1
    self._count(batch.pop(BAD))
    return batch

  def _count(self, bad) -> None:
    self.bad_records.update(int(index) for index in bad)
    if len(self.bad_records) > self.max_bad:
      self.close()
      some = ", ".join(map(str, sorted(self.bad_records)[:5]))
      raise ValueError(f"{len(self.bad_records)} records could not be used, the images {some}, "
                       f"..., and data.max_bad={self.max_bad} allows no more: see the warnings")

  def get_state(self) -> dict:
    return {"next_index": self.position}

  def set_state(self, state: dict) -> None:
    self.close()
    self.position = state["next_index"]

  def close(self) -> None:
    """Stops preparing and ends the workers; asking for a batch starts them again."""
    if self.ahead is not None:
      self.ahead.close()
    self.ahead = None
