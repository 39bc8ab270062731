"""Measures the cost of measuring and compacting a DeiT-S, in units of forward passes with attention
maps over the same images.

  python -m experiments.path_costs            # 12 minutes on one core
  python -m experiments.path_costs tables     # into docs/compaction.md, from results/

With 256 random images of 224 pixels and random weights, only the cost is measured, not accuracy.
Times are CPU seconds of one pinned core. They include each step's compilation, except for the
forward pass, which is compiled beforehand. It is timed before, between and after the other steps,
and each of these is divided by the mean of the two next to it: other processes slow down all.
"""
import argparse
import json
import os
import pathlib
import resource
import time
import warnings

from experiments import bench as suites

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "results/path_costs_cpu.json", ROOT / "docs/compaction.md"
MODEL, IMAGES, BATCH = "deit_small_patch16_224", 256, 32
BEGIN = "<!-- costs: written by `python -m experiments.path_costs tables` from results/ -->\n"
END = "<!-- end of costs -->"
SHOWN = {"forward": "forward pass with maps", "statistics": "`measure(sensitivity=\"none\")`",
         "quick": "`measure(sensitivity=\"quick\")`", "compact": "`compact` from images"}


def measured() -> dict:
  """Returns the results: for each step "seconds", how many forward "passes" that is, and the
  process's "peak_gib" up to its end."""
  import jax
  import numpy as np

  import vitcompact as vc
  from experiments.benchmarks import measure
  from vitcompact.receipt import environment

  model = vc.create_model(MODEL, num_classes=1000)
  images = np.asarray(measure.normal((IMAGES, 224, 224, 3)))
  variables = measure.random_variables(model, images[:1])
  found = {}

  def step(name, call) -> float:
    start = time.process_time()
    call()
    found[name] = {"seconds": time.process_time() - start,
                   "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}
    print(name, found[name], flush=True)
    return found[name]["seconds"]

  apply = jax.jit(lambda variables, x: model.apply(variables, x, mutable=["maps"]))

  def forward():
    for start in range(0, IMAGES, BATCH):
      jax.block_until_ready(apply(variables, images[start:start + BATCH]))

  jax.block_until_ready(apply(variables, images[:BATCH]))
  plan, before = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()), step("forward", forward)
  for name, call in {
      "statistics": lambda: vc.measure(model, variables, images, "none"),
      "quick": lambda: vc.measure(model, variables, images, "quick"),
      "compact": lambda: vc.compact(model, variables, plan, images=images)}.items():
    step(name, call)
    after = step(f"forward after {name}", forward)
    found[name]["passes"] = 2 * found[name]["seconds"] / (before + after)
    before = after
  from vitcompact import bench
  return {**environment(), "command": "python -m experiments.path_costs", "model": MODEL,
          "images": IMAGES, "processor": bench.processor(), "load": os.getloadavg()[0],
          "steps": found}


def described(found: dict) -> str:
  """Returns the table of docs/compaction.md."""
  rows = [f"| {shown} | {step['seconds']:.0f} s | {step.get('passes', 1):.1f} | "
          f"{step['peak_gib']:.1f} GiB |" if (step := found["steps"].get(name)) else
          f"| {shown} | not run | | |" for name, shown in SHOWN.items()]
  return "\n".join([
      f"| {found['model']}, {found['images']} images | CPU time | forward passes | peak memory |",
      "|---|---:|---:|---:|", *rows, "",
      f"One core of {found['processor']}, load {found['load']:.1f}; all rows but the first include "
      "compilation."])


def rewrite():
  text = PAGE.read_text()
  start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
  PAGE.write_text(f"{text[:start]}{described(json.loads(RESULTS.read_text()))}\n{text[stop:]}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("what", nargs="?", choices=["run", "tables"], default="run")
  if parser.parse_args().what == "tables":
    return rewrite()
  warnings.filterwarnings("ignore", category=UserWarning)
  suites.pin()
  RESULTS.write_text(json.dumps(measured(), indent=1) + "\n")


if __name__ == "__main__":
  main()
