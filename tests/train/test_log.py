"""The log survives kills, full disks and clocks, and shows what it is given."""
import json

import numpy as np
import pytest

from vitcompact.train import log


def test_a_clock_that_is_set_back_changes_no_rate(monkeypatch):
  monkeypatch.setattr(log.time, "time", lambda: 0.0)      # a date long gone
  now = [100.0]
  monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
  meter = log.Meter()
  meter.images, now[0] = 50, 102.0
  assert meter.read() == {"images_per_second": 25.0, "data_wait": 0.0}
  now[0] = 100.0                                           # and a clock that stands still
  meter.reset()
  assert all(np.isfinite(value) for value in meter.read().values())


def test_half_a_line_that_a_kill_left_is_cut_off(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  writer = log.Log(tmp_path, 10)
  writer.write(2, {"loss": 1.5})
  writer.close()
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_full_disk_is_said_with_the_file(tmp_path):
  writer = log.Log(tmp_path, 10)
  writer.lines.close()
  with open("/dev/full", "a") as writer.lines:
    with pytest.raises(OSError, match=r"metrics.jsonl cannot be written: No space left on device"):
      writer.write(1, {"loss": 1.0})
    writer.close()


class Mirror:
  def __init__(self):
    self.got = []

  def log(self, values, step):
    self.got.append((step, values))

  def finish(self):
    self.got.append("finished")


def test_a_mirror_gets_the_numbers_and_tensorboard_the_pictures(tmp_path):
  mirror = Mirror()
  writer = log.Log(tmp_path, 10, mirror=mirror)
  writer.write(3, {"loss": 1.0, "mode": "train"})
  writer.picture(1, "augmented", np.zeros((4, 4, 3), np.uint8))
  writer.close()
  assert mirror.got == [(3, {"loss": 1.0}), "finished"]
  [events] = tmp_path.glob("events.out.tfevents.*")
  assert b"augmented" in events.read_bytes()
  assert b"PNG" in events.read_bytes()


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
  writer = log.Log(tmp_path, 10, active=False)
  writer.write(1, {"loss": 1.0})
  writer.picture(1, "augmented", np.zeros((4, 4, 3), np.uint8))
  writer.close()
  assert not list(tmp_path.iterdir())
