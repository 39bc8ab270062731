"""The log of a run: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""
import contextlib
import json
import os
import pathlib
import socket
import sys
import time
from concurrent import futures

import jax
import rich.console
import rich.progress
from tensorboardX import record_writer, summary
from tensorboardX.proto.event_pb2 import Event

# Lower bound of a measured time, which avoids dividing by 0.
MIN_SECONDS = 1e-9
FLUSH = 30    # seconds after which TensorBoard sees new events


def end_time(running) -> float:
  """Waits for arrays and returns the time when the devices had computed them."""
  jax.block_until_ready(running)
  return time.perf_counter()


class Meter:
  """Measures images per second, and the share of the time in which devices wait for data.

  It uses a monotonic clock, which setting the system's date does not affect.
  """

  def __init__(self):
    self.watcher = futures.ThreadPoolExecutor(1, "devices")
    self.reset()

  def reset(self):
    self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

  def next_batch(self, batches, running=None):
    """next(batches). Waiting is counted once the devices have finished `running`, the last step.

    Until then the devices are busy, however long this takes: the threads that make later batches
    hold Python's global lock for milliseconds, and for longer on a busy machine.
    """
    begin = time.perf_counter()
    idle = self.watcher.submit(end_time, running) if running is not None else None
    batch = next(batches)
    end = time.perf_counter()
    if idle is None:
      self.waited += end - begin
    elif idle.done() and not idle.exception():   # an error of the step is raised by its reader
      self.waited += max(0.0, end - max(begin, idle.result()))
    return batch

  def read(self) -> dict[str, float]:
    elapsed = max(time.perf_counter() - self.start, MIN_SECONDS)
    return {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}


class Events:
  """A TensorBoard file. tensorboardX's own writer is not used: it writes in a thread, and if that
  fails on a full disk, the run hangs. The name has nanoseconds: a run may restart within a second.
  """

  def __init__(self, workdir: pathlib.Path):
    self.path = workdir / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
    self.file = record_writer.RecordWriter(str(self.path))
    self.flushed = -FLUSH
    self._write(file_version="brain.Event:2")

  def add(self, step: int, *summaries):
    for value in summaries:
      self._write(step=step, summary=value)
    if time.perf_counter() - self.flushed > FLUSH:
      self.file.flush()
      self.flushed = time.perf_counter()

  def _write(self, **fields):
    self.file.write(Event(wall_time=time.time(), **fields).SerializeToString())

  def close(self):
    self.file.close()


@contextlib.contextmanager
def named_write_errors(path: pathlib.Path):
  """Adds the file's path and a way out to errors such as a full disk or a lack of permission."""
  try:
    yield
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error.strerror}. Checkpoints are not affected; free "
                  "some space and run the same command again") from error


class Log:
  """Logs the metrics of steps. Only the process with `active` writes or prints anything.

  A run that was killed and resumed repeats steps in metrics.jsonl; the later line is valid.
  mirror: also gets the numbers: an object with W&B's `log(values, step=)` and `finish()`.
  """

  def __init__(self, workdir, total_steps: int, *, active: bool = True, mirror=None):
    self.active, self.total_steps, self.mirror = active, total_steps, mirror
    self.bar = None
    if not active:
      return
    workdir = pathlib.Path(workdir)
    self.path = workdir / "metrics.jsonl"
    drop_partial_line(self.path)
    self.lines = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
    self.events = Events(workdir)
    if sys.stdout.isatty():
      self.bar = rich.progress.Progress(
          rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
          rich.progress.MofNCompleteColumn(), rich.progress.TextColumn("{task.fields[rate]}"),
          rich.progress.TimeRemainingColumn(), console=rich.console.Console())
      self.task = self.bar.add_task("training", total=total_steps, rate="")
      self.bar.start()

  def say(self, text: str):
    """Prints a line, above the progress bar if there is one."""
    if self.bar:
      self.bar.console.print(text, markup=False, highlight=False)
    elif self.active:
      print(text, flush=True)

  def progress(self, step: int):
    if self.bar:
      self.bar.update(self.task, completed=step)

  def write(self, step: int, values: dict):
    """Writes a line of metrics.jsonl, numbers to TensorBoard, and prints a line of text."""
    if not self.active:
      return
    self._append(json.dumps({"step": step, **values}))
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    with named_write_errors(self.events.path):
      self.events.add(step, *(summary.scalar(name, value) for name, value in numbers.items()))
    if self.mirror:
      self.mirror.log(numbers, step=step)
    if self.bar and "images_per_second" in values:
      self.bar.update(self.task, rate=f"{values['images_per_second']:.0f} img/s")
    shown = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                     for name, value in values.items())
    self.say(f"step {step}/{self.total_steps} {shown}")

  def picture(self, step: int, name: str, image):
    """Writes an image, uint8 (H, W, 3), to TensorBoard."""
    if self.active:
      with named_write_errors(self.events.path):
        self.events.add(step, summary.image(name, image, dataformats="HWC"))

  def _append(self, line: str):
    with named_write_errors(self.path):
      self.lines.write(line + "\n")
      self.lines.flush()

  def close(self):
    if self.bar:
      self.bar.stop()
    if self.active:
      with contextlib.suppress(OSError):   # already raised when the line was written
        self.lines.close()
      try:
        self.events.close()
      except OSError as error:             # only a warning: the run itself may be complete
        print(f"WARNING: {self.events.path} lacks its last numbers: {error.strerror}",
              file=sys.stderr, flush=True)
    if self.mirror:
      self.mirror.finish()


def drop_partial_line(path: pathlib.Path):
  """Removes an incomplete last line, which a kill or a full disk leaves: it is not JSON."""
  if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
    os.truncate(path, text.rfind(b"\n") + 1)
