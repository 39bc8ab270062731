"""What pages say in words about measurements holds for the files in results/."""
import functools
import itertools
import statistics

from configs import fashion_mnist
from experiments import accuracy, compaction, fine_tuning, one_shot, resolution
from experiments.benchmarks import results
from experiments.benchmarks.results import cases, speed
from tests.test_docs import ROOT
from tests.test_figures import constant, prose
from vitcompact import bench


def rows_of(suite: str, *keys: str):
  return cases(results.load(suite, "cpu"), *keys)


def rows_of_deit():
  """Returns the rows of every method at its defaults, at 224 and 512 pixels."""
  rows = rows_of("methods", "model", "image_size")
  return [rows["deit_small_patch16_224", pixels] for pixels in (224, 512)]


def test_statements_about_speed_on_the_page_of_heads_hold():
  for rows in rows_of("tokens", "tokens").values():
    assert speed(rows, "heads", "dense")[1] > 1
  for (tokens, _, which), rows in rows_of("layer", "tokens", "batch", "pass").items():
    logits = speed(rows, "hMHSA, logits site", results.best_dense(rows))
    if logits and (tokens >= 577 or which != "forward"):
      assert logits[2] < 1
  other = results.cases(results.read(results.FOLDER / "layer_cpu_amd.json"), "tokens", "pass")
  for (tokens, which), rows in other.items():
    logits = speed(rows, "hMHSA, logits site", results.best_dense(rows))
    if logits and (tokens >= 577 or which != "forward"):
      assert logits[0] < (1.1 if which == "forward" else 1)
  for rows in rows_of_deit():
    assert 0.97 < speed(rows, "MoH", "dense")[0] < 1.03 < speed(rows, "HMHSA", "dense")[0]
    assert speed(rows, "HeadPruning", "dense")[0] > speed(rows, "HMHSA", "dense")[0]
  lost = next(row for row in results.accuracies()["heads"] if row["data"] == "digits")
  assert lost["difference"] + lost["interval"] < 0


def test_statements_about_speed_on_the_page_of_attention_hold():
  for (tokens,), rows in rows_of("tokens", "tokens").items():
    assert (speed(rows, "attention", "dense")[1] > 1) == (tokens >= 401)
  small, large = rows_of_deit()
  assert all(speed(small, name, "dense")[0] < 1 for name in ("Sparsifiner", "BiFormer"))
  assert 1 <= speed(small, "InLine", "dense")[0] < 1.05
  assert speed(large, "Sparsifiner", "dense")[0] < speed(small, "Sparsifiner", "dense")[0]
  assert all(speed(large, name, "dense")[1] > 1 for name in (
      "BiFormer", "InLine", "ChannelAttention", "KeyMerging"))


def test_statements_about_speed_on_the_page_of_tokens_hold():
  by_batch = {batch: rows for (batch,), rows in rows_of("model", "batch").items()}
  for name in ("EViT 0.7", "EViT 0.5", "ToMe 13", "DynamicViT 0.7", "MCTF 16"):
    ratio, expected = speed(by_batch[8], name, "dense")[0], results.macs_ratio(by_batch[8], name)
    assert (ratio > expected) == (name != "MCTF 16") and ratio > 0.9 * expected
    assert speed(by_batch[1], name, "dense")[0] < ratio
  for name in ("evit", "evit_half", "dynamicvit", "tome", "mctf"):
    row, = results.accuracies()[name]
    assert abs(row["difference"]) < row["interval"]


def test_statements_about_speed_on_the_page_of_ffns_hold():
  ratios = [speed(rows, "ffn", "dense")[0] for rows in rows_of("tokens", "tokens").values()]
  assert ratios[0] == max(ratios) and ratios[-1] == min(ratios)
  training, = rows_of("train", "batch").values()
  assert speed(training, "heads + ffn", "dense")[0] < 1
  for name in ("ffn", "ffn_both"):
    assert results.accuracies()[name][0]["difference"] >= 0


def lost(row: dict) -> float:
  """Returns how many points less accurate than the dense model a row is."""
  return 100 * (row["lost"] - row["gained"]) / row["images"]


def is_sorted(values) -> bool:
  return all(one <= other for one, other in itertools.pairwise(values))


def test_statements_of_the_readme_hold():
  assert one_shot.above(one_shot.load()) == []    # "a narrower dense model does better"
  assert "a narrower dense model trained from scratch does better" in (
      prose(ROOT / "README.md"))


