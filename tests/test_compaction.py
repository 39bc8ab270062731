"""The compaction experiment: intervals are paired, and its page shows what was measured."""
import importlib
import itertools
import json
import math
import pathlib
import types
import warnings

import numpy as np
import pytest

import vitcompact as vc
from experiments import compaction, fine_tuning, goals, one_shot, path_costs, resolution
from tests import tiny
from vitcompact.report import Option

ROOT = pathlib.Path(__file__).parents[1]
ROW = {"macs": 1.0, "accuracy": 0.5, "kl": 0.0, "images": 100}


def folds_with(*pairs):
  return [{"models": {"dense": {**ROW, "gained": 0, "lost": 0},
                      "measured, 50 %": {**ROW, "gained": gained, "lost": lost}}, "spearman": 0.9}
          for gained, lost in pairs]


def test_intervals_are_paired_over_the_images_of_all_folds():
  # 14 of 200 pairs differ, with 6 more lost than gained; half a pair is added to each side.
  margin = 196 * (15 - 6 ** 2 / 202) ** 0.5 / 202
  assert f"| -3.00 ± {margin:.2f} |" in compaction.table(folds_with((4, 5), (0, 5)))
  assert "| +0.00 ± 1.92 |" in compaction.table(folds_with((0, 0)))   # not 0 even if none differs


def test_a_judge_compares_models_image_by_image(monkeypatch):
  """Two models of equal accuracy err on different images."""
  judge = object.__new__(compaction.Judge)
  judge.labels, judge.macs = np.zeros(4, int), 2 * vc.count(tiny.deit()).macs
  judge.dense = np.eye(2)[[0, 0, 1, 1]]
  monkeypatch.setattr(judge, "_logits", lambda *_: np.eye(2)[[1, 0, 0, 1]])
  found = judge(tiny.deit(), None)
  assert (found["accuracy"], found["gained"], found["lost"]) == (0.5, 1, 1)
  assert (found["images"], found["macs"]) == (4, 0.5)


def test_a_fold_is_updated_and_keeps_rows_that_were_not_measured_again(tmp_path, monkeypatch):
  file, commits = tmp_path / "found.json", iter("vwxyz")
  monkeypatch.setattr(compaction, "environment", lambda: {"commit": next(commits)})
  for data, seed, mark, rows in (("digits:1", 0, "a", {"dense": 1, "narrow": 2}),
                                 ("digits:0", 0, "b", {}), ("digits:1", 0, "c", {"dense": 3}),
                                 ("digits:1", 1, "d", {"dense": 4})):
    models = {name: {"kl": kl} for name, kl in rows.items()}
    compaction.add(file, {"data": data, "seed": seed, "mark": mark, "models": models})
  folds = compaction.load(file)
  assert [fold["mark"] for fold in folds] == ["b", "c", "d"]
  assert folds[1]["models"] == {"dense": {"kl": 3}, "narrow": {"kl": 2, "commit": "v"}}
  assert folds[2]["models"] == {"dense": {"kl": 4}}


@pytest.mark.parametrize("name", [*compaction.DATA, compaction.ADAMW])
def test_the_page_shows_what_was_measured(name):
  folds = compaction.load(compaction.results_of(name))
  assert f"\n{compaction.described(folds)}\n" in (ROOT / "docs/compaction.md").read_text()


@pytest.mark.parametrize("name", list(compaction.DATA))
def test_models_of_equal_cost_have_about_half_or_a_quarter_of_the_macs(name):
  data = compaction.DATA[name]
  sizes = {**data.dense().model.to_dict(), "num_classes": 10}
  variant = sizes.pop("name")
  dense = vc.count(vc.create_model(variant, **sizes)).macs
  half, quarter = ({"width": width} for width in data.widths)
  for changes, share in ((half, 0.5), ({"plan": data.half, "deploy": True}, 0.5), (quarter, 0.25)):
    macs = vc.count(vc.create_model(variant, **{**sizes, **changes})).macs
    assert macs / dense == pytest.approx(share, abs=0.035)


def test_the_committed_model_matches_its_config():
  file = compaction.DATA["fashion_mnist"].file
  assert file.stat().st_size < 3e6
  model, _ = vc.load(file)
  sizes = compaction.DATA["fashion_mnist"].dense().model.to_dict()
  assert model == vc.create_model(sizes.pop("name"), num_classes=10, **sizes)
  assert vc.convert.classes_of(file)[9] == "Ankle boot"


