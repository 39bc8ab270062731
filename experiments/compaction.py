"""Measures what compacting costs in accuracy, stage by stage: on digits, where every image is a
test image once, and on the 10,000 test images of Fashion-MNIST.

  python -m experiments.compaction --data digits --workdir runs/compaction
  python -m experiments.compaction --data fashion_mnist --workdir runs/compaction
  python -m experiments.compaction narrow --data fashion_mnist --workdir runs/compaction
  python -m experiments.compaction long --data fashion_mnist --workdir runs/compaction
  python -m experiments.compaction quick --data fashion_mnist --workdir runs/compaction
  python -m experiments.compaction tables         # into docs/compaction.md, from results/

`narrow` only trains the narrower models; it can run before the main command or in parallel with it.
`long` distils half of the heads and factors in every block for as long as dense models are trained.

A dense model is measured on training images: one is trained for each seed, on digits for each of
five folds; that of Fashion-MNIST's seed 0 is committed in results/. Then the following are
compacted without training: half of the heads and factors in every block (20 % fewer MACs), first
without images and then fitted to images; the same with stronger factors (50 %); the measured plans
for 80 and 50 % of the MACs, from a full report and from a quick one. All but the first and the last
are distilled for a tenth of the dense model's steps. For comparison, two of the plans and narrower
dense models with about half and a quarter of the MACs are trained from scratch, as long as the
dense one. For 12 random plans, the ranks of predicted and measured KL are compared. A plan for a
speedup is predicted and timed. The test split chooses nothing. Running the command again continues
where it stopped.
"""
import argparse
import functools
import json
import pathlib
import statistics
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import spearmanr

import vitcompact as vc
from configs import compact_digits, compact_fashion_mnist, digits, fashion_mnist
from vitcompact import bench
from vitcompact.measure import divergence
from vitcompact.receipt import environment
from vitcompact.run import loop, path
from vitcompact.train import config as configs

ROOT = pathlib.Path(__file__).parent.parent
IMAGES = 1024          # for calibration
RANDOM_PLANS = 12
BATCH = 500            # test images
WRITTEN = "written by `python -m experiments.compaction tables` from results/"
TIMED = {"speedup": 1.5, "batch": 32}
ROUNDS = 5


class Data(NamedTuple):
  """A data set, its dense model, and models with equal MACs.

  dense: makes the dense model's config; compact: makes the config of distillation; names: the folds
  as data sets; file: dense weights trained with seed 0, or None to train them; widths: those of
  dense models with about half and a quarter of the MACs; half: a plan with half of the MACs, the
  same in all blocks.
  """
  dense: Any
  compact: Any
  names: tuple[str, ...]
  widths: tuple[int, int]
  half: vc.Plan
  file: pathlib.Path | None = None


# Results for the dense model of Fashion-MNIST that was trained with AdamW (at commit e88cbd3).
ADAMW = "fashion_mnist_adamw"
UNIFORM = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
DATA = {
    "digits": Data(lambda: digits.get_config("dense"), compact_digits.get_config,
                   tuple(f"digits:{fold}" for fold in range(5)), (44, 32),
                   vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(rank_ratio=0.25, factor="both"))),
    "fashion_mnist": Data(fashion_mnist.get_config, compact_fashion_mnist.get_config,
                          ("fashion_mnist",), (42, 30),
                          vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(rank_ratio=0.25, factor="both")),
                          ROOT / "results/fashion_mnist_dense.safetensors"),
}


def train_or_find(config, directory: pathlib.Path) -> pathlib.Path:
  """Returns the file of a run's model, after training it if the file is missing."""
  out = directory / "trained.safetensors"
  if not out.exists():
    result = loop.train(config, directory)
    vc.save(out, result.model, jax.device_get(result.variables), force=True)
  return out


def dense_config(data: Data, name: str, seed: int, width: int | None = None):
  config = data.dense()
  config.data.name, config.seed = name, seed
  if width:
    config.model.width = width
  return config


def images_of(config, model, split: str, count: int):
  config = configs.complete(config)
  config.compact.images = count
  return path.calibration_images(config, path.preprocess_of(config, model), split)


