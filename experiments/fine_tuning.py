"""Measures what each setting loses on Fashion-MNIST after a short training, over three seeds.

  python -m experiments.fine_tuning run --workdir runs/fine_tuning   # resumes where it stopped
  python -m experiments.fine_tuning tables        # into results/README.md, from results/

Every model starts as experiments.one_shot compacts it from the trained dense model, and is
distilled from that model for 480 steps, a fiftieth of the dense model's; the dense model is trained
in the same way. A seed determines the order and the flips of the training images; the dense model,
the calibration images and the test images are the same for all. The test split chooses nothing:
every setting that was run is shown.
"""
import argparse
import json
import pathlib
import statistics
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

import vitcompact as vc
from experiments import one_shot
from experiments.accuracy import interval
from experiments.compaction import DATA, Judge, images_of, train_or_find
from vitcompact.receipt import environment
from vitcompact.train import config as configs

NAME = one_shot.NAME
FILE = one_shot.ROOT / f"results/fine_tuning_{NAME}.json"
WRITTEN = "written by `python -m experiments.fine_tuning tables` from results/"
STEPS, SEEDS = 480, 3
FROZEN_COPIES = {"optim.rates": ((r".*/hallucinate/.*", 0.0, 0),)}
# A fifth more steps, the first of which train only the mask predictors.
PREDICTORS_FIRST = {"total_steps": STEPS + STEPS // 5, "reconstruct.steps": STEPS // 5,
                    "reconstruct.learning_rate": 3e-3, "reconstruct.warmup_steps": STEPS // 20,
                    "reconstruct.final_learning_rate": 3e-4}
KEPT_RATIO = {"loss.kept_ratio": 2.0}   # as in configs/dynamicvit_deit_s.py
# Rows that are also compared at about equal MACs: {share of the dense model's: (least, most)}.
EQUAL_MACS = {"80 %": (0.77, 0.83), "50 %": (0.48, 0.54)}
COSTS = ("macs", "ideal_attention_macs")


class Setting(NamedTuple):
  """A setting to train. deployed: the name in experiments.one_shot of its deployed form, whose time
  is shown; plan: the plan to train, if it differs; config: config keys to change."""
  deployed: str
  plan: vc.Plan | None = None
  config: Mapping[str, Any] = MappingProxyType({})


def settings() -> dict[str, dict[str, Setting]]:
  """Returns {question: {name in the table: setting}}."""
  def unchanged(*names):
    return {name: Setting(name) for name in names}

  def measured(share):
    name = f"measured plan of {share} %"
    return {name: Setting(name, vc.Plan.from_dict(one_shot.load()["rows"][name]["plan"]))}

  half = "hMHSA, 3 of 6"
  token, stronger = "Sparsifiner, by token, keep 0.25", "hMHSA + cFFN both, rank 0.25"
  plain = vc.CFFN(branches=1, rep="none", avg_skip=False)
  return {
      "": unchanged("dense"),
      "both papers' methods": {
          **unchanged(half, "cFFN, output, rank 0.5", "hMHSA + cFFN"),
          "hMHSA + cFFN, one branch without a norm": Setting(
              "hMHSA + cFFN", vc.Plan(heads=vc.HMHSA(), ffn=plain)),
          **unchanged(token, "all four axes")},
      "hMHSA": {
          f"{half}, frozen copies": Setting(half, config=FROZEN_COPIES),
          **unchanged("hMHSA, 4 of 6", "hMHSA, 5 of 6 heads computed", f"{half}, rank 2",
                      f"{half}, filters on the grid", f"{half}, on scores")},
      "cFFN": {
          "cFFN, output, rank 0.5, learned scales": Setting(
              "cFFN, output, rank 0.5", vc.Plan(ffn=vc.CFFN(rep="scale"))),
          "cFFN, output, rank 0.5, one branch without a norm": Setting(
              "cFFN, output, rank 0.5", vc.Plan(ffn=plain)),
          **unchanged("cFFN, output, rank 0.25", "cFFN, both, rank 0.5",
                      "cFFN, both, rank 0.25")},
      "attention sparsity": {
          f"{token}, predictors first": Setting(token, config=PREDICTORS_FIRST),
          **unchanged("Sparsifiner, by token, keep 0.5", "Sparsifiner, by token, keep 0.1",
                      "Sparsifiner, by block of 2 x 2, keep 0.25",
                      "BiFormer, 4 x 4 regions, keep 0.5", "KeyMerging, keep 0.75")},
      "token reduction": {
          **unchanged("EViT, keep 0.8 twice", "EViT, keep 0.7 twice", "EViT, keep 0.5 twice",
                      "ToMe, r = 3", "ToMe, r = 4", "MCTF, r = 5"),
          **{name: Setting(f"{name}, random predictors", config=KEPT_RATIO)
             for name in ("DynamicViT, keep 0.7 twice", "FastPath, 0.7 and 0.5 of the patches")},
          **unchanged("cFFN both + EViT 0.7")},
      "equal MACs": {
          **unchanged("3 of 6 heads stay"),
          stronger: Setting(f"{stronger}, distilled", vc.Plan(
              heads=vc.HMHSA(), ffn=vc.CFFN(factor="both", rank_ratio=0.25))),
          **measured(80), **measured(50)},
  }


