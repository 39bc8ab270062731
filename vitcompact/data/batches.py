"""Batches prepared ahead of their use, by threads or by processes; the state is the position."""
import os

import grain
from absl import flags


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
  """Batch 0, 1, 2, ... of a dataset. `get_state()` and `set_state()` resume exactly.

  Grain's own state with worker processes names each worker. Ours is the number of the next batch,
  {"next_index": n}, so that a run may go on with another number of workers.
  """

  def __init__(self, dataset: grain.MapDataset, workers: int):
    super().__init__()
    self.dataset, self.workers = dataset, workers
    self.position, self.ahead = 0, None

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
    return batch

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
