"""What a run says: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""
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

# A rate measured over fewer seconds than that says more about the clock than about the run.
MIN_SECONDS = 1e-9
FLUSH = 30    # seconds after which TensorBoard sees what was written


def ended(running) -> float:
  """When the devices were through with something."""
  jax.block_until_ready(running)
  return time.perf_counter()


class Meter:
  """Images a second, and the share of the time in which the devices waited for data.

  By a clock that only goes forward: a date that is set anew changes nothing.
  """

  def __init__(self):
    self.watcher = futures.ThreadPoolExecutor(1, "devices")
    self.reset()

  def reset(self):
    self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

  def next_batch(self, batches, running=None):
    """next(batches), timed from when the devices are through with `running`, their newest step.

    Until then they lack nothing, however long this takes: the threads that make later batches hold
    Python's lock for milliseconds, and on a busy machine more.
    """
    begin = time.perf_counter()
    idle = self.watcher.submit(ended, running) if running is not None else None
    batch = next(batches)
    end = time.perf_counter()
    if idle is None:
      self.waited += end - begin
    elif idle.done() and not idle.exception():   # an error of the step is raised where it is read
      self.waited += max(0.0, end - max(begin, idle.result()))
    return batch

  def read(self) -> dict[str, float]:
    elapsed = max(time.perf_counter() - self.start, MIN_SECONDS)
    return {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}


class Events:
  """TensorBoard's file. tensorboardX's own writer writes in a thread: where that dies of a full
  disk, the run waits for it for ever. Named by nanoseconds: two starts may fall into one second."""

  def __init__(self, workdir: pathlib.Path):
    self.path = workdir / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
    self.file = record_writer.RecordWriter(str(self.path))
    self.flushed = -FLUSH
    self._write(file_version="brain.Event:2")

  def add(self, step: int, *summaries):
    for one in summaries:
      self._write(step=step, summary=one)
    if time.perf_counter() - self.flushed > FLUSH:
      self.file.flush()
      self.flushed = time.perf_counter()

  def _write(self, **fields):
    self.file.write(Event(wall_time=time.time(), **fields).SerializeToString())

  def close(self):
    self.file.close()


@contextlib.contextmanager
def named_write_errors(path: pathlib.Path):
  """Says which file a full disk or a lack of permission was met in, and what to do."""
  try:
    yield
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error.strerror}. Checkpoints are as they were; make "
                  "room and give the same command again") from error


class Log:
  """Writes scalars at steps. Only the process with `active` writes; the others say nothing.

  A run that was killed and resumed repeats steps in metrics.jsonl; the later line counts.
  mirror: gets the numbers too: an object with W&B's `log(values, step=)` and `finish()`.
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
    """A line for the reader, above the bar where there is one."""
    if self.bar:
      self.bar.console.print(text, markup=False, highlight=False)
    elif self.active:
      print(text, flush=True)

  def progress(self, step: int):
    if self.bar:
      self.bar.update(self.task, completed=step)

  def write(self, step: int, values: dict):
    """One line of metrics.jsonl, numbers to TensorBoard, and a line of text."""
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
    """uint8 (H, W, 3) to TensorBoard."""
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
      with contextlib.suppress(OSError):   # said already, when the line was written
        self.lines.close()
      try:
        self.events.close()
      except OSError as error:             # the run itself may well be whole
        print(f"WARNING: {self.events.path} lacks its last numbers: {error.strerror}",
              file=sys.stderr, flush=True)
    if self.mirror:
      self.mirror.finish()


def drop_partial_line(path: pathlib.Path):
  """Cuts off a last line without an end, which a kill or a full disk left: it is not JSON."""
  if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
    os.truncate(path, text.rfind(b"\n") + 1)
