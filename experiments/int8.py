"""What 8 bits cost, kind of product by kind, and what they save: on Fashion-MNIST.

  python -m experiments.int8            # results/int8_fashion_mnist.json, a minute of one core
  python -m experiments.int8 tables     # into docs/deploying.md, from results/

The dense model of results/ is exported to ONNX, and calibrated on training images. Accuracies are
of the 10,000 test images, which choose nothing.
"""
import argparse
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np

import vitcompact as vc
from configs import fashion_mnist
from experiments.benchmarks.tables import ROOT
from vitcompact import bench, runtimes
from vitcompact.data import pipeline
from vitcompact.export import int8, onnx_file
from vitcompact.export.program import Program
from vitcompact.measure import divergence
from vitcompact.receipt import environment
from vitcompact.train import config as configs

FILE = ROOT / "results/fashion_mnist_dense.safetensors"
OUT = ROOT / "results/int8_fashion_mnist.json"
CALIBRATION, BATCH = 512, 500
BLOCK = ("queries, keys, values", "queries, keys, values", "queries, keys, values", "out", "fc1",
         "fc2")
WRITTEN = "written by `python -m experiments.int8 tables` from results/"


def kinds(names: list[str], depth: int) -> dict[str, list[str]]:
  """{kind: nodes} of the products of a dense model, which come in the order of its layers."""
  first, *blocks, last = names
  found = {"all": names, "patch embedding": [first], "head": [last]}
  for kind, name in zip(BLOCK * depth, blocks, strict=True):
    found.setdefault(kind, []).append(name)
  return found


def run(folder: pathlib.Path, count: int | None = None):
  """(rows, how many images): of the file in float32, of all products in 8 bits, of each kind alone,
  and of all but it. count: of batches of test images, None: all."""
  model, variables = vc.fold(*vc.load(FILE))
  program = Program(model, variables, vc.preprocess(FILE))
  whole = folder / "whole.onnx"
  onnx_file.write(program, whole)
  names = int8.products_with_weights(whole)
  groups = kinds(names, model.depth)
  groups |= {f"all but {kind}": [name for name in names if name not in nodes]
             for kind, nodes in groups.items() if kind != "all"}
  data = configs.complete(fashion_mnist.get_config()).data
  shown = program.preprocess.normalise(
      pipeline.sample(data, "train", CALIBRATION, program.preprocess))
  batches = [next_batch for _, next_batch in zip(range(count or 10 ** 9), pipeline.eval_batches(
      data, "test", program.preprocess, batch_size=BATCH), strict=False)]
  images, labels, mask = (np.concatenate([batch[key] for batch in batches])
                          for key in ("image", "label", "mask"))
  images, labels = program.preprocess.normalise(images[mask > 0]), labels[mask > 0]
  calls, rows, exact = {}, {}, None
  for kind, nodes in {"none": [], **groups}.items():
    path = folder / f"{len(calls)}.onnx"
    shutil.copy(whole, path)
    if nodes:
      int8.write(path, program, shown, nodes)
    one = runtimes.opened(path, "ort", threads=1)
    logits = np.concatenate([one(images[i:i + BATCH]) for i in range(0, len(images), BATCH)])
    exact = logits if kind == "none" else exact
    rows[kind] = {"quantised": kind, "accuracy": float((logits.argmax(-1) == labels).mean()),
                  "kl": divergence(exact, logits), "bytes": path.stat().st_size}
    calls[kind] = lambda one=one: one(images[:8])
  for kind, timing in bench.paired(calls).items():
    rows[kind] |= {"speed": [timing.speedup, timing.low, timing.high]}
  return list(rows.values()), len(images)


def table(found: dict) -> str:
  lines = ["| in 8 bits | test accuracy | KL to float32 | file | speed, float32 = 1 |",
           "|---|---:|---:|---:|---:|"]
  for row in found["rows"]:
    middle, low, high = row["speed"]
    lines.append(f"| {row['quantised']} | {100 * row['accuracy']:.2f} % | {row['kl']:.1g} | "
                 f"{row['bytes'] / 1e6:.2f} MB | {middle:.2f}x [{low:.2f}, {high:.2f}] |")
  return "\n".join([*lines, "", f"`{found['command']}`: the DeiT of {found['data']} (width 60), "
                    f"{found['images']:,} test images, ONNX Runtime, one thread of "
                    f"{found['processor']}, batch 8, CPU seconds, load {found['load']:.1f}."])


def rewrite():
  path = ROOT / "docs/deploying.md"
  text = path.read_text(encoding="utf-8")
  begin, end = f"<!-- int8: {WRITTEN} -->", "<!-- end of int8 -->"
  start, stop = text.index(begin), text.index(end)
  found = json.loads(OUT.read_text())
  path.write_text(f"{text[:start]}{begin}\n{table(found)}\n{text[stop:]}", encoding="utf-8")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", nargs="?", choices=["run", "tables"], default="run")
  if parser.parse_args().what == "tables":
    rewrite()
    return
  load = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as folder:
    rows, images = run(pathlib.Path(folder))
  about = {**environment(), "command": "python -m experiments.int8", "data": "Fashion-MNIST",
           "processor": bench.processor(), "images": images, "load": load}
  OUT.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
  rewrite()


if __name__ == "__main__":
  main()