def test_statements_about_settings_before_training_hold():
  rows = one_shot.load()["rows"]

  def losses(start: str, order=sorted) -> list[float]:
    names = [name for name in rows if name.startswith(start)]
    return [lost(rows[name]) for name in order(names, key=lambda name: float(name.split()[-1]))]

  merging = [lost(row) for name, row in rows.items() if name.startswith(("ToMe", "MCTF"))]
  dropping = [lost(row) for name, row in rows.items() if name.startswith("EViT")]
  assert len(merging) > 1 and max(merging) < min(1, *dropping)
  masks = [f"{name}, keep " for name in ("Sparsifiner, by token", "Sparsifiner, by block of 2 x 2",
                                         "BiFormer, 4 x 4 regions")]
  factors = [f"cFFN, {factor}, rank " for factor in ("output", "both")]
  assert all(is_sorted(losses(start)[::-1]) for start in (*masks, *factors))
  assert all(lost(rows[f"{mask}0.5"]) < 0.75 for mask in masks)
  half, removed = (lost(rows[name]) for name in ("hMHSA, 3 of 6", "3 of 6 heads stay"))
  uniform = [mean_loss(compaction.load(compaction.results_of(data)), "uniform, 50 %, distilled")
             for data in ("digits", "fashion_mnist")]
  assert max(uniform) < 2     # no plan could be two points better
  assert lost(rows["hMHSA, 5 of 6 heads computed"]) < 1.1 * half / 4
  assert removed > half > max(max(losses(start)) for start in factors)
  assert all(one_shot.speed(row, exit)[0] < 1 for row in rows.values()
             if row["axis"] == "attention" for exit in one_shot.EXITS)
  hallucinated = rows["hMHSA, 3 of 6"]
  assert [one_shot.speed(hallucinated, exit)[0] > 1 for exit in one_shot.EXITS] == [True] + [
      False] * 2 and one_shot.EXITS[0] == "xla"


def test_statements_about_a_short_training_hold():
  found = fine_tuning.load()
  end = {name: -statistics.mean(fine_tuning.differences(found, name))
         for name, row in found["rows"].items() if len(row["seeds"]) == fine_tuning.SEEDS}
  before = {name: 100 * (found["rows"]["dense"]["before"] - found["rows"][name]["before"])
            for name in end}
  half = [name for name in end if "3 of 6" in name or "hMHSA + cFFN" in name]
  factors = [name for name in end if name.startswith("cFFN, ")]
  blocks = [name for name in end if name.startswith("Sparsifiner, by block")]
  assert all(end[name] < before[name] / 2 for name in blocks) and blocks and factors and half
  assert all(end[name] > before[name] / 2 for name in (*half, *factors))

  def alike(one, other) -> bool:
    """Whether the 95 % intervals of two settings overlap."""
    margins = [accuracy.interval(fine_tuning.differences(found, name)) for name in (one, other)]
    return abs(end[one] - end[other]) <= sum(margins)

  one_branch = ", one branch without a norm"
  assert alike("hMHSA, 3 of 6", "hMHSA, 3 of 6, rank 2")
  assert alike("hMHSA, 3 of 6", "hMHSA, 3 of 6, frozen copies")
  assert all(alike(name.removesuffix(one_branch), name) for name in end if one_branch in name)
  token = "Sparsifiner, by token, keep 0.25"
  assert end[f"{token}, predictors first"] > end[token]
  assert max(end, key=end.get).startswith("DynamicViT")
  scratch = [lost(fold["models"]["uniform, from scratch"]) for fold in garments()
             if "uniform, from scratch" in fold["models"]]
  assert max(scratch) < end["hMHSA + cFFN"]
  equal = [row.split(" | ")[:2] for row in fine_tuning.equal_macs(found).splitlines()[2:]]
  at_80, at_50 = ([name for share, name in equal if share == f"| {each}"]
                  for each in fine_tuning.EQUAL_MACS)
  assert {name.split()[0] for name in at_80[:3]} == {"measured", "MCTF,", "ToMe,"}
  assert "measured" in at_50[0]
  assert at_80[-1] in half and at_50[-1] == "EViT, keep 0.5 twice"
  speeds = [one_shot.speed(one_shot.load()["rows"][name])[0] for name in at_80
            if name in one_shot.load()["rows"]]
  assert max(speeds) > 1.2 * min(speeds)


def test_statements_about_a_short_training_on_the_pages_of_the_axes_hold():
  found = fine_tuning.load()
  end = {name: -statistics.mean(fine_tuning.differences(found, name)) for name in found["rows"]}
  blocks, pairs = (end[f"Sparsifiner, by {name}, keep 0.25"]
                   for name in ("block of 2 x 2", "token"))
  assert blocks < 0.5 and pairs < blocks + 0.2      # "a quarter of the pairs hardly more"
  for factor in ("output", "both"):
    half, quarter = (end[f"cFFN, {factor}, rank {rank}"] for rank in (0.5, 0.25))
    assert half < quarter < 1
  assert all(loss < 0.5 for name, loss in end.items() if name.startswith(("ToMe", "MCTF")))
  assert all(loss > 1 for name, loss in end.items() if name.startswith("EViT"))


