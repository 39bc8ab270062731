"""Measures accuracy and time of every setting of every method, before any training.

A trained dense model of Fashion-MNIST (results/fashion_mnist_dense.safetensors) is compacted from
training images. The models that experiments.compaction has trained, narrower dense ones and
distilled ones, are shown for comparison.

  python -m experiments.compaction --data fashion_mnist --workdir runs/compaction
  python -m experiments.one_shot judge            # what results/ does not have yet
  python -m experiments.one_shot time             # on an otherwise idle machine, on one core
  python -m experiments.one_shot tables           # into results/README.md, and the picture

Each row is one plan, the same in every block, fitted by vc.compact to 1,024 training images, folded
and evaluated on the 10,000 test images, paired with the dense model image by image. Its time is
that of 32 images on one core in each runtime, in rounds in which it takes turns with the dense
model. Methods that cannot start from dense weights are left out; the predictors of DynamicViT and
FastPath are still random here (experiments.fine_tuning trains them). The test split chooses
nothing: every setting that was run is shown.
"""
import argparse
import functools
import json
import os
import pathlib
import statistics
import tempfile
import warnings

import jax
import numpy as np

import vitcompact as vc
from experiments import bench as suites
from experiments.compaction import DATA, Judge, difference, images_of
from vitcompact import bench, runtimes
from vitcompact.export import onnx_file
from vitcompact.export.program import Program
from vitcompact.receipt import environment

ROOT = pathlib.Path(__file__).parent.parent
NAME = "fashion_mnist"
FILE, PICTURE = (ROOT / f"results/one_shot_{NAME}.{suffix}" for suffix in ("json", "png"))
WRITTEN = "written by `python -m experiments.one_shot tables` from results/"
IMAGES, BATCH, ROUNDS = 1024, 32, 5
EXITS = ("xla", "ort", "openvino")   # all in float32
ROUNDING = 1e-5   # most that a runtime's logits differ by, if it chooses the same tokens and pairs
THIRDS = (1, 3)          # a reducer's blocks, of six
# {axis: {name: file in the folder of experiments.compaction}}.
TRAINED = {
    "narrower, trained": {f"{width} wide": f"{width} wide/trained.safetensors"
                          for width in DATA[NAME].widths},
    "chosen from data": {f"measured plan of {share} %": f"measured, {share} %.safetensors"
                         for share in (80, 50)},
    "distilled": {f"{shown}, distilled": f"distilled, {name}/trained.safetensors"
                  for shown, name in {"hMHSA + cFFN": "uniform, from images",
                                      "hMHSA + cFFN both, rank 0.25": "uniform, 50 %",
                                      "measured plan of 80 %": "measured, 80 %",
                                      "measured plan of 50 %": "measured, 50 %"}.items()}}


