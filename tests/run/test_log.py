"""The log survives kills, full disks and clock changes, and shows what it is given."""
import io
import json
import struct
import threading

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from vitcompact.run import log


def test_setting_the_clock_back_does_not_change_the_rate(monkeypatch):
  monkeypatch.setattr(log.time, "time", lambda: 0.0)      # a date far in the past
  now = [100.0]
  monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
  meter = log.Meter()
  meter.images, now[0] = 50, 102.0
  assert meter.read() == {"images_per_second": 25.0, "data_wait": 0.0}
  now[0] = 100.0                                           # and a wall clock that does not advance
  meter.reset()
  assert all(np.isfinite(value) for value in meter.read().values())


@pytest.mark.parametrize("busy, waited", [
    (None, 0.1),     # the devices are idle: all of it
    (0.0, 0.1),
    (0.07, 0.03),    # from the end of the step
    (0.5, 0.0)])     # still computing when the batch arrives: no wait
def test_waiting_for_data_counts_only_if_the_devices_wait(busy, waited, monkeypatch):
  """The batch arrives 0.1 seconds after its request, by a fake clock."""
  now, over, noted = [0.0], threading.Event(), threading.Event()
  monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
  real = log.end_time

  def end_time(running):
    assert over.wait(60)
    try:
      return real(running)
    finally:
      noted.set()

  monkeypatch.setattr(log, "end_time", end_time)

  def batches():
    if busy is not None and busy < 0.1:
      now[0] = busy
      over.set()
      assert noted.wait(60)
      meter.watcher.submit(int).result()    # wait for its result
    now[0] = 0.1
    yield "batch"

  meter = log.Meter()
  running = None if busy is None else {"loss": np.zeros(1)}
  assert meter.next_batch(batches(), running) == "batch"
  over.set()
  assert meter.waited == pytest.approx(waited)


def test_a_partial_line_left_by_a_kill_is_removed(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  writer = log.Log(tmp_path, 10)
  writer.write(2, {"loss": 1.5})
  writer.close()
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_the_error_for_a_full_disk_names_the_file(tmp_path):
  writer = log.Log(tmp_path, 10)
  writer.lines.close()
  with open("/dev/full", "a") as writer.lines:
    with pytest.raises(OSError, match=r"metrics.jsonl cannot be written: No space left on device"):
      writer.write(1, {"loss": 1.0})
    writer.close()


def test_a_full_disk_for_tensorboards_file_ends_the_run_in_one_line(tmp_path, capsys):
  """With tensorboardX's own writer, the thread died and the run waited forever."""
  writer = log.Log(tmp_path, 10)
  writer.events.file.close()
  writer.events.file = record_writer.RecordWriter("/dev/full")
  with pytest.raises(OSError, match=r"events\..* cannot be written: No space left on device"):
    for step in range(1000):   # there is a buffer in between
      writer.write(step, {"loss": 1.0})
  writer.close()
  assert "events.out.tfevents" in capsys.readouterr().err


def events(path):
  """Reads TensorBoard's file: records of a length, its checksum, the event, and its checksum."""
  data, at, out = path.read_bytes(), 0, []
  while at < len(data):
    [size] = struct.unpack("<Q", data[at:at + 8])
    out.append(Event.FromString(data[at + 12:at + 12 + size]))
    at += size + 16
  return out


def test_tensorboard_gets_one_file_per_start_with_numbers_by_step(tmp_path, monkeypatch):
  monkeypatch.setattr(log.time, "time", lambda: 0.0)      # both starts in the same second
  for start in range(2):
    writer = log.Log(tmp_path, 10)
    writer.write(start, {"loss": 0.5, "mode": "train"})
    writer.close()
  files = sorted(tmp_path.glob("events.out.tfevents.*"))
  assert len(files) == 2
  for start, path in enumerate(files):
    version, scalar = events(path)
    assert version.file_version == "brain.Event:2"
    [value] = scalar.summary.value
    assert (scalar.step, value.tag, value.simple_value) == (start, "loss", 0.5)


def test_a_terminal_shows_a_progress_bar_with_speed_and_time_left(tmp_path, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  screen = Terminal()
  monkeypatch.setattr(log.sys, "stdout", screen)
  monkeypatch.setenv("COLUMNS", "120")
  monkeypatch.setenv("TERM", "xterm")
  writer = log.Log(tmp_path, 10)
  for step in (1, 2, 3):
    writer.progress(step)
  writer.write(3, {"images_per_second": 250.0})
  writer.bar.refresh()
  writer.close()
  assert "3/10" in screen.getvalue() and "250 img/s" in screen.getvalue()
  assert "0:00:0" in screen.getvalue()
  assert "step 3/10 images_per_second=250" in screen.getvalue()   # with lines above the bar


class Mirror:
  def __init__(self):
    self.got = []

  def log(self, values, step):
    self.got.append((step, values))

  def finish(self):
    self.got.append("finished")


def test_a_mirror_gets_the_numbers_and_tensorboard_the_images(tmp_path):
  mirror = Mirror()
  writer = log.Log(tmp_path, 10, mirror=mirror)
  writer.write(3, {"loss": 1.0, "mode": "train"})
  writer.picture(1, "augmented", np.zeros((4, 4, 3), np.uint8))
  writer.close()
  assert mirror.got == [(3, {"loss": 1.0}), "finished"]
  [events] = tmp_path.glob("events.out.tfevents.*")
  assert b"augmented" in events.read_bytes()
  assert b"PNG" in events.read_bytes()


def test_only_the_first_process_writes(tmp_path):
  writer = log.Log(tmp_path, 10, active=False)
  writer.write(1, {"loss": 1.0})
  writer.picture(1, "augmented", np.zeros((4, 4, 3), np.uint8))
  writer.close()
  assert not list(tmp_path.iterdir())
