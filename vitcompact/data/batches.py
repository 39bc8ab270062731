"""Batches prepared ahead of their use, by threads or by processes; the state is the position."""
import functools
import os
import threading
import time

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
    dataset = dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(workers),
                                  worker_init_fn=functools.partial(end_with, os.getpid()))
  return iter(dataset)


def end_with(parent: int, *_) -> None:
  """Makes a worker end when its run is gone: a run that was killed could not end it.

  By asking, because the system's own signal comes when the thread that started a worker ends.
  """
  def ask():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)
  threading.Thread(target=ask, daemon=True).start()


class Batches(grain.DatasetIterator):
  """Batch 0, 1, 2, ... of a dataset. `get_state()` and `set_state()` resume exactly.

  Grain's own state with worker processes names each worker. Ours is the number of the next batch,
  {"next_index": n}, so that a run may go on with another number of workers.

  bad_records: the indices of records of this process that were passed over since it started; more
  than max_bad of them are a ValueError.
  """

  def __init__(self, dataset: grain.MapDataset, workers: int, max_bad: int = 0):
    super().__init__()
    self.dataset, self.workers = dataset, workers
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
    if isinstance(batch, dict) and BAD in batch:
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