def test_statements_about_growth_with_resolution_hold():
  small, large = results.read(resolution.FILE)["sizes"].values()
  blocks, merging = (next(name for name in small if name.startswith(start))
                     for start in ("Sparsifiner", "ToMe"))
  assert large["dense"]["accuracy"] < small["dense"]["accuracy"]
  assert large[blocks]["macs"] < small[blocks]["macs"]
  for rows in (small, large):
    times = {name: bench.ratio(row["rounds"]["dense"], row["rounds"]["this"])
             for name, row in rows.items() if name != "dense"}
    assert times[blocks][0] < 1 and times[merging][1] < 1
    assert min(times, key=lambda name: lost(rows[name])) == merging


@functools.cache
def garments(name: str = "fashion_mnist") -> list[dict]:
  return compaction.load(compaction.results_of(name))


def mean_loss(folds: list[dict], name: str) -> float:
  return statistics.mean(lost(fold["models"][name]) for fold in folds if name in fold["models"])


def test_statements_on_the_page_of_compaction_hold():
  folds, adamw = garments(), garments(compaction.ADAMW)
  digits_folds = compaction.load(compaction.results_of("digits"))
  scratch = [fold["models"]["uniform, from scratch"] for fold in digits_folds
             if "uniform, from scratch" in fold["models"]]
  assert compaction.difference(scratch)[0] == "+"
  for share, uniform in ((80, "uniform, from images"), (50, "uniform, 50 %")):
    measured = f"measured, {share} %"
    assert mean_loss(folds, uniform) > max(mean_loss(folds, name) for name in (
        measured, f"measured quickly, {share} %"))
    assert mean_loss(adamw, measured) < mean_loss(folds, measured)
    depth = fashion_mnist.get_config().model.depth
    for plan in (fold["models"][measured]["plan"] for fold in folds if measured in fold["models"]):
      assert "tokens" in plan
      assert all("ffn" in plan["blocks"][str(block)] for block in range(1, depth - 1))
  # Also on the page of heads: several points without training, less than one from scratch.
  assert mean_loss(folds, "uniform, from scratch") < 1
  assert mean_loss(folds, "uniform, from images") > 2
  fitted, by_order = (mean_loss(folds, f"uniform, {how}") for how in ("from images", "by order"))
  assert f"lost {fitted:.1f} points with images, {by_order:.1f} without" in constant("compact.GAIN")
  distilled = mean_loss(folds, "measured, 50 %, distilled")
  assert 0.4 < distilled < 0.6 and distilled < mean_loss(folds, "uniform, 50 %, distilled")
  narrower = [fold["models"][compaction.NARROWER[0]] for fold in folds
              if compaction.NARROWER[0] in fold["models"]]
  gap, margin = map(float, compaction.difference(narrower).split(" ± "))
  assert abs(gap) < margin
  assert adamw[0]["models"]["dense"]["accuracy"] < min(
      fold["models"]["dense"]["accuracy"] for fold in folds)


def test_statements_about_plans_in_other_runtimes_hold():
  """On the page of deploying."""
  rows, (xla, *others) = one_shot.load()["rows"], one_shot.EXITS
  slower = [name for name, row in rows.items() if name.startswith((
      "ToMe", "MCTF", "hMHSA, 3 of 6", "measured plan"))]
  alike = [name for name in rows if name.startswith(("EViT", "cFFN, ")) or name.endswith("stay")]
  for exit in others:
    assert all(one_shot.speed(rows[name], exit)[0] < 1 for name in slower)
    assert all(0.9 < one_shot.speed(rows[name], exit)[0] / one_shot.speed(rows[name], xla)[0] < 1.1
               for name in alike)
  assert all("tokens" in rows[name]["plan"] for name in slower if name.startswith("measured"))


def test_statements_on_the_page_of_deploying_hold():
  found = results.read(ROOT / "results/int8_fashion_mnist.json")["quantisers"]
  rows = [row for row in found["rows"] if row["quantiser"] != "none"]
  for runtime in ("ONNX Runtime", "OpenVINO"):
    ours, results_too, *others = (row for row in rows if row["runtime"] == runtime)
    assert (ours["quantiser"], results_too["quantiser"]) == (
        "ONNX Runtime", "ONNX Runtime, results too")
    assert ours["kl"] < min(row["kl"] for row in (results_too, *others))
    for key in ("speed", "speed_small"):
      (middle, low, high), nncf = ours[key], [row[key] for row in others]
      assert middle > results_too[key][0]
      if runtime == "ONNX Runtime":
        assert middle > max(one for one, _, _ in nncf)
      else:
        assert any(low <= most and least <= high for _, least, most in nncf)