def plans() -> dict[str, dict[str, vc.Plan]]:
  """Returns {axis: {setting: plan}}."""
  def one_axis(axis, **methods):
    return {name: vc.Plan(**{axis: method}) for name, method in methods.items()}

  half, both = vc.HMHSA(), vc.CFFN(factor="both")
  return {
      "heads": one_axis("heads", **{
          "hMHSA, 5 of 6 heads computed": vc.HMHSA(real_heads=5),
          "hMHSA, 4 of 6": vc.HMHSA(real_heads=4), "hMHSA, 3 of 6": half,
          "hMHSA, 3 of 6, rank 2": vc.HMHSA(rank=2), "hMHSA, 3 of 6, rank 3": vc.HMHSA(rank=3),
          "hMHSA, 3 of 6, filters on the grid": vc.HMHSA(layout="grid"),
          "hMHSA, 3 of 6, on scores": vc.HMHSA(site="logits"),
          "5 of 6 heads stay": vc.HeadPruning(kept_heads=5),
          "4 of 6 heads stay": vc.HeadPruning(kept_heads=4),
          "3 of 6 heads stay": vc.HeadPruning(kept_heads=3),
          "5 of 6 heads stay, 4 of them computed": vc.HeadPruning(
              kept_heads=5, heads=vc.HMHSA(real_heads=4))}),
      "ffn": one_axis("ffn", **{
          f"cFFN, {factor}, rank {rank}": vc.CFFN(rank_ratio=rank, factor=factor)
          for factor in ("output", "both") for rank in (0.75, 0.5, 0.25)}),
      "attention": one_axis("attention", **{
          **{f"Sparsifiner, by token, keep {keep}": vc.Sparsifiner(keep=keep, min_tokens=0)
             for keep in (1, 0.9, 0.5, 0.25, 0.1, 0.05)},
          **{f"Sparsifiner, by block of 2 x 2, keep {keep}": vc.Sparsifiner(
              keep=keep, granularity="block", window=2, min_tokens=0)
             for keep in (0.75, 0.5, 0.25)},
          **{f"BiFormer, 4 x 4 regions, keep {keep}": vc.BiFormer(
              keep=keep, regions=4, min_tokens=0) for keep in (0.75, 0.5, 0.25)},
          **{f"KeyMerging, keep {keep}": vc.KeyMerging(keep=keep, min_tokens=0)
             for keep in (0.75, 0.5)}}),
      "tokens": one_axis("tokens", **{
          **{f"EViT, keep {keep} twice": vc.EViT(keep=keep, blocks=THIRDS)
             for keep in (0.9, 0.8, 0.7, 0.5)},
          **{f"ToMe, r = {r}": vc.ToMe(r=r) for r in (1, 2, 3, 4)},
          **{f"MCTF, r = {r}": vc.MCTF(r=r) for r in (1, 2, 4, 5)},
          "DynamicViT, keep 0.7 twice, random predictors": vc.DynamicViT(keep=0.7, blocks=THIRDS),
          "FastPath, 0.7 and 0.5 of the patches, random predictors": vc.FastPath(
              keep=(0.7, 0.5), blocks=THIRDS)}),
      "several": {
          "hMHSA + cFFN": vc.Plan(heads=half, ffn=vc.CFFN()),
          "hMHSA + cFFN both + ToMe 2": vc.Plan(heads=half, ffn=both, tokens=vc.ToMe(r=2)),
          "cFFN both + ToMe 2": vc.Plan(ffn=both, tokens=vc.ToMe(r=2)),
          "5 of 6 heads + cFFN both + ToMe 2": vc.Plan(
              heads=vc.HeadPruning(kept_heads=5), ffn=both, tokens=vc.ToMe(r=2)),
          "cFFN both + EViT 0.7": vc.Plan(ffn=both, tokens=vc.EViT(keep=0.7, blocks=THIRDS)),
          "all four axes": vc.Plan(
              heads=vc.HMHSA(real_heads=5), ffn=both, tokens=vc.ToMe(r=2), attention=vc.Sparsifiner(
                  keep=0.5, granularity="block", window=2, min_tokens=0))}}


def load() -> dict:
  return json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}


def judge(trained: pathlib.Path):
  """Computes accuracy and counts of each setting that the results do not have yet.

  trained: the folder of the models that experiments.compaction has trained.
  """
  data, found = DATA[NAME], load()
  config, (model, variables) = data.dense(), vc.load(data.file)
  images = images_of(config, model, "train", IMAGES)
  judged = Judge(config, model, variables)
  for axis, settings in {"": {"dense": None}, **plans(), **TRAINED}.items():
    for name, plan_or_file in settings.items():
      if name in found["rows"]:
        continue
      small, fitted = model, variables
      if name != "dense":
        unfolded = vc.load(trained / plan_or_file) if axis in TRAINED else vc.compact(
            model, variables, plan_or_file, images)
        small, fitted = vc.fold(*unfolded)
      count = vc.count(small, variables=fitted)
      found["rows"][name] = {
          "axis": axis, "plan": json.loads(small.plan.to_json()), "width": small.width,
          **judged(small, fitted), "params": count.params,
          "ideal_attention_macs": count.ideal_attention_macs}
      found |= {**environment(), "calibration_images": IMAGES}
      save(found)
      print(name, found["rows"][name]["accuracy"], found["rows"][name]["macs"], flush=True)


