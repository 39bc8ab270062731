"""Prefetched batches, made by threads or by worker processes; the state is just the position."""
import functools
import os
import threading
import time

import grain
from absl import flags

BAD = "bad_records"  # a key of internal batches: the indices of unusable records


def prepare_ahead(dataset: grain.MapDataset, workers: int) -> grain.DatasetIterator:
  """Iterates in order and prefetches a few batches, in threads or in each of `workers` processes.

  Grain's own default is to prefetch 500 batches: 77 GB with 1024 images of 224 x 224.
  """
  threads = 1 if workers else min(4, os.cpu_count() or 1)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=2 * threads))
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain reads flags, which a script without absl.app lacks
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(workers),
                                  worker_init_fn=functools.partial(exit_with_parent, os.getpid()))
  return iter(dataset)


def exit_with_parent(parent: int, *_) -> None:
  """Makes a worker exit when its parent process is gone: a killed run cannot end its workers.

  It polls, because the system's parent-death signal comes when the thread that started it ends.
  """
  def poll():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)
  threading.Thread(target=poll, daemon=True).start()


class Batches(grain.DatasetIterator):
  """Batches 0, 1, 2, ... of a dataset. `get_state()` and `set_state()` resume exactly.

  Grain's own state depends on the number of worker processes. Ours is the number of the next batch,
  {"next_index": n}, so that a run may be resumed with another number of workers.

  bad_records: the indices of records that this process has skipped since it started; more than
  max_bad of them raise ValueError.
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
      self.close()  # an evaluation is over: ends its threads and processes
      raise
    self.position += 1
    if isinstance(batch, dict) and BAD in batch:
      self._count(batch.pop(BAD))
    return batch

  def _count(self, bad) -> None:
    self.bad_records.update(int(index) for index in bad)
    if len(self.bad_records) > self.max_bad:
      self.close()
      indices = ", ".join(map(str, sorted(self.bad_records)[:5]))
      raise ValueError(f"{len(self.bad_records)} records could not be used, the images {indices}, "
                       f"..., more than data.max_bad={self.max_bad} allows: see the warnings")

  def get_state(self) -> dict:
    return {"next_index": self.position}

  def set_state(self, state: dict) -> None:
    self.close()
    self.position = state["next_index"]

  def close(self) -> None:
    """Stops prefetching and ends the workers; asking for a batch starts them again."""
    if self.ahead is not None:
      self.ahead.close()
    self.ahead = None