class Judge:
  """Computes a model's test accuracy, and its KL from the dense model, on test images."""

  def __init__(self, config, model, variables, batch: int = BATCH):
    self.batch = batch
    self.images = images_of(config, model, "test", 10_000)
    source = path.pipeline.source(config.data.name, "test", image_size=model.image_size)
    self.labels = np.asarray([source[i]["label"] for i in range(len(source))])
    self.dense = self._logits(model, variables)
    self.macs = vc.count(model).macs

  def _logits(self, model, variables):
    apply = jax.jit(model.apply)
    return np.concatenate([apply(variables, self.images[start:start + self.batch])
                           for start in range(0, len(self.images), self.batch)])

  def __call__(self, model, variables) -> dict[str, Any]:
    """Returns accuracy, kl, macs, the number of test images, and how many of them only this model
    classifies correctly (gained) or only the dense model does (lost)."""
    logits = self._logits(model, variables)
    correct, dense_correct = (x.argmax(-1) == self.labels for x in (logits, self.dense))
    return {"accuracy": float(np.mean(correct)), "images": len(correct),
            "gained": int(np.sum(correct & ~dense_correct)),
            "lost": int(np.sum(dense_correct & ~correct)),
            "kl": divergence(self.dense, logits),
            "macs": vc.count(model.clone(deploy=True)).macs / self.macs}


def random_plan(report, rng) -> vc.Plan:
  """Draws one option or none for each axis of each block."""
  blocks = {}
  for number, row in enumerate(report.blocks):
    for axis in ("heads", "ffn"):
      methods = [None, *(option.method for option in row["options"] if option.axis == axis)]
      if (method := methods[rng.integers(len(methods))]) is not None:
        blocks.setdefault(number, {})[axis] = method
  return vc.Plan(blocks=blocks)


def distil(config, start: pathlib.Path, dense: pathlib.Path, plan, directory):
  """Returns the file of a compact model, distilled from the dense one with this config."""
  config = configs.complete(config)
  config.plan = plan.to_json()
  config.init_from, config.teacher.file, config.keep_start = str(start), str(dense), True
  config.compact.macs = 0.0
  return train_or_find(config, directory)


def time_speedup_plan(report, model, variables, images) -> dict[str, Any]:
  """Returns a plan for a speedup, with predicted times and times measured in turns with the dense
  model."""
  plan = report.plan(**TIMED)
  batch = images[:TIMED["batch"]]
  small = vc.fold(*vc.compact(model, variables, plan, images))
  calls = {name: bench.compiled(one.apply, values, batch).call
           for name, (one, values) in {"dense": (model, variables), "plan": small}.items()}
  found = bench.paired(calls, rounds=ROUNDS)
  predicted, seconds = report.milliseconds(plan, TIMED["batch"]), found["plan"].seconds
  dense = 1e3 * report.times(TIMED["batch"]).dense
  return {**TIMED, "plan": json.loads(plan.to_json()), "processor": bench.processor(),
          "predicted_ms": predicted, "timed_ms": 1e3 * seconds, "dense_ms_of_the_prediction": dense,
          "dense_ms": 1e3 * found["dense"].seconds, "predicted_speedup": dense / predicted,
          "timed_speedup": found["plan"].speedup, "least": found["plan"].low,
          "most": found["plan"].high, "clock": found["plan"].clock, "load": found["plan"].load}