def test_kl_grows_with_removed_tokens_as_a_quick_report_assumes():
  """For each reducer, from one rate to the next; docs/compaction.md states the smallest and largest
  exponent."""
  looking = importlib.import_module("vitcompact.measure")
  rows = one_shot.load()["rows"]
  site = vc.load(one_shot.DATA[one_shot.NAME].file)[0].submodules()["blocks_0"].site
  found = {}
  for name, plan in one_shot.plans()["tokens"].items():
    found.setdefault(type(plan.tokens), []).append(
        (looking._removed_share(plan.tokens, site), rows[name]["kl"]))
  powers = [math.log(more / kl) / math.log(most / gone) for points in found.values()
            for (gone, kl), (most, more) in itertools.pairwise(points)]
  assert min(powers) < looking.KL_EXPONENT < max(powers)
  text = f"between {min(powers):.2f} and {max(powers):.2f}"
  assert text in (ROOT / "docs/compaction.md").read_text()


def test_the_page_says_how_many_images_the_kl_uses():
  looking = importlib.import_module("vitcompact.measure")
  model, images = vc.create_model("deit_small_patch16_224"), np.broadcast_to(0, (256, 224, 224, 3))
  full, quick = (len(images[looking._Measurement(model, None, images, how, None).kl_images])
                 for how in ("full", "quick"))
  page = " ".join((ROOT / "docs/compaction.md").read_text().split())
  assert f"at once: {full} for DeiT-S, {quick} with `\"quick\"`.)" in page


def test_each_row_is_saved_at_once(tmp_path, monkeypatch):
  """A run takes an hour, and may be interrupted before its last row."""
  monkeypatch.setattr(compaction, "ROOT", tmp_path)
  (tmp_path / "results").mkdir()
  fold = object.__new__(compaction.Fold)
  fold.name, fold.file, fold.judge = "digits:0", tmp_path / "found.json", lambda *_: ROW
  fold.found = {"data": "digits:0", "seed": 0, "models": {}}
  fold.row("dense", lambda: (None, None))
  (found,) = compaction.load(compaction.results_of("digits"))
  assert found["models"] == {"dense": {**ROW, "commit": found["commit"]}}


def test_a_row_missing_from_some_folds_says_how_many_have_it():
  whole, part = folds_with((0, 0), (0, 0))
  del part["models"]["measured, 50 %"]
  assert "| measured plan of 50 % (1 of 2 dense models) |" in compaction.table([whole, part])


def test_the_page_shows_what_measuring_and_compacting_cost():
  found = json.loads(path_costs.RESULTS.read_text())
  page = (ROOT / "docs/compaction.md").read_text()
  assert f"{path_costs.BEGIN}{path_costs.described(found)}\n{path_costs.END}" in page
  assert "| `compact` from images | not run | | |" in path_costs.described(
      {**found, "steps": {"forward": found["steps"]["forward"]}})


def test_the_page_says_what_was_not_run():
  text = compaction.described([{"models": {"dense": {**ROW, "gained": 0, "lost": 0}}}])
  assert "12 random plans: not run." in text and "A plan for a speedup: not timed." in text
  assert "with about half of the MACs, trained as long |  | not run |  |  |" in text


def test_the_table_of_settings_matches_its_results():
  found = one_shot.load()
  assert one_shot.table(found) in (ROOT / "results/README.md").read_text()
  assert set(found["rows"]) == {"dense"}.union(
      *one_shot.plans().values(), *one_shot.TRAINED.values())
  for settings in one_shot.plans().values():
    for name, plan in settings.items():
      assert vc.Plan.from_json(json.dumps(found["rows"][name]["plan"])) == plan, name
  for name, row in found["rows"].items():   # exported files compute the same
    assert row["gap"] < one_shot.ROUNDING or row["axis"] in ("attention", "tokens"), name


def test_the_page_shows_which_goals_were_missed():
  page = (ROOT / "results/README.md").read_text()
  assert f"{goals.BEGIN}{goals.table()}\n{goals.END}" in page
  ratios = [measured / predicted for name in ("digits", "fashion_mnist")
            for fold in compaction.load(compaction.results_of(name))
            for predicted, measured in fold.get("kl_pairs", ())]
  assert f"measured at {min(ratios):.1f} to {max(ratios):.1f} times this sum" in (
      " ".join(page.split()))


def test_a_goal_is_met_or_missed_by_its_figure():
  folds = folds_with((4, 5), (0, 5))       # 6 of 200 images
  assert [goals.lost(folds, "plan", "measured, 50 %", most).met for most in (3.0, 2.9)] == [
      True, False]
  assert not goals.bounded("ranks", "at least 0.9", [0.95, 0.89], lambda rank: rank >= 0.9).met


