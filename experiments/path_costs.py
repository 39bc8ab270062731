"""Measures the cost of measuring and compacting a DeiT-S, in units of forward passes with attention
maps over the same images.

  python -m experiments.path_costs            # 12 minutes on one core
  python -m experiments.path_costs tables     # into docs/compaction.md, from results/

With 256 random images of 224 pixels and random weights, only the cost is measured, not accuracy.
Times are CPU seconds of one pinned core. They include each step's compilation, except for the
forward pass, which is compiled beforehand. Each step runs in a process of its own, as a user would
run it, so that its peak of memory is its own; there it is divided by the mean of the forward passes
before and after it, as other processes slow down all.
"""
import argparse
import json
import multiprocessing
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


def measured(name: str) -> dict:
  """Returns one step's "seconds", how many forward "passes" that is, the process's "peak_gib", and
  the seconds of each "forward" pass."""
  import jax
  import numpy as np

  import vitcompact as vc
  from experiments.benchmarks import measure

  warnings.filterwarnings("ignore", category=UserWarning)
  model = vc.create_model(MODEL, num_classes=1000)
  images = np.asarray(measure.normal((IMAGES, 224, 224, 3)))
  variables = measure.random_variables(model, images[:1])
  apply = jax.jit(lambda variables, x: model.apply(variables, x, mutable=["maps"]))

  def forward():
    for start in range(0, IMAGES, BATCH):
      jax.block_until_ready(apply(variables, images[start:start + BATCH]))

  def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start

  plan = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
  call = {"forward": forward, "statistics": lambda: vc.measure(model, variables, images, "none"),
          "quick": lambda: vc.measure(model, variables, images, "quick"),
          "compact": lambda: vc.compact(model, variables, plan, images=images)}[name]
  jax.block_until_ready(apply(variables, images[:BATCH]))
  before, spent, after = seconds(forward), seconds(call), seconds(forward)
  return {"seconds": spent, "passes": 2 * spent / (before + after), "forward": [before, after],
          "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


def run():
  """Measures each step in a process of its own and writes the results."""
  from vitcompact import bench
  from vitcompact.receipt import environment

  found = {**environment(), "command": "python -m experiments.path_costs", "model": MODEL,
           "images": IMAGES, "processor": bench.processor(), "load": os.getloadavg()[0],
           "steps": {}}
  for name in SHOWN:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
      found["steps"][name] = pool.apply(measured, [name])
    print(name, found["steps"][name], flush=True)
  RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def described(found: dict) -> str:
  """Returns the table of docs/compaction.md."""
  rows = [f"| {shown} | {step['seconds']:.0f} s | {step['passes']:.1f} | "
          f"{step['peak_gib']:.1f} GiB |" if (step := found["steps"].get(name)) else
          f"| {shown} | not run | | |" for name, shown in SHOWN.items()]
  return "\n".join([
      f"| {found['model']}, {found['images']} images | CPU time | forward passes | peak memory |",
      "|---|---:|---:|---:|", *rows, "",
      f"One core of {found['processor']}, load {found['load']:.1f}, each row in a process of its "
      "own; all but the first include compilation."])


def rewrite():
  text = PAGE.read_text()
  start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
  PAGE.write_text(f"{text[:start]}{described(json.loads(RESULTS.read_text()))}\n{text[stop:]}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("what", nargs="?", choices=["run", "tables"], default="run")
  if parser.parse_args().what == "tables":
    return rewrite()
  suites.pin()
  run()


if __name__ == "__main__":
  main()
