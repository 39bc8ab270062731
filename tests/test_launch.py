"""Launch scripts are complete, and restart runs that were interrupted."""
import os
import pathlib
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def node(tmp_path):
  """A function that starts launch/node.sh with a stand-in for Python that has these exit codes."""
  log = tmp_path / "log"

  def start(*codes, work="true"):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
echo "$@" >> {log}
{work}
codes=({' '.join(map(str, codes))})
exit "${{codes[$(wc -l < {log}) - 1]}}"
""")
    python.chmod(0o755)
    return subprocess.Popen([ROOT / "launch" / "node.sh", "c.py", "w", "--config.seed=1"], cwd=ROOT,
                            env=os.environ | {"PYTHON": str(python), "PAUSE": "0"}, text=True,
                            stdout=subprocess.PIPE)
  return start, log


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_explains_its_usage(script):
  subprocess.run(["bash", "-n", script], check=True)
  shown = subprocess.run([script], capture_output=True, text=True, check=False, env={
      "PATH": os.environ["PATH"]})
  assert shown.returncode == 2
  assert script.name in shown.stdout


@pytest.mark.parametrize("codes, ended", [((75, 76, 134, 0), 0), ((75, 2), 2), ((1,), 1)])
def test_an_interrupted_run_is_restarted_and_a_mistake_is_not(node, codes, ended):
  start, log = node
  process = start(*codes)
  process.communicate(timeout=60)
  assert process.returncode == ended
  assert log.read_text().splitlines() == ["main.py --config=c.py --workdir=w --config.seed=1"
                                          ] * len(codes)


def test_sigterm_is_forwarded_and_ends_the_script(node):
  start, log = node
  process = start(0, work="""trap 'exit 75' TERM
echo started
while true; do sleep 0.1; done""")
  assert process.stdout.readline() == "started\n"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert len(log.read_text().splitlines()) == 1


@pytest.fixture
def cluster(tmp_path):
  """A function that runs a script with stand-ins for a cluster's commands, and returns their calls
  and the exit code. states: what gcloud describes, call by call; codes: exit codes of main.py."""
  log = tmp_path / "log"
  stand_in = f"""#!/bin/bash
printf '%s ' "$(basename "$0")" "$@" | tr '\\n' ' ' >> {log}; echo >> {log}
turn() {{ grep -c "$1" {log}; }}
case "$*" in
  *describe*) states=($STATES); echo "${{states[$(turn describe) - 1]}}" ;;
  *main.py*) codes=($CODES); exit "${{codes[$(turn main.py) - 1]}}" ;;
esac
"""
  for name in ("gcloud", "srun", "scontrol"):
    (tmp_path / name).write_text(stand_in)
    (tmp_path / name).chmod(0o755)

  def run(script, *arguments, states="", codes="0", **environment):
    done = subprocess.run(
        [ROOT / "launch" / script, *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=60, env=environment | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "STATES": states, "CODES": codes,
            "PAUSE": "0", "REPOSITORY": "https://example.org/r.git", "COMMIT": "abc"})
    return log.read_text().splitlines(), done.returncode
  return run


TPU = ("tpu.sh", "deit", "us-central2-b", "v4-32", "c.py", "/mnt/w")


def actions(lines):
  words = ("describe", "create", "delete", "clone", "main.py")
  return [next(word for word in words if word in line) for line in lines]


def test_a_slice_is_created_prepared_and_trained_on(cluster):
  lines, code = cluster(*TPU, "--config.plan={\"a\": 1}", states="MISSING READY", SPOT="1")
  assert code == 0
  assert actions(lines) == ["describe", "create", "clone", "main.py"]
  assert "--accelerator-type=v4-32" in lines[1] and "--spot" in lines[1]
  assert "checkout --quiet 'abc'" in lines[2] and "--worker=all" in lines[2]
  command = lines[3].partition("--command=")[2]
  assert command.split() == ["cd", "vitcompact", "&&", ".venv/bin/python", "main.py",
                             "--config='c.py'", "--workdir='/mnt/w'", "--coordinator=auto",
                             "--config.plan=\\{\\\"a\\\":\\", "1\\}"]


def test_a_preempted_slice_is_requested_again(cluster):
  lines, code = cluster(*TPU, states="READY PREEMPTED MISSING", codes="255 0")
  assert code == 0
  assert actions(lines) == ["describe", "clone", "main.py", "describe", "delete", "describe",
                            "create", "clone", "main.py"]


def test_the_script_gives_up_after_three_failures_in_a_row(cluster):
  lines, code = cluster(*TPU, states="READY READY READY", codes="2 2 2")
  assert code == 2
  assert actions(lines) == ["describe", "clone", "main.py"] + 2 * ["describe", "main.py"]


@pytest.mark.parametrize("nodes, code, ended, queued", [
    ("2", "75", 0, True), ("1", "76", 0, True), ("1", "2", 2, False), ("1", "0", 0, False)])
def test_an_interrupted_slurm_job_queues_itself_again(cluster, nodes, code, ended, queued):
  lines, left = cluster("slurm.sh", "c.py", "w", "--config.seed=1", codes=code, SLURM_NNODES=nodes,
                        SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="16")
  assert left == ended
  assert ("scontrol requeue 7 " in lines) == queued
  assert ("--coordinator=auto" in lines[0]) == (nodes == "2")
  assert "--cpus-per-task=16" in lines[0] and lines[0].endswith("--config.seed=1 ")
