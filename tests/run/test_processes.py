"""Two real processes on loopback form one run: same numbers, and neither outlives the other."""
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny_run import lines
from vitcompact.run import loop, processes

ROOT = pathlib.Path(loop.__file__).parents[2]
# Does what main.py does, without the final report, which other tests cover.
PROGRAM = """
import sys
import main
from vitcompact.run import processes, report
processes.HEARTBEAT = 10
class Nothing:
  def to_markdown(self):
    return "done"
report.report = lambda *_: Nothing()
main.app.run(main.main, flags_parser=main.parse)
"""


SAYS = {processes.LOST: "error: process 0 of 2 cannot continue",
        -signal.SIGABRT: "This most likely indicates that another task died"}


def group(config_path, workdir, cache, *, count: int, extra=((), ())):
  """Starts main.py in `count` processes that share 8 devices."""
  with socket.socket() as server:
    server.bind(("localhost", 0))
    port = server.getsockname()[1]
  flags = os.environ["XLA_FLAGS"].split()
  flags = [flag for flag in flags if "device_count" not in flag]
  flags.append(f"--xla_force_host_platform_device_count={8 // count}")
  environment = os.environ | {
      "XLA_FLAGS": " ".join(flags), "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  return [subprocess.Popen(
      [sys.executable, "-u", "-c", PROGRAM, f"--config={config_path}", f"--workdir={workdir}",
       f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}",
       *extra[index]], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE) for index in range(count)]


def wait_for(process, words):
  for line in process.stdout:
    if words in line:
      return
  raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def path(config, tmp_path):
  """A file with a tiny config that saves and logs often."""
  config.log_every = config.checkpoint_every = 10
  path = tmp_path / "tiny.py"
  path.write_text(f"from ml_collections import ConfigDict\n"
                  f"def get_config():\n  return ConfigDict({config.to_dict()!r})\n")
  return path


def test_two_processes_end_with_the_numbers_of_one_despite_a_kill(
    path, tmp_path, cache, uninterrupted):
  """One is killed, and the other soon ends with an error; both are restarted, resume from their
  checkpoint, and end with the losses and scores of one process with as many devices."""
  workdir = tmp_path / "run"
  first, second = group(path, workdir, cache, count=2)
  wait_for(first, "step 20/40 val_accuracy")   # the save of step 10, in the background, is complete
  second.kill()
  second.communicate()
  _, error = first.communicate(timeout=120)
  # In a collective it notices at once; elsewhere JAX aborts it when heartbeats stop.
  assert (first.returncode, SAYS[first.returncode] in error) in (
      (processes.LOST, True), (-signal.SIGABRT, True)), error
  both = group(path, workdir, cache, count=2)
  wait_for(both[0], "resumed at step")
  errors = [process.communicate(timeout=300)[1] for process in both]
  assert [process.returncode for process in both] == [0, 0], errors
  one, two = lines(uninterrupted[0])[-1], lines(workdir)[-1]
  for name in ("val_loss", "val_accuracy", "test_loss", "test_accuracy"):
    assert two[name] == pytest.approx(one[name], rel=1e-6), name
  losses = [{line["step"]: line["loss"] for line in lines(place) if "loss" in line}
            for place in (uninterrupted[0], workdir)]
  np.testing.assert_allclose(losses[1][40], losses[0][40], rtol=1e-6)


def test_processes_that_disagree_name_the_difference_and_write_nothing(path, tmp_path, cache):
  both = group(path, tmp_path / "run", cache, count=2, extra=((), ("--config.optim.b1=0.8",)))
  for process in both:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2, error
    assert "optim.b1 is 0.9 in process 0 and 0.8 in process 1" in error
  assert not (tmp_path / "run").exists()


def test_differences_between_gathered_facts_are_named(monkeypatch):
  """Tests the comparison itself, without processes."""
  processes.check_agreement({"a": 1})
  monkeypatch.setattr(processes, "gather_values",
                      lambda facts: [facts, facts, {**facts, "a": 2, "b": 3}])
  with pytest.raises(ValueError, match=r"disagree: a is 1 in process 0 and 2 in process 2; "
                                       r"b is None in process 0 and 3 in process 2\. Start"):
    processes.check_agreement({"a": 1})
