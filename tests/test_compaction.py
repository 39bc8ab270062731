"""The experiment of compacting: intervals are paired, and its page shows what was measured."""
import pathlib

import numpy as np
import pytest

import vitcompact as vc
from experiments import compaction
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
ROW = {"macs": 1.0, "accuracy": 0.5, "kl": 0.0, "images": 100}


def folds_with(*pairs):
  return [{"models": {"dense": {**ROW, "gained": 0, "lost": 0},
                      "measured, 50 %": {**ROW, "gained": gained, "lost": lost}}, "spearman": 0.9}
          for gained, lost in pairs]


def test_an_interval_is_of_pairs_over_the_images_of_all_folds():
  # 14 pairs of 200 differ, 6 more lost than gained; half a pair is added to each side.
  margin = 196 * (15 - 6 ** 2 / 202) ** 0.5 / 202
  assert f"| -3.00 ± {margin:.2f} |" in compaction.table(folds_with((4, 5), (0, 5)))
  assert "| +0.00 ± 1.92 |" in compaction.table(folds_with((0, 0)))   # none differs: not surely 0


def test_a_judge_compares_image_by_image(monkeypatch):
  """Two models of equal accuracy that err on other images."""
  judge = object.__new__(compaction.Judge)
  judge.labels, judge.macs = np.zeros(4, int), 2 * vc.count(tiny.deit()).macs
  judge.dense = np.eye(2)[[0, 0, 1, 1]]
  monkeypatch.setattr(judge, "_logits", lambda *_: np.eye(2)[[1, 0, 0, 1]])
  found = judge(tiny.deit(), None)
  assert (found["accuracy"], found["gained"], found["lost"]) == (0.5, 1, 1)
  assert (found["images"], found["macs"]) == (4, 0.5)


def test_a_fold_takes_the_place_of_the_one_of_its_data_and_seed(tmp_path):
  file = tmp_path / "found.json"
  for data, seed, mark in (("digits:1", 0, "a"), ("digits:0", 0, "b"), ("digits:1", 0, "c"),
                           ("digits:1", 1, "d")):
    compaction.add(file, {"data": data, "seed": seed, "mark": mark})
  assert [fold["mark"] for fold in compaction.load(file)] == ["b", "c", "d"]
  assert all(fold["jax"] for fold in compaction.load(file))


@pytest.mark.parametrize("name", list(compaction.DATA))
def test_the_page_shows_what_was_measured(name):
  folds = compaction.load(compaction.results_of(name))
  assert f"\n{compaction.described(folds)}\n" in (ROOT / "docs/compaction.md").read_text()


@pytest.mark.parametrize("name", list(compaction.DATA))
def test_the_uniform_plan_and_the_narrow_model_are_of_about_half_of_the_macs(name):
  data = compaction.DATA[name]
  sizes = {**data.dense().model.to_dict(), "num_classes": 10}
  variant = sizes.pop("name")
  dense = vc.count(vc.create_model(variant, **sizes)).macs
  for changes in ({"width": data.narrow}, {"plan": data.half, "deploy": True}):
    macs = vc.count(vc.create_model(variant, **{**sizes, **changes})).macs
    assert macs == pytest.approx(0.5 * dense, rel=0.07)


def test_the_committed_model_is_that_of_its_config():
  file = compaction.DATA["fashion_mnist"].file
  assert file.stat().st_size < 3e6
  model, _ = vc.load(file)
  sizes = compaction.DATA["fashion_mnist"].dense().model.to_dict()
  assert model == vc.create_model(sizes.pop("name"), num_classes=10, **sizes)
  assert vc.convert.classes_of(file)[9] == "Ankle boot"


def test_each_row_is_in_results_at_once(tmp_path, monkeypatch):
  """A run takes an hour, and may be ended before its last row."""
  monkeypatch.setattr(compaction, "ROOT", tmp_path)
  (tmp_path / "results").mkdir()
  fold = object.__new__(compaction.Fold)
  fold.name, fold.file, fold.judge = "digits:0", tmp_path / "found.json", lambda *_: ROW
  fold.found = {"data": "digits:0", "seed": 0, "models": {}}
  fold.row("dense", lambda: (None, None))
  assert compaction.load(compaction.results_of("digits"))[0]["models"] == {"dense": ROW}


def test_what_was_not_run_is_said_to_be():
  text = compaction.described([{"models": {"dense": {**ROW, "gained": 0, "lost": 0}}}])
  assert "12 random plans: not run." in text and "A plan for a speedup: not timed." in text
  assert "| narrower dense model, trained as long |  | not run |  |  |" in text