class Start:
  """The dense model, and the compacted models that training starts from."""

  def __init__(self, workdir: pathlib.Path):
    self.data, self.workdir = DATA[NAME], workdir
    config = self.data.dense()
    self.model, self.variables = vc.load(self.data.file)
    self.images = images_of(config, self.model, "train", one_shot.IMAGES)
    self.judge = Judge(config, self.model, self.variables)
    self.plans = {name: plan for plans in one_shot.plans().values() for name, plan in plans.items()}

  def file(self, name: str, setting: Setting) -> pathlib.Path:
    """Returns the file of a compacted model, after writing it if it is missing."""
    out = self.workdir / f"{name}.safetensors"
    if not out.exists():
      small = self.model, self.variables
      if name != "dense":
        small = vc.compact(*small, setting.plan or self.plans[setting.deployed], self.images)
      vc.save(out, *small)
    return out

  def config(self, name: str, setting: Setting, seed: int, steps: int):
    config, start = configs.complete(self.data.compact()), self.file(name, setting)
    config.plan = vc.load(start)[0].plan.to_json()
    config = configs.complete(config)   # with the keys of the plan's methods
    config.seed, config.total_steps, config.checkpoint_every = seed, steps, steps
    config.optim.warmup_steps = steps // 10
    config.compact.macs = 0.0
    config.init_from, config.teacher.file = str(start), str(self.data.file)
    config.update_from_flattened_dict(setting.config)
    return config


def run(workdir: pathlib.Path, only=None, steps: int = STEPS, seeds: int = SEEDS):
  """Trains and evaluates what the results file does not have yet, seed by seed."""
  workdir.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
  start, found = Start(workdir), load()
  for seed in range(seeds):
    for question, by_name in settings().items():
      for name, setting in by_name.items():
        if only and name not in only:
          continue
        row = found["rows"].setdefault(name, {"question": question, "seeds": {}})
        if str(seed) in row["seeds"]:
          continue
        file = start.file(name, setting)
        if "before" not in row:
          row["before"] = start.judge(*vc.load(file))["accuracy"]
          row["plan"] = json.loads(vc.load(file)[0].plan.to_json())
        done = train_or_find(start.config(name, setting, seed, steps),
                             workdir / f"{name}, seed {seed}")
        row["seeds"][str(seed)] = start.judge(*vc.load(done))
        found |= {**environment(), "steps": steps, "calibration_images": one_shot.IMAGES}
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        print(seed, name, row["before"], row["seeds"][str(seed)]["accuracy"], flush=True)