def test_models_that_are_timed_have_the_shape_of_their_row():
  """Their weights are others, which times do not depend on."""
  rows, (model, variables) = one_shot.load()["rows"], vc.load(one_shot.DATA[one_shot.NAME].file)
  for name in ("dense", "30 wide", "hMHSA + cFFN", "measured plan of 50 %"):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")     # compact without images
      small, fitted = one_shot.shaped_like(rows[name], model, variables)
    count = vc.count(small, variables=fitted)
    assert count.params == rows[name]["params"], name
    assert count.macs / vc.count(model).macs == pytest.approx(rows[name]["macs"]), name


def test_longer_distillation_gains_what_the_page_says():
  fold = compaction.load(compaction.results_of("fashion_mnist"))[0]["models"]
  lost = {name: row["lost"] - row["gained"] for name, row in fold.items()}
  short, half, mixed, whole = (lost[f"uniform, from images, distilled{words}"] for words in (
      "", " half as long", " half as long, on mixed images", " as long"))
  assert whole < half < short and whole < short / 2
  assert mixed < half and abs(mixed - whole) < 10   # of 10,000 images
  assert whole < lost["uniform, from scratch"]
  assert all(fold["uniform, from images, distilled as long"]["accuracy"] < fold[name]["accuracy"]
             for name in compaction.NARROWER)


def test_long_distillation_takes_half_of_the_steps_or_all_at_a_quarter_of_the_rate(monkeypatch):
  fold, dense, found = object.__new__(compaction.Fold), compaction.fashion_mnist.get_config(), {}
  fold.data, fold.name, fold.seed = compaction.DATA["fashion_mnist"], "fashion_mnist", 3
  fold.images, fold.dense, fold.runs = None, "dense", pathlib.Path("runs")
  monkeypatch.setattr(fold, "start", lambda name, plan, images: name)
  monkeypatch.setattr(fold, "row", lambda name, make, plan: found.update({name: make}))
  monkeypatch.setattr(compaction, "distil", lambda config, *_: config)
  monkeypatch.setattr(vc, "load", lambda config: config)
  fold.long()
  for (name, make), share, mixup in zip(found.items(), (2, 1, 2), (0, 0, 0.8), strict=True):
    config = make()
    assert config.data.mixup == mixup and ("mixed" in name) == bool(mixup)
    assert name in compaction.NAMES and config.seed == 3
    assert config.total_steps == dense.total_steps // share
    assert config.optim.learning_rate == pytest.approx(dense.optim.learning_rate / 4)


def test_the_table_of_resolutions_matches_its_results():
  found = json.loads(resolution.FILE.read_text())
  page = resolution.PAGE.read_text()
  assert f"{resolution.BEGIN}{resolution.table(found)}\n{resolution.END}" in page
  for size, rows in found["sizes"].items():
    plans = resolution.plans(resolution.tokens_at(int(size)))
    assert rows.keys() == {"dense", *plans}
    for name, plan in plans.items():
      assert vc.Plan.from_dict(rows[name]["plan"]) == plan, name


def test_the_table_of_short_trainings_matches_its_results():
  found, page = fine_tuning.load(), (ROOT / "results/README.md").read_text()
  assert f"\n{fine_tuning.table(found)}\n" in page
  settings = {name: setting for group in fine_tuning.settings().values()
              for name, setting in group.items()}
  plans = {name: vc.Plan.from_dict(row["plan"]) for name, row in one_shot.load()["rows"].items()}
  assert {"dense"} < found["rows"].keys() <= settings.keys()
  for name, row in found["rows"].items():
    setting = settings[name]
    expected = setting.plan or plans.get(setting.deployed, vc.Plan())
    assert vc.Plan.from_json(json.dumps(row["plan"])) == expected, name
  for name, setting in settings.items():   # the timed form is the deployed form of the trained one
    if setting.plan:
      model = vc.load(one_shot.DATA[one_shot.NAME].file)[0]
      macs = [vc.count(model.clone(plan=plan, deploy=True)).macs
              for plan in (setting.plan, plans[setting.deployed])]
      assert macs[0] == macs[1], name


