"""A run that is asked to stop saves, exits with code 75, and resumes as if it had never stopped."""
import dataclasses
import json
import signal
import subprocess
import sys

import pytest

import main
from tests.tiny_run import bits
from vitcompact.run import loop, preemption


class StopAt(preemption.Stop):
  """Requests a stop at the `count`-th check: there is one before each step and evaluation batch."""

  def __init__(self, count: int):
    super().__init__()
    self.count = count

  def requested(self) -> bool:
    self.ticks += 1
    return self.ticks >= self.count


@pytest.mark.parametrize("count, step, scored", [
    (24, 22, ["20"]),    # 20 steps, an evaluation batch, two more steps
    (21, 20, []),        # during the evaluation at step 20
    (1, 0, []),          # before the first step
])
def test_a_stopped_run_loses_no_step_and_resumes_to_the_same_bits(
    config, uninterrupted, tmp_path, shared, count, step, scored):
  with pytest.raises(preemption.Stopped, match=f"at step {step}; saved"):
    loop.train(config, tmp_path, stopping=StopAt(count))
  saved = {int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")}
  assert max(saved, default=0) == step
  path = tmp_path / "checkpoints" / "scores.json"
  assert (list(json.loads(path.read_text())["scores"]) if path.exists() else []) == scored
  resumed = loop.train(config, tmp_path)
  assert bits(resumed.state) == bits(uninterrupted[1].state)
  assert resumed.metrics == uninterrupted[1].metrics
  # The interrupted evaluation is repeated.
  scores = [json.loads((place / "checkpoints" / "scores.json").read_text())
            for place in (tmp_path, uninterrupted[0])]
  assert scores[0] == scores[1]


def test_a_run_survives_workers_that_the_signal_ended_first(config, tmp_path, shared,
                                                            monkeypatch):
  """A SIGTERM to the whole process group ends the data workers too."""
  stopping = preemption.Stop()
  real = loop.pipeline.train_batches

  class Dies:
    def __init__(self, batches):
      self.batches = batches

    def __getattr__(self, name):
      return getattr(self.batches, name)

    def __next__(self):
      if self.batches.get_state()["next_index"] == 7:
        stopping.signalled = True
        raise RuntimeError("worker ended with -15")
      return next(self.batches)

  monkeypatch.setattr(loop.pipeline, "train_batches",
                      lambda *args, **keywords: Dies(real(*args, **keywords)))
  with pytest.raises(preemption.Stopped, match="at step 7; saved"):
    loop.train(config, tmp_path, stopping=stopping)
  assert (tmp_path / "checkpoints" / "7").is_dir()


LONG = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"   # C code that releases the GIL
PROGRAM = """
import hashlib, threading, time
from vitcompact.run import preemption
with preemption.on_signal() as stopping:
  stopping.saved = {saved}
  threading.Timer(0.5, lambda: setattr(stopping, "saved", True)).start()
  print("ready", flush=True)
  begin = time.perf_counter()
  {work}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("saved", [True, False])
def test_a_signal_is_handled_while_the_main_thread_compiles(saved, number):
  """The process exits at once if nothing would be lost, else as soon as everything is saved."""
  process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(saved=saved, work=LONG)],
                             cwd=loop.pathlib.Path(main.__file__).parent, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == "ready\n"
  process.send_signal(number)
  _, error = process.communicate(timeout=60)
  assert process.returncode == preemption.STOPPED
  first = "stopping; press Ctrl-C again to exit immediately\n" * (number == signal.SIGINT)
  assert error == first + "stopped; nothing is lost. Run the same command again to resume\n"


def test_a_second_ctrl_c_exits_at_once_without_saving():
  program = PROGRAM.format(saved=False, work=LONG).replace("Timer(0.5", "Timer(600")
  process = subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE,
                             cwd=loop.pathlib.Path(main.__file__).parent, stderr=subprocess.PIPE)
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGINT)
  assert process.stderr.readline() == "stopping; press Ctrl-C again to exit immediately\n"
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=60)
  assert process.returncode == preemption.ABANDONED
  assert error.startswith("exited immediately; steps since the last checkpoint are lost")


def test_shared_resources_of_workers_are_removed_silently():
  """The resource tracker used to warn of 50 semaphores after the line that nothing is lost."""
  program = PROGRAM.format(saved=True, work=LONG).replace("  begin =", """  import multiprocessing
  from multiprocessing.shared_memory import SharedMemory
  held = multiprocessing.get_context("spawn").Semaphore(), SharedMemory(create=True, size=8)
  print(held[1].name, flush=True)
  begin =""")
  process = subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE,
                             cwd=loop.pathlib.Path(main.__file__).parent, stderr=subprocess.PIPE)
  assert process.stdout.readline() == "ready\n"
  name = process.stdout.readline().strip()
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=60)   # the tracker keeps the pipe open until it ends
  assert error == "stopped; nothing is lost. Run the same command again to resume\n"
  assert not loop.pathlib.Path("/dev/shm", name).exists()


def test_during_the_first_steps_compilation_nothing_counts_as_unsaved(
    config, built, tmp_path, monkeypatch):
  """So the process can be ended there, and not minutes later."""
  stopping, seen = preemption.Stop(), []

  def step(state, batch):
    seen.append(stopping.saved)
    return built.step_at(0)(state, batch)

  monkeypatch.setattr(loop, "check_first_step", lambda run: None)   # this step is not jitted
  monkeypatch.setattr(loop, "build", lambda config: dataclasses.replace(
      built, config=loop.resolve(config), step_at=lambda _: step))
  for until in (3, 22):   # saved at 3, 20 and 22
    loop.train(config, tmp_path, stopping=stopping, until=until)
  assert [number for number, saved in enumerate(seen, 1) if saved] == [1, 4, 21]
  assert len(seen) == 22


def test_the_message_of_stopped_says_where():
  assert "at step 7; saved" in str(preemption.Stopped(7))
  assert "in an evaluation; saved" in str(preemption.Stopped())


def test_the_watcher_does_not_end_a_process_that_stops_by_itself():
  """In a separate process, which has no other threads."""
  program = """
import signal
from vitcompact.run import preemption
before = signal.getsignal(signal.SIGTERM)
with preemption.on_signal() as stopping:
  stopping.saved = False
  signal.raise_signal(signal.SIGTERM)
  assert stopping.requested()
assert signal.getsignal(signal.SIGTERM) == before
print("by himself")
"""
  done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True,
                        cwd=loop.pathlib.Path(main.__file__).parent)
  assert (done.returncode, done.stdout) == (0, "by himself\n"), done.stderr