def load() -> dict:
  return json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}


def differences(found: dict, name: str) -> list[float]:
  """Returns the differences from the dense model trained with the same seed, in points."""
  dense = found["rows"]["dense"]["seeds"]
  return [100 * (row["accuracy"] - dense[seed]["accuracy"])
          for seed, row in found["rows"][name]["seeds"].items()]


def table(found: dict) -> str:
  lines = ["| | setting, in every block | MACs | speed, dense = 1 | before training | "
           "after training | difference from dense, points | 95 % |",
           "|---|---|---:|---:|---:|---:|---:|---:|"]
  timed = one_shot.load()["rows"]
  for question, by_name in settings().items():
    for name, setting in by_name.items():
      row = found["rows"].get(name)
      if not row or len(row["seeds"]) < SEEDS:
        lines.append(f"| {question} | {name} | | | | not run | | |")
        continue
      rows, gaps = list(row["seeds"].values()), differences(found, name)
      after, macs = (statistics.mean(one[key] for one in rows) for key in ("accuracy", "macs"))
      gap, margin = statistics.mean(gaps), interval(gaps)
      gap_cells = ("", "") if name == "dense" else (
          f"{gap:+.2f}", f"[{gap - margin:+.2f}, {gap + margin:+.2f}]")
      lines.append(f"| {question} | {name} | {100 * macs:.1f} % | "
                   f"{one_shot.speed(timed[setting.deployed])[0]:.2f}x | "
                   f"{100 * row['before']:.2f} % | {100 * after:.2f} % | "
                   f"{' | '.join(gap_cells)} |")
  images = found["rows"]["dense"]["seeds"]["0"]["images"]
  lines += ["", equal_macs(found)]
  return "\n".join([*lines, "", (
      f"{found['steps']} steps, {SEEDS} seeds of training from one dense model, "
      f"{found['calibration_images']:,} calibration images, {images:,} test images; intervals "
      "(Student's t) are over seeds. Speeds are those of the same deployed forms in the table "
      "above.")])


def equal_macs(found: dict) -> str:
  """Returns the table of the settings with about equal MACs, the most accurate ones first."""
  timed, deployed = one_shot.load()["rows"], {}
  for by_name in settings().values():
    deployed |= {name: setting.deployed for name, setting in by_name.items()}
  lines = ["| MACs, about | setting | MACs | speed, dense = 1 | difference from dense, points |",
           "|---|---|---:|---:|---:|"]
  for share, (least, most) in EQUAL_MACS.items():
    rows = []
    for name, row in found["rows"].items():
      macs = statistics.mean(one["macs"] for one in row["seeds"].values())
      if name in deployed and len(row["seeds"]) == SEEDS and least <= macs <= most:
        rows.append((statistics.mean(differences(found, name)), name, macs))
    lines += [f"| {share} | {name} | {100 * macs:.1f} % | "
              f"{one_shot.speed(timed[deployed[name]])[0]:.2f}x | {gap:+.2f} |"
              for gap, name, macs in sorted(rows, reverse=True)]
  return "\n".join(lines)


def tables():
  page = one_shot.ROOT / "results/README.md"
  text, found = page.read_text(), load()
  begin, end = f"<!-- fine-tuning: {WRITTEN} -->\n", "<!-- end of fine-tuning -->"
  start, stop = text.index(begin) + len(begin), text.index(end)
  page.write_text(f"{text[:start]}{table(found)}\n{text[stop:]}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("what", choices=["run", "tables"])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/fine_tuning"))
  parser.add_argument("--only", nargs="+", help="names of settings (default: all)")
  arguments = parser.parse_args()
  warnings.filterwarnings("ignore", "blocks_|.*are few")
  if arguments.what == "tables":
    return tables()
  run(arguments.workdir, arguments.only)


if __name__ == "__main__":
  main()