def time():
  """Times each setting that was not timed yet in every exit, in turns with the dense model in the
  same exits. Remove "rounds" of a row in the results to time it again."""
  suites.pin()
  data, found = DATA[NAME], load()
  if found.get("timed", {}).get("processor", bench.processor()) != bench.processor():
    raise SystemExit(f"other rows were timed on {found['timed']['processor']}, but this is "
                     f"{bench.processor()}: remove {FILE.name}, then judge and time everything "
                     "here")
  model, variables = vc.load(data.file)
  images = images_of(data.dense(), model, "train", BATCH)
  dense, _ = calls(model, variables, images)
  for name, row in found["rows"].items():
    if "rounds" in row:
      continue
    row["load"], row["commit"] = os.getloadavg()[0], environment()["commit"]
    this, row["gap"] = calls(*shaped_like(row, model, variables), images)
    times = bench.rounds_of({(exit, which): one[exit] for exit in EXITS
                             for which, one in (("dense", dense), ("this", this))}, rounds=ROUNDS)
    row["rounds"] = {exit: {which: times[exit, which] for which in ("dense", "this")}
                     for exit in EXITS}
    found["timed"] = {"processor": bench.processor(), "batch": BATCH, "clock": bench.clock_name()}
    save(found)
    print(name, *(f"{exit} {speed(row, exit)[0]:.2f}x" for exit in EXITS), flush=True)


def shaped_like(row: dict, model, variables):
  """Returns a deployed model of this row's shape. Time depends on no weights, so these were fitted
  to no images."""
  if row["width"] != model.width:
    model = model.clone(width=row["width"])
    variables = jax.jit(model.init)(
        jax.random.key(0), np.zeros((1, model.image_size, model.image_size, model.in_chans)))
  plan = vc.Plan.from_dict(row["plan"])
  return vc.fold(*vc.compact(model, variables, plan)) if plan != model.plan else (model, variables)


def calls(model, variables, images) -> tuple[dict, float]:
  """Returns {exit: function without arguments}, and how much an exported file's logits differ from
  XLA's, relative to the largest."""
  out = {"xla": bench.compiled(model.apply, variables, images).call}
  images, logits = np.asarray(images), np.asarray(out["xla"]())
  gap = 0.0
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "model.onnx"
    onnx_file.write(Program(model, variables, vc.preprocess(model)), file)
    for exit in EXITS[1:]:
      one = runtimes.load(file, exit, threads=1)
      out[exit] = functools.partial(one, images)
      gap = max(gap, float(np.abs(one(images) - logits).max() / np.abs(logits).max()))
  return out, gap


def save(found: dict):
  FILE.write_text(json.dumps(found, indent=1) + "\n")


def speed(row: dict, exit: str = "xla") -> tuple[float, float, float]:
  """Returns how much faster than the dense model a setting is: median, least and most."""
  return bench.ratio(row["rounds"][exit]["dense"], row["rounds"][exit]["this"])


def fastest(row: dict) -> str:
  """Returns the exit in which a setting is fastest."""
  return min(EXITS, key=lambda exit: statistics.median(row["rounds"][exit]["this"]))


def fastest_dense(found: dict) -> str:
  """Returns the exit in which the dense model is fastest, over the rounds of all settings."""
  return min(EXITS, key=lambda exit: statistics.median(
      seconds for row in found["rows"].values() for seconds in row["rounds"][exit]["dense"]))


def best_speed(found: dict, row: dict) -> tuple[float, float, float]:
  """Returns what `speed` does for a setting and the dense model, each where it is fastest."""
  return bench.ratio(row["rounds"][fastest_dense(found)]["dense"],
                     row["rounds"][fastest(row)]["this"])