def agreement(quick, full) -> dict[str, Any]:
  """Returns the rank correlation of the KLs that a quick report inferred for options of one block
  with those that a full report measured, and their number."""
  pairs = [(option.kl, measured.kl)
           for row, measured_row in zip(quick.blocks, full.blocks, strict=True)
           for option, measured in zip(row["options"], measured_row["options"], strict=True)
           if not option.measured]
  return {"spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic), "options": len(pairs)}


class Fold:
  """One fold: its dense model, and the results so far, which are written to found.json and results/
  after each row."""

  def __init__(self, data: Data, name: str, seed: int, runs: pathlib.Path):
    self.data, self.name, self.seed, self.runs = data, name, seed, runs
    runs.mkdir(parents=True, exist_ok=True)
    config = dense_config(data, name, seed)
    committed = data.file if seed == 0 else None
    self.dense = committed or train_or_find(config, runs / "dense")
    self.model, self.variables = vc.load(self.dense)
    self.images = images_of(config, self.model, "train", IMAGES)
    self.judge = Judge(config, self.model, self.variables)
    self.file = runs / "found.json"
    self.found = {"data": name, "seed": seed, "models": {}}
    if self.file.exists():
      self.found = json.loads(self.file.read_text())

  def row(self, name: str, make, plan=None):
    """Adds a row: judges the model that `make` returns, unless the row exists."""
    if name not in self.found["models"]:
      facts = {**self.judge(*make()), "commit": environment()["commit"]}
      if plan is not None:
        facts["plan"] = json.loads(plan.to_json())
      self.found["models"][name] = facts
      print(f"{self.name} {name}: {facts}", flush=True)
      self.save()

  def save(self):
    self.file.write_text(json.dumps(self.found, indent=1))
    add(results_of(self.name.partition(":")[0]), self.found)

  def plan(self, name: str, plan: vc.Plan, images=None):
    """Adds the row of a plan that is compacted without training."""
    self.row(name, lambda: vc.load(self.start(name, plan, images)), plan)

  def distil(self, name: str, plan: vc.Plan):
    """Adds the row of the same model after distillation."""
    config = self.data.compact()
    config.data.name, config.seed = self.name, self.seed
    start = self.start(name, plan, self.images)
    self.row(f"{name}, distilled", lambda: self._distilled(config, start, plan,
                                                           f"distilled, {name}"))

  def long(self):
    """Adds rows of half of the heads and factors in every block, distilled for half as many steps
    as the dense model was trained and for as many, at a quarter of its learning rate; the former
    also on mixed images (Mixup), of which the student sees no two alike."""
    name = "uniform, from images"
    start = self.start(name, UNIFORM, self.images)
    for words, share, mixup in (("distilled half as long", 2, 0.0), ("distilled as long", 1, 0.0),
                                ("distilled half as long, on mixed images", 2, 0.8)):
      config, dense = self.data.compact(), self.data.dense()
      config.data.name, config.seed = self.name, self.seed
      config.total_steps = dense.total_steps // share
      config.optim.learning_rate = dense.optim.learning_rate / 4
      config.data.mixup = mixup
      self.row(f"{name}, {words}", functools.partial(
          self._distilled, config, start, UNIFORM, f"{words}, {name}"), UNIFORM)

  def _distilled(self, config, start, plan, directory: str):
    return vc.load(distil(config, start, self.dense, plan, self.runs / directory))

  def start(self, name: str, plan: vc.Plan, images) -> pathlib.Path:
    """Returns the file of a compacted model before training, after making it if it is missing."""
    start = self.runs / f"{name}.safetensors"
    if not start.exists():
      vc.save(start, *vc.compact(self.model, self.variables, plan, images))
    return start

  def report(self, sensitivity: str = "full"):
    directory = self.runs if sensitivity == "full" else self.runs / sensitivity
    if not (directory / "report.json").exists():
      vc.measure(self.model, self.variables, self.images, sensitivity).save(directory)
    return vc.Report.load(directory)

  def spearman(self, report):
    """Computes the rank correlation of predicted and measured KL over random plans."""
    if "spearman" in self.found:
      return
    rng, pairs = np.random.default_rng(self.seed), []
    for _ in range(RANDOM_PLANS):
      plan = random_plan(report, rng)
      measured = self.judge(*vc.compact(self.model, self.variables, plan, self.images))["kl"]
      pairs.append((report.explain(plan).kl, measured))
    self.found |= {"spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic),
                   "kl_pairs": pairs}
    self.save()

  def quick(self):
    """Adds the rows of plans from a quick report, and how well it ranks what it did not try."""
    report = self.report("quick")
    for share in (80, 50):
      self.plan(f"measured quickly, {share} %", report.plan(macs=share / 100), self.images)
    self.found["quick"] = agreement(report, self.report())
    self.save()

  def time(self):
    self.found["timed"] = time_speedup_plan(self.report(), self.model, self.variables, self.images)
    self.save()

  def narrow(self) -> dict[str, pathlib.Path]:
    """Returns the files of the narrower dense models, after training those that are missing."""
    return {name: train_or_find(dense_config(self.data, self.name, self.seed, width),
                          self.runs / f"{width} wide")
            for name, width in zip(NARROWER, self.data.widths, strict=True)}

  def scratch(self, name: str, plan: vc.Plan):
    """Adds the row of a plan that is trained from scratch, as the dense model was."""
    config = configs.complete(dense_config(self.data, self.name, self.seed))
    config.plan = plan.to_json()
    self.row(f"{name}, from scratch", lambda: vc.load(
        train_or_find(config, self.runs / f"from scratch, {name}")), plan)

  def run(self):
    """Adds all rows; those that need no training come first."""
    self.row("dense", lambda: (self.model, self.variables))
    self.plan("uniform, by order", UNIFORM)
    report = self.report()
    plans = {"uniform, from images": UNIFORM, "measured, 80 %": report.plan(macs=0.8),
             "uniform, 50 %": self.data.half, "measured, 50 %": report.plan(macs=0.5)}
    for name, plan in plans.items():
      self.plan(name, plan, self.images)
    self.spearman(report)
    self.quick()
    for name in reversed(plans):   # the smallest models first: distillation helps them most
      self.distil(name, plans[name])
    for name in ("uniform", "measured, 50 %"):
      self.scratch(name, plans.get(name, UNIFORM))
    for name, file in self.narrow().items():
      self.row(name, functools.partial(vc.load, file))


def add(file: pathlib.Path, found: dict):
  """Writes what was found into the fold of the same data and seed in a file of results. What this
  run has not measured stays there, each row with the commit that measured it."""
  folds = {(fold["data"], fold["seed"]): fold for fold in load(file)}
  before = folds.get((found["data"], found["seed"]), {})
  rows = {name: {"commit": before["commit"], **row}
          for name, row in before.get("models", {}).items()}
  folds[found["data"], found["seed"]] = {
      **before, **environment(), **found, "models": rows | found.get("models", {})}
  file.write_text(json.dumps({"folds": [folds[key] for key in sorted(folds)]}, indent=1) + "\n")


def load(file: pathlib.Path) -> list[dict]:
  return json.loads(file.read_text())["folds"] if file.exists() else []


NARROWER = ("narrower dense model", "narrowest dense model")
NAMES = {
    "dense": "dense",
    NARROWER[0]: "narrower dense model with about half of the MACs, trained as long",
    NARROWER[1]: "narrower dense model with about a quarter of the MACs, trained as long",
    "uniform, by order": "half of the heads and factors in every block, without images",
    "uniform, from images": "the same, fitted to 1,024 images",
    "uniform, from images, distilled": "the same, distilled for a tenth of the steps",
    "uniform, from images, distilled half as long":
        "the same, for half as many steps as the dense model, at a higher rate",
    "uniform, from images, distilled half as long, on mixed images":
        "the same, for half as many steps, on mixed images (Mixup)",
    "uniform, from images, distilled as long":
        "the same, for as many steps as the dense model, on images as they are",
    "uniform, from scratch": "the same, trained from scratch as long as the dense model",
    "uniform, 50 %": "half of the heads and stronger factors in every block, fitted to images",
    "uniform, 50 %, distilled": "the same, distilled",
    "measured quickly, 80 %": "plan of 80 % from a quick report",
    "measured quickly, 50 %": "plan of 50 % from a quick report",
    "measured, 80 %": "measured plan of 80 %",
    "measured, 80 %, distilled": "the same, distilled",
    "measured, 50 %": "measured plan of 50 %",
    "measured, 50 %, distilled": "the same, distilled",
    "measured, 50 %, from scratch": "the same, trained from scratch",
}


def difference(rows: list[dict]) -> str:
  """Returns the difference from dense in points, with its paired 95 % interval over all test images
  (Agresti and Min's, whose width is not 0 if no pair differs)."""
  images, gained, lost = (sum(row[key] for row in rows) for key in ("images", "gained", "lost"))
  total = images + 2
  gained, lost = gained + 0.5, lost + 0.5
  margin = 1.96 * (gained + lost - (gained - lost) ** 2 / total) ** 0.5 / total
  return f"{100 * (gained - lost) / images:+.2f} ± {100 * margin:.2f}"


def table(folds: list[dict]) -> str:
  lines = ["| model | MACs | test accuracy | difference from dense, points | KL |",
           "|---|---:|---:|---:|---:|"]
  for name, shown in NAMES.items():
    rows = [fold["models"][name] for fold in folds if name in fold["models"]]
    if not rows:
      lines.append(f"| {shown} |  | not run |  |  |")
      continue
    mean = {key: statistics.mean(row[key] for row in rows) for key in ("macs", "accuracy", "kl")}
    gap = "" if name == "dense" else difference(rows)
    if len(rows) < len(folds):
      shown += f" ({len(rows)} of {len(folds)} dense models)"
    lines.append(f"| {shown} | {100 * mean['macs']:.1f} % | {100 * mean['accuracy']:.2f} % | "
                 f"{gap} | {mean['kl']:.2g} |")
  return "\n".join(lines)


def described(folds: list[dict]) -> str:
  """Returns the table of a data set, followed by the other measurements on it."""
  ranks = ", ".join(f"{fold['spearman']:.3f}" for fold in folds if "spearman" in fold)
  lines = [table(folds), "", f"{len(folds)} dense model{'s' * (len(folds) > 1)}."]
  lines += [f"Rank correlation (Spearman) of predicted and measured KL over {RANDOM_PLANS} random "
            f"plans: {ranks or 'not run'}."]
  inferred = [fold["quick"] for fold in folds if "quick" in fold]
  shown = ", ".join(f"{one['spearman']:.3f} over {one['options']} options" for one in inferred)
  lines += ["Rank correlation of the KLs that a quick report infers with those that a full one "
            f"measures: {shown or 'not run'}."]
  if not any("timed" in fold for fold in folds):
    lines += ["A plan for a speedup: not timed."]
  for fold in folds:
    if found := fold.get("timed"):
      lines.append(
          f"A plan for a speedup of {found['speedup']:.2f}x at batch {found['batch']}: predicted "
          f"{found['predicted_ms']:.1f} ms, measured {found['timed_ms']:.1f} ms of "
          f"{found['clock']} time, {found['timed_speedup']:.2f}x "
          f"[{found['least']:.2f}, {found['most']:.2f}] as fast as the dense model in {ROUNDS} "
          f"paired rounds (load {found['load']:.1f}, {found['processor']}).")
  return "\n".join(lines)


def rewrite():
  """Writes the tables into docs/compaction.md."""
  page = ROOT / "docs/compaction.md"
  text = page.read_text()
  for name in (*DATA, ADAMW):
    if folds := load(results_of(name)):
      begin, end = f"<!-- {name}: {WRITTEN} -->\n", f"<!-- end of {name} -->"
      start, stop = text.index(begin) + len(begin), text.index(end)
      text = f"{text[:start]}{described(folds)}\n{text[stop:]}"
  page.write_text(text)


def results_of(name: str) -> pathlib.Path:
  return ROOT / f"results/compaction_{name}.json"


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("what", nargs="?", default="run",
                      choices=["run", "long", "narrow", "quick", "time", "tables"])
  parser.add_argument("--data", choices=list(DATA), default="digits")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/compaction"))
  parser.add_argument("--folds", type=int, nargs="+", help="default: all")
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  if arguments.what == "tables":
    return rewrite()
  warnings.filterwarnings("ignore", "blocks_|compact without")
  data = DATA[arguments.data]
  for fold in arguments.folds or range(len(data.names)):
    name = data.names[fold]
    runs = arguments.workdir / f"{name.replace(':', '_')}_seed_{arguments.seed}"
    found = Fold(data, name, arguments.seed, runs)
    getattr(found, arguments.what)()


if __name__ == "__main__":
  main()
