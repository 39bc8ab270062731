"""Launch scripts are whole, and the one that can run here starts again what was stopped."""
import os
import pathlib
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def node(tmp_path):
  """A function that starts launch/node.sh around a stand-in for Python, of these exit codes."""
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
def test_a_script_is_whole_and_says_how_it_is_used(script):
  subprocess.run(["bash", "-n", script], check=True)
  shown = subprocess.run([script], capture_output=True, text=True, check=False, env={
      "PATH": os.environ["PATH"]})
  assert shown.returncode == 2
  assert script.name in shown.stdout


@pytest.mark.parametrize("codes, ended", [((75, 76, 134, 0), 0), ((75, 2), 2), ((1,), 1)])
def test_what_was_stopped_starts_again_and_a_mistake_does_not(node, codes, ended):
  start, log = node
  process = start(*codes)
  process.communicate(timeout=60)
  assert process.returncode == ended
  assert log.read_text().splitlines() == ["main.py --config=c.py --workdir=w --config.seed=1"
                                          ] * len(codes)


def test_sigterm_is_passed_on_and_ends_the_script(node):
  start, log = node
  process = start(0, work="""trap 'exit 75' TERM
echo started
while true; do sleep 0.1; done""")
  assert process.stdout.readline() == "started\n"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert len(log.read_text().splitlines()) == 1