def table(found: dict) -> str:
  dense = found["rows"]["dense"]
  lines = ["| axis | setting, in every block | MACs | attention MACs needed | speed in XLA, "
           "dense = 1 | in the fastest exits | fastest exit | test accuracy | difference from "
           "dense, points |", "|---|---|---:|---:|---:|---:|---|---:|---:|"]
  order = ["dense", *(name for group in (*plans().values(), *TRAINED.values()) for name in group)]
  for name, row in sorted(found["rows"].items(), key=lambda item: order.index(item[0])):
    speeds = (f"{middle:.2f}x [{low:.2f}, {high:.2f}]"
              for middle, low, high in (speed(row), best_speed(found, row)))
    needed = row["ideal_attention_macs"] / dense["ideal_attention_macs"]
    lines.append(
        f"| {row['axis']} | {name} | {100 * row['macs']:.1f} % | {100 * needed:.1f} % | "
        f"{' | '.join(speeds)} | {runtimes.NAMES[fastest(row)]} | {100 * row['accuracy']:.2f} % | "
        f"{'' if name == 'dense' else difference([row])} |")
  loads, timed = [row["load"] for row in found["rows"].values()], found["timed"]
  commits = dict.fromkeys(row["commit"] for row in found["rows"].values())
  better, names = above(found), ", ".join(runtimes.NAMES[exit] for exit in EXITS)
  others = [name for name, row in found["rows"].items() if row["gap"] > ROUNDING]
  gap = max(row["gap"] for name, row in found["rows"].items() if name not in others)
  return "\n".join([*lines, "", (
      f"Above the line of the dense models: {', '.join(better) if better else 'none'}."), "", (
      f"One dense model, {found['calibration_images']:,} training images, "
      f"{dense['images']:,} test images; 95 % intervals are over test images only, not over "
      f"dense models. Time of {timed['batch']} images in {names}, all in float32; in the fastest "
      "exits, both the setting and the dense model run where they are fastest: the dense model in "
      f"{runtimes.NAMES[fastest_dense(found)]}. One core of {timed['processor']}, {timed['clock']} "
      f"seconds, {ROUNDS} paired rounds (range in brackets), load {min(loads):.1f} to "
      f"{max(loads):.1f}, commit {' and '.join(commits)}. The logits of the timed files, whose "
      f"weights were fitted to no images, differ from XLA's by at most {gap:.0e} of the largest; "
      "by more where nearly equal scores choose other tokens or pairs: "
      f"{'; '.join(others) or 'nowhere'}.")])


def above(found: dict) -> list[str]:
  """Returns the settings that are more accurate than a dense model with the same time would be,
  interpolated linearly between the measured widths and constant beyond them."""
  curve = next(iter(TRAINED))
  dense = sorted((1 / best_speed(found, row)[0], row["accuracy"]) for row in found["rows"].values()
                 if row["axis"] in ("", curve))
  times, accuracies = zip(*dense, strict=True)
  best = np.maximum.accumulate(accuracies)     # a wider model that is worse does not count
  return [name for name, row in found["rows"].items() if row["axis"] not in ("", curve)
          and row["accuracy"] > np.interp(1 / best_speed(found, row)[0], times, best)]


def picture(found: dict):
  """Plots accuracy against time: a point above and to the left of another is better.

  Settings whose predictors are still random are only in the table.
  """
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
  curve, *others = TRAINED
  looks = dict(zip([curve, *plans(), *others, ""], ["k.-", *"osD^P", "cX", "mh", "k*"],
                   strict=True))
  for axis, look in looks.items():
    axes_of_line = {axis, ""} if axis == curve else {axis}
    rows = [row for name, row in found["rows"].items()
            if row["axis"] in axes_of_line and not name.endswith("random predictors")]
    times, accuracies = ([value(row) for row in rows] for value in (
        lambda row: 1 / best_speed(found, row)[0], lambda row: 100 * row["accuracy"]))
    axes.plot(times, accuracies, look, label=axis or "dense", markersize=12 if axis == "" else 6)
  axes.set_xscale("log")
  axes.set_xticks(ticks := [0.5, 0.7, 1, 1.5, 2, 3, 4], map(str, ticks), minor=False)
  axes.minorticks_off()
  axes.set_xlabel("time in the fastest of XLA, ONNX Runtime and OpenVINO, dense = 1")
  axes.set_ylabel("test accuracy, %")
  axes.set_title("Fashion-MNIST: the line shows dense models of three widths", fontsize=10)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(PICTURE, dpi=110)
  pyplot.close(figure)


def tables():
  page, found = ROOT / "results/README.md", load()
  text = page.read_text()
  begin, end = f"<!-- one shot: {WRITTEN} -->\n", "<!-- end of one shot -->"
  start, stop = text.index(begin) + len(begin), text.index(end)
  page.write_text(f"{text[:start]}{table(found)}\n{text[stop:]}")
  picture(found)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("what", choices=["judge", "time", "tables"])
  parser.add_argument("--trained", type=pathlib.Path, help="models of experiments.compaction",
                      default=pathlib.Path(f"runs/compaction/{NAME}_seed_0"))
  arguments = parser.parse_args()
  warnings.filterwarnings("ignore", "blocks_|.*are few|compact without")
  if arguments.what == "tables":
    return tables()
  if arguments.what == "time":
    return time()
  judge(arguments.trained)


if __name__ == "__main__":
  main()
