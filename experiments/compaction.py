"""What compacting costs in accuracy, step by step, on digits: every image is a test image once.

  python -m experiments.compaction --workdir runs/compaction --out results/compaction_digits.json

For each of five folds a dense model is trained, and measured on its training images. Then, without
training: half of the heads and factors in every block (20 % fewer MACs), by order and weights, and
from images; the measured plans of 80 and of 50 % of the MACs. Two of them are distilled for a tenth
of the dense model's steps. Beside them a narrower dense model of about half of the MACs, trained as
long as the dense one. And 12 random plans, whose predicted and measured KL are compared by rank.
The test split chooses nothing. Run again, it goes on.
"""
import argparse
import json
import pathlib
import statistics
import warnings

import jax
import numpy as np
from scipy.stats import spearmanr

import vitcompact as vc
from configs import compact_digits, digits
from vitcompact.measure import divergence
from vitcompact.receipt import environment
from vitcompact.run import loop, path
from vitcompact.train import config as configs

UNIFORM = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
NARROW = 44            # width of a dense model of about half of the MACs
RANDOM_PLANS = 12
DISTILLED = ("uniform, from images", "measured, 50 %")


def trained(config, directory: pathlib.Path) -> pathlib.Path:
  """The file of a run's model, trained where it is missing."""
  out = directory / "trained.safetensors"
  if not out.exists():
    result = loop.train(config, directory)
    vc.save(out, result.model, jax.device_get(result.variables), force=True)
  return out


def dense_config(fold: int, seed: int, width: int | None = None):
  config = digits.get_config("dense")
  config.data.name, config.seed = f"digits:{fold}", seed
  if width:
    config.model.width = width
  return config


def images_of(config, model, split: str, count: int):
  config = configs.complete(config)
  config.compact.images = count
  return path.calibration_images(config, path.preprocess_of(config, model), split)


class Judge:
  """Accuracy on test and KL from the dense model there."""

  def __init__(self, config, model, variables):
    self.images = images_of(config, model, "test", 10_000)
    self.labels = np.asarray([example["label"] for example in self._examples(config, model)])
    self.dense = self._logits(model, variables)
    self.macs = vc.count(model).macs

  def _examples(self, config, model):
    source = path.pipeline.source(config.data.name, "test", image_size=(model.image_size,) * 2)
    return [source[i] for i in range(len(source))]

  def _logits(self, model, variables):
    return np.asarray(jax.jit(model.apply)(variables, self.images))

  def __call__(self, model, variables) -> dict[str, float]:
    logits = self._logits(model, variables)
    return {"accuracy": float(np.mean(logits.argmax(-1) == self.labels)),
            "kl": divergence(self.dense, logits),
            "macs": vc.count(model.clone(deploy=True)).macs / self.macs}


def random_plan(report, rng) -> vc.Plan:
  """One option or none for each axis of each block."""
  blocks = {}
  for number, row in enumerate(report.blocks):
    for axis in ("heads", "ffn"):
      few = [None, *(option.method for option in row["options"] if option.axis == axis)]
      if (method := few[rng.integers(len(few))]) is not None:
        blocks.setdefault(number, {})[axis] = method
  return vc.Plan(blocks=blocks)


def distilled(fold: int, seed: int, start: pathlib.Path, dense: pathlib.Path, plan, directory):
  config = configs.complete(compact_digits.get_config())
  config.data.name, config.seed, config.plan = f"digits:{fold}", seed, plan.to_json()
  config.init_from, config.teacher.file, config.keep_start = str(start), str(dense), True
  config.compact.macs = 0.0
  return trained(config, directory)


def fold_of(fold: int, seed: int, runs: pathlib.Path) -> dict:
  """{"models": {name: facts}, "spearman": ...} of one fold."""
  config = dense_config(fold, seed)
  dense = trained(config, runs / "dense")
  model, variables = vc.load(dense)
  judge, images = Judge(config, model, variables), images_of(config, model, "train", 1024)
  if not (runs / "report.json").exists():
    vc.measure(model, variables, images, "full").save(runs)
  report = vc.Report.load(runs)
  found = {"dense": judge(model, variables)}
  narrow = trained(dense_config(fold, seed, NARROW), runs / "narrow")
  found["narrower dense model"] = judge(*vc.load(narrow))
  plans = {"uniform, by order": UNIFORM, "uniform, from images": UNIFORM,
           "measured, 80 %": report.plan(macs=0.8), "measured, 50 %": report.plan(macs=0.5)}
  for name, plan in plans.items():
    small, fitted = vc.compact(model, variables, plan, None if "order" in name else images)
    found[name] = judge(small, fitted)
    if name in DISTILLED:
      start = runs / f"{name}.safetensors"
      vc.save(start, small, fitted, force=True)
      end = distilled(fold, seed, start, dense, plan, runs / f"distilled, {name}")
      found[f"{name}, distilled"] = judge(*vc.load(end))
  rng, pairs = np.random.default_rng(fold), []
  for _ in range(RANDOM_PLANS):
    plan = random_plan(report, rng)
    measured = judge(*vc.compact(model, variables, plan, images))["kl"]
    pairs.append((report.explain(plan).kl, measured))
  return {"models": found, "spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic)}


def table(folds: list[dict]) -> str:
  lines = ["| model | MACs | test accuracy | difference from dense, points | KL |",
           "|---|---:|---:|---:|---:|"]
  for name in folds[0]["models"]:
    rows = [(fold["models"][name], fold["models"]["dense"]) for fold in folds]
    gaps = [100 * (row["accuracy"] - dense["accuracy"]) for row, dense in rows]
    spread = f" ± {2.78 * statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) == 5 else ""
    mean = {key: statistics.mean(row[key] for row, _ in rows) for key in rows[0][0]}
    lines.append(f"| {name} | {100 * mean['macs']:.1f} % | {100 * mean['accuracy']:.2f} % | "
                 f"{statistics.mean(gaps):+.2f}{spread} | {mean['kl']:.2g} |")
  ranks = ", ".join(f"{fold['spearman']:.3f}" for fold in folds)
  return "\n".join([*lines, "", f"Spearman of predicted and measured KL over {RANDOM_PLANS} random "
                    f"plans: {ranks}."])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--out", required=True)
  parser.add_argument("--folds", type=int, default=5)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  warnings.filterwarnings("ignore", "blocks_|compact without")
  runs, folds = pathlib.Path(arguments.workdir), []
  for fold in range(arguments.folds):
    folds.append(fold_of(fold, arguments.seed, runs / f"fold_{fold}_seed_{arguments.seed}"))
    pathlib.Path(arguments.out).write_text(json.dumps(
        {"seed": arguments.seed, **environment(), "folds": folds}, indent=1))
    print(table(folds), flush=True)


if __name__ == "__main__":
  main()
