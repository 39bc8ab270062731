"""Accuracy differences are paired, with Student's intervals, and the tables match the results."""
import json
import pathlib
import sys

import pytest

from experiments import accuracy

ROOT = pathlib.Path(__file__).parents[1]
FACTS = {"tokens": 37, "ideal_attention_macs": 0.5, "attention_macs": 1.0, "macs": 0.9}


def test_rows_are_means_over_pairs_with_their_interval():
  pairs = [{"tuned": {"accuracy": 0.9 + shift, **FACTS},
            "token": {"accuracy": 0.9 + shift + difference, **FACTS}}
           for shift, difference in ((0.0, 0.01), (0.05, -0.01), (-0.3, 0.03))]
  tuned, token = accuracy.summarise("digits", pairs)
  assert tuned["difference"] == tuned["interval"] == 0
  assert token["difference"] == pytest.approx(0.01)
  # Deviation 0.02, over the root of 3 pairs, times Student's quantile for 2 degrees of freedom.
  assert token["interval"] == pytest.approx(4.30265 * 0.02 / 3 ** 0.5, rel=1e-5)
  assert accuracy.interval([0.1]) == float("inf")


@pytest.mark.parametrize("kind,pairs", [("digits", "6"), ("digits", "0"), ("shapes", "-1")])
def test_too_few_pairs_are_refused(kind, pairs, monkeypatch, capsys):
  monkeypatch.setattr(accuracy, "pair", lambda *args: pytest.fail("trained"))
  monkeypatch.setattr(sys, "argv", ["accuracy", kind, "--workdir", "none", f"--pairs={pairs}"])
  with pytest.raises(SystemExit):
    accuracy.main()
  assert f"--pairs={pairs}: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("accuracy_*.json")),
                         ids=lambda path: path.stem)
def test_the_tables_match_the_results(path):
  results = json.loads(path.read_text())
  readme = (ROOT / "results" / "README.md").read_text()
  assert accuracy.table(results["rows"]) in readme
  assert f"python -m experiments.accuracy {results['rows'][0]['data']}" in readme
