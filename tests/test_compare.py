"""compare reads the logs of runs, and says what is missing."""
import json

import pytest

from tests.cli import command
from vitcompact import compare


@pytest.fixture
def runs(tmp_path):
  for name, factor in (("a", 1.0), ("b", 2.0)):
    (tmp_path / name).mkdir()
    lines = [{"step": step, "loss": factor / step, "mode": "train"} for step in (1, 2, 2, 3)]
    lines[1]["loss"] = 9.0    # logged before a kill; step 2 was repeated
    lines.append({"step": 3, "test_accuracy": 0.5 * factor})
    (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n"
                                                           for line in lines))
  return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_repeated_step_counts_once(runs):
  assert compare.read(runs[1])["loss"] == {1: 2.0, 2: 1.0, 3: 2 / 3}


def test_runs_are_plotted_and_their_final_scores_printed(runs, tmp_path):
  out = tmp_path / "out.png"
  rows = [line.split() for line in command.succeeds("compare", *runs, "--out", out).splitlines()]
  assert out.read_bytes().startswith(b"\x89PNG")
  assert rows[0][:4] == ["run", "step", "val_accuracy", "test_accuracy"]
  assert rows[2][:4] == [runs[1], "3", "-", "1"]


@pytest.mark.parametrize("arguments, words", [
    (["/nowhere"], "/nowhere/metrics.jsonl is not there"),
    (["--metric", "los"], "no run has los; there are loss, test_accuracy")])
def test_a_mistake_is_reported_in_one_line(runs, arguments, words):
  assert words in command.fails("compare", "--out", "x.png", *runs, *arguments)