def test_hallucinating_half_of_the_heads_costs_as_much_as_the_page_of_heads_says():
  trained, rows = fine_tuning.load(), one_shot.load()["rows"]
  half, four, five = (
      (100 * (rows["dense"]["accuracy"] - rows[name]["accuracy"]),
       -np.mean(fine_tuning.differences(trained, name)))
      for name in ("hMHSA, 3 of 6", "hMHSA, 4 of 6", "hMHSA, 5 of 6 heads computed"))
  for when in range(2):
    assert 1.8 < half[when] / four[when] < 2.2 and 3.9 < half[when] / five[when] < 5.1
  assert "about twice as much accuracy as hallucinating two of six heads, and four to five" in (
      " ".join((ROOT / "docs/heads.md").read_text().split()))


def test_a_short_training_is_compared_with_the_dense_model_of_that_seed():
  """Differences of -1, -2 and -3 points, with Student's t for 2 degrees of freedom, 4.303."""
  def row(*accuracies):
    return {"before": 0.5, "seeds": {
        str(seed): {"accuracy": accuracy, "macs": 0.5, "images": 100}
        for seed, accuracy in enumerate(accuracies)}}

  found = {"rows": {"dense": row(0.9, 0.8, 0.7), "ToMe, r = 4": row(0.89, 0.78, 0.67),
                    "hMHSA, 3 of 6": row(0.9)}, "steps": 9, "calibration_images": 8}
  text = fine_tuning.table(found)
  equal = [row.split(" | ")[1] for row in text.splitlines() if row.startswith("| 50 % | ")]
  assert equal == ["dense", "ToMe, r = 4"]   # the most accurate first, and none with one seed
  margin = 4.3027 / 3 ** 0.5
  assert f"| 78.00 % | -2.00 | [{-2 - margin:+.2f}, {-2 + margin:+.2f}] |" in text
  assert "| hMHSA, 3 of 6 | | | | not run | | |" in text


def test_methods_above_the_dense_curve_are_reported():
  """Of the dense models with times 1, 0.5 and 0.25, the middle one is the best."""
  def row(axis, time, accuracy):
    slow = {"dense": [5.0] * 3, "this": [5.0] * 3}
    return {"axis": axis, "accuracy": accuracy, "rounds": {
        "xla": slow, "ort": {"dense": [1.0] * 3, "this": [time] * 3}, "openvino": slow}}

  curve = next(iter(one_shot.TRAINED))
  found = {"rows": {"dense": row("", 1.0, 0.90), "a": row(curve, 0.5, 0.91),
                    "b": row(curve, 0.25, 0.81), "under": row("heads", 0.75, 0.905),
                    "on the way": row("ffn", 0.375, 0.87), "slow": row("heads", 2.0, 0.908),
                    "slow and better": row("tokens", 2.0, 0.911),
                    "too fast": row("ffn", 0.1, 0.80)}}
  assert one_shot.above(found) == ["on the way", "slow and better"]


def test_each_model_is_timed_where_it_is_fastest():
  """In OpenVINO, the setting is fastest; over both rows, the dense model is in ONNX Runtime."""
  row = {"rounds": {exit: {"dense": [dense] * 3, "this": [this] * 3} for exit, dense, this in (
      ("xla", 4.0, 2.0), ("ort", 2.0, 3.0), ("openvino", 3.0, 1.0))}}
  other = {"rounds": {exit: {"dense": [dense] * 5, "this": [1.0] * 5} for exit, dense in (
      ("xla", 1.0), ("ort", 1.5), ("openvino", 3.0))}}
  found = {"rows": {"a": row, "b": other, "c": row}}
  assert (one_shot.fastest_dense(found), one_shot.fastest(row)) == ("ort", "openvino")
  assert one_shot.best_speed(found, row)[0] == 2.0 and one_shot.speed(row)[0] == 2.0
  assert one_shot.best_speed(found, other)[0] == 1.5
  assert one_shot.speed(row, "ort")[0] == pytest.approx(2 / 3)


def test_a_quick_report_is_compared_by_its_inferred_options():
  def report(*options):
    return types.SimpleNamespace(blocks=[{"options": [Option("ffn", None, None, kl, tried)
                                                      for kl, tried in options]}])

  full = report((1.0, True), (2.0, True), (3.0, True), (9.0, True))
  quick = report((1.5, False), (3.0, False), (2.0, False), (0.0, True))
  found = compaction.agreement(quick, full)
  assert found == {"spearman": pytest.approx(0.5), "options": 3}
  row = {"data": "digits:0", "seed": 0, "models": {}}
  assert "0.500 over 3 options" in compaction.described([{**row, "quick": found}])
  assert "a full one measures: not run" in compaction.described([row])
