"""Measures what 8 bits cost and save on Fashion-MNIST, for each kind of matrix product.

  python -m experiments.int8                # results/int8_fashion_mnist.json, a minute on one core
  python -m experiments.int8 quantisers     # the same file: NNCF and ONNX Runtime's quantiser
  python -m experiments.int8 tables         # into docs/deploying.md, from results/

The dense model of results/ is exported to ONNX and calibrated on training images. Accuracies are
measured on the 10,000 test images, which choose nothing. `quantisers` needs nncf, which is not a
dependency (pip install nncf); without it nothing is measured.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import numpy as np

import vitcompact as vc
from configs import fashion_mnist
from experiments.benchmarks.tables import ROOT
from vitcompact import bench, runtimes
from vitcompact.cli.bench import random_variables
from vitcompact.data import pipeline
from vitcompact.export import int8, onnx_file, photographs
from vitcompact.export.program import INPUT, Program
from vitcompact.measure import divergence
from vitcompact.receipt import environment
from vitcompact.train import config as configs

FILE = ROOT / "results/fashion_mnist_dense.safetensors"
OUT = ROOT / "results/int8_fashion_mnist.json"
CALIBRATION, BATCH, ROUNDS = 512, 500, 9
SMALL = "deit_small_patch16_224"
BLOCK = ("queries, keys, values", "queries, keys, values", "queries, keys, values", "out", "fc1",
         "fc2")
WRITTEN = "written by `python -m experiments.int8 tables` from results/"


def kinds(names: list[str], depth: int) -> dict[str, list[str]]:
  """Returns {kind: nodes} for the products of a dense model, given in the order of its layers."""
  first, *blocks, last = names
  found = {"all": names, "patch embedding": [first], "head": [last]}
  for kind, name in zip(BLOCK * depth, blocks, strict=True):
    found.setdefault(kind, []).append(name)
  return found


class Subject(NamedTuple):
  """The dense model as a program and as an ONNX file in float32, with its calibration images and
  the images and labels of the test split."""
  program: Program
  path: pathlib.Path
  calibration: np.ndarray
  images: np.ndarray
  labels: np.ndarray


def subject(folder: pathlib.Path, count: int | None = None) -> Subject:
  """Returns the subject; its file is written to the folder. count: test batches, None: all."""
  model, variables = vc.fold(*vc.load(FILE))
  program = Program(model, variables, vc.preprocess(FILE))
  path = folder / "float32.onnx"
  onnx_file.write(program, path)
  int8.products_with_weights(path)   # names the nodes
  data = configs.complete(fashion_mnist.get_config()).data
  calibration = program.preprocess.normalise(
      pipeline.sample(data, "train", CALIBRATION, program.preprocess))
  batches = [next_batch for _, next_batch in zip(range(count or 10 ** 9), pipeline.eval_batches(
      data, "test", program.preprocess, batch_size=BATCH), strict=False)]
  images, labels, mask = (np.concatenate([batch[key] for batch in batches])
                          for key in ("image", "label", "mask"))
  return Subject(program, path, calibration, program.preprocess.normalise(images[mask > 0]),
                 labels[mask > 0])


def logits_of(one: runtimes.Runner, images) -> np.ndarray:
  return np.concatenate([one(images[i:i + BATCH]) for i in range(0, len(images), BATCH)])


def run(folder: pathlib.Path, count: int | None = None):
  """Returns (rows, number of test images): a row for float32, for all products in 8 bits, for each
  kind alone, and for all kinds but one. count: test batches, None: all."""
  program, float32_path, calibration, images, labels = subject(folder, count)
  names = int8.products_with_weights(float32_path)
  groups = kinds(names, program.model.depth)
  groups |= {f"all but {kind}": [name for name in names if name not in nodes]
             for kind, nodes in groups.items() if kind != "all"}
  calls, rows, exact = {}, {}, None
  for kind, nodes in {"none": [], **groups}.items():
    path = folder / f"{len(calls)}.onnx"
    shutil.copy(float32_path, path)
    if nodes:
      int8.write(path, program, calibration, nodes)
    one = runtimes.load(path, "ort", threads=1)
    logits = logits_of(one, images)
    exact = logits if kind == "none" else exact
    rows[kind] = {"quantised": kind, "accuracy": float((logits.argmax(-1) == labels).mean()),
                  "kl": divergence(exact, logits), "bytes": path.stat().st_size}
    calls[kind] = lambda one=one: one(images[:8])
  for kind, timing in bench.paired(calls).items():
    rows[kind] |= {"speed": [timing.speedup, timing.low, timing.high]}
  return list(rows.values()), len(images)


def small() -> Program:
  """Returns a model of common size with random weights, for timing."""
  model = vc.create_model(SMALL, deploy=True)
  return Program(model, random_variables(model), vc.preprocess(model))


def quantised(program: Program, path: pathlib.Path, calibration) -> dict[str, pathlib.Path]:
  """Returns {title: file}; the files are written to the folder of the ONNX file `path`.

  ONNX Runtime's quantiser is used as `export` calls it, and with the outputs of products quantised
  as well. NNCF quantises its own choice of nodes in a transformer, with and without its smoothing
  of activations, and the nodes that ONNX Runtime's quantiser chooses.
  """
  import nncf
  import onnx
  import openvino

  files = {"none": path}
  for title, outputs in (("ONNX Runtime", False), ("ONNX Runtime, results too", True)):
    files[title] = path.with_name(f"ort{outputs}.onnx")
    shutil.copy(path, files[title])
    int8.write(files[title], program, calibration, outputs=outputs)
  products = int8.products_with_weights(path)
  others = [node.name for node in onnx.load(path).graph.node if node.name not in products]
  # {title: (input format, smoothing, ignored nodes)}; nodes have the names of the ONNX file.
  variants = {"NNCF": ("onnx", 0.95, []), "NNCF, no smoothing": ("onnx", -1, []),
          "NNCF, the same products": ("onnx", -1, others), "NNCF on OpenVINO": ("xml", 0.95, []),
          "NNCF on OpenVINO, no smoothing": ("xml", -1, [])}
  for i, (title, (suffix, smoothing, ignored)) in enumerate(variants.items()):
    source = onnx.load(path) if suffix == "onnx" else openvino.Core().read_model(path)
    done = nncf.quantize(
        source, nncf.Dataset([{INPUT: image[None]} for image in calibration]),
        model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration),
        ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=smoothing)))
    files[title] = path.with_name(f"nncf{i}.{suffix}")
    if suffix == "onnx":
      onnx.save(done, files[title])
    else:
      openvino.save_model(done, files[title], compress_to_fp16=False)
  return files


def load(files) -> dict[tuple[str, str], runtimes.Runner]:
  """Returns {(title, runtime): a function of images}, for each file in each runtime that reads it.
  """
  return {(title, runtime): runtimes.load(path, runtime, threads=1)
          for title, path in files.items() for runtime in ("ort", "openvino")
          if path.suffix in runtimes.RUNTIMES[runtime]}


def speeds(runners, images) -> dict[tuple[str, str], tuple[float, float, float]]:
  """Returns the speedup of each over float32 in the same runtime."""
  taken = bench.rounds_of({key: lambda one=one: one(images) for key, one in runners.items()},
                          rounds=ROUNDS)
  return {key: bench.ratio(taken["none", key[1]], taken[key]) for key in runners}


def quantisers(folder: pathlib.Path, count: int | None = None):
  """Returns (rows, number of test images): a row for each quantiser in each runtime."""
  trained, program = subject(folder, count), small()
  files = quantised(trained.program, trained.path, trained.calibration)
  (folder / "small").mkdir()
  path = folder / "small/float32.onnx"
  onnx_file.write(program, path)
  photos = program.preprocess.normalise(photographs(program.preprocess, 8))
  runners = load(files)
  trained_speeds = speeds(runners, trained.images[:8])
  small_speeds = speeds(load(quantised(program, path, photos)), photos[:1])
  exact, rows = logits_of(runners["none", "ort"], trained.images), []
  for (title, runtime), one in runners.items():
    logits, path = logits_of(one, trained.images), files[title]
    rows.append({"quantiser": title, "runtime": runtimes.NAMES[runtime],
                 "accuracy": float((logits.argmax(-1) == trained.labels).mean()),
                 "kl": divergence(exact, logits),
                 "bytes": sum(part.stat().st_size for part in path.parent.glob(f"{path.stem}.*")),
                 "speed": trained_speeds[title, runtime],
                 "speed_small": small_speeds[title, runtime]})
  return rows, len(trained.images)


def quantiser_table(found: dict) -> str:
  lines = ["| quantiser | runs in | test accuracy | KL to float32 | file | speed, float32 = 1 | "
           f"speed of {SMALL} |", "|---|---|---:|---:|---:|---:|---:|"]
  for row in found["rows"]:
    times = ["{:.2f}x [{:.2f}, {:.2f}]".format(*row[key]) for key in ("speed", "speed_small")]
    lines.append(f"| {row['quantiser']} | {row['runtime']} | {100 * row['accuracy']:.2f} % | "
                 f"{row['kl']:.1g} | {row['bytes'] / 1e6:.2f} MB | {' | '.join(times)} |")
  return "\n".join([*lines, "", f"`{found['command']}`: the same model, batch 8, and "
                    f"`{SMALL}` with random weights, batch 1; NNCF {found['nncf']}, calibrated on "
                    f"{found['calibration']} training images and on 8 photographs; one thread of "
                    f"{found['processor']}, CPU seconds, medians of {found['rounds']} rounds, load "
                    f"{found['load']:.1f}."])


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
  text, found = path.read_text(encoding="utf-8"), json.loads(OUT.read_text())
  tables = {"int8": table(found)}
  if found.get("quantisers"):
    tables["quantisers"] = quantiser_table(found["quantisers"])
  for name, lines in tables.items():
    begin, end = f"<!-- {name}: {WRITTEN} -->", f"<!-- end of {name} -->"
    start, stop = text.index(begin), text.index(end)
    text = f"{text[:start]}{begin}\n{lines}\n{text[stop:]}"
  path.write_text(text, encoding="utf-8")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", nargs="?", choices=["run", "quantisers", "tables"], default="run")
  what = parser.parse_args().what
  if what == "quantisers" and importlib.util.find_spec("nncf") is None:
    print("quantisers: skipped, nncf is not installed; pip install nncf")
    return
  if what != "tables":
    old = json.loads(OUT.read_text()) if OUT.exists() else {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
      rows, images = {"run": run, "quantisers": quantisers}[what](pathlib.Path(folder))
    command = "python -m experiments.int8" + ("" if what == "run" else f" {what}")
    about = {**environment(), "command": command, "data": "Fashion-MNIST",
             "processor": bench.processor(), "images": images, "load": load}
    if what == "run":
      new = {**about, "rows": rows, "quantisers": old.get("quantisers")}
    else:
      about |= {"nncf": importlib.metadata.version("nncf"), "calibration": CALIBRATION,
                "rounds": ROUNDS}
      new = {**old, "quantisers": {**about, "rows": rows}}
    OUT.write_text(json.dumps(new, indent=1) + "\n")
  rewrite()


if __name__ == "__main__":
  main()
