"""vitcompact bench: how fast compact models are on this machine, compared with the dense one."""
import contextlib
import os
import pathlib
import statistics
import tempfile
import time
from typing import NamedTuple

import click

COLUMNS = ("model", "runtime", "parameters", "MACs", "ms", "images/s", "speed, dense = 1",
           "of the MACs' ratio")
XLA_THREADS = "PJRT_NPROC"   # environment variable that XLA reads when it starts on a CPU


class Row(NamedTuple):
  """What is timed: a deployed model (None for an exported file, which is not counted) and a
  function without arguments."""
  label: str
  runtime: str
  model: object
  call: object


def candidates(name: str, plans, image_size: int | None) -> dict:
  """{label: deployed model}, the dense one first. name: of a model or of weights."""
  import vitcompact as vc
  from vitcompact import hub
  from vitcompact.cli import weights

  fields = {} if image_size is None else {"image_size": image_size}
  if not hub.is_model_name(name):
    if plans:
      raise ValueError(f"{name} has its own plan; leave --plan out")
    model = vc.load(weights.file_of(name))[0].clone(deploy=True, **fields)
    model.check()
    return {"dense": model.clone(plan=vc.Plan()), name: model}
  models = {"dense": vc.create_model(name, deploy=True, **fields)}
  for plan in plans:
    models[plan] = vc.create_model(name, plan=vc.Plan.parse(plan), deploy=True, **fields)
  return models


def random_variables(model):
  """Random weights, made quickly; variances are positive."""
  import jax
  import jax.numpy as jnp

  from vitcompact.checks import variable_shapes
  from vitcompact.tune import random_arrays

  variables = random_arrays(variable_shapes(model))
  if "batch_stats" in variables:
    variables["batch_stats"] = jax.tree.map(jnp.ones_like, variables["batch_stats"])
  return variables


def forward(model, batch: int, runtime: str = "xla", threads: int | None = None, folder=None):
  """A function without arguments: inference on `batch` random images, with random weights.

  folder: where to write the model file, for runtimes other than XLA.
  """
  import vitcompact as vc
  from vitcompact import bench, runtimes, timm_network
  from vitcompact.checks import image_shapes
  from vitcompact.export import onnx_file
  from vitcompact.export.program import Program
  from vitcompact.tune import random_arrays

  compiled = runtime == "torch-compile"
  runtime, precision, _ = runtimes.TIMED[runtime]
  variables, images = random_variables(model), random_arrays(image_shapes(model, batch))
  if runtime == "xla":
    half = model.clone(dtype=precision) if precision != "float32" else model
    return bench.compiled(half.apply, variables, images).call
  if runtime == "torch":
    return timm_network.forward(model, variables, batch, threads=threads, precision=precision,
                                compiled=compiled)
  path = pathlib.Path(folder, f"{len(list(pathlib.Path(folder).iterdir()))}.onnx")
  onnx_file.write(Program(model, variables, vc.preprocess(model)), path)
  run = runtimes.load(path, runtime, threads=threads, precision=precision)
  return lambda: run(images)


def exported_row(path, batch: int, runtime: str, threads: int | None) -> Row:
  """The row of a file that `vitcompact export` wrote, run on random images."""
  import numpy as np

  from vitcompact import runtimes

  runtime, precision, name = runtimes.TIMED[runtime]
  run = runtimes.load(path, runtime, threads=threads, precision=precision)
  if run.batch not in (None, batch):
    raise ValueError(f"{path} takes {run.batch} images at a time: give --batch {run.batch}")
  rng, shape = np.random.default_rng(0), (batch, *run.shape)
  images = rng.integers(0, 256, shape, np.uint8) if run.dtype == np.uint8 else \
      rng.normal(size=shape).astype(run.dtype)
  return Row(str(path), name, None, lambda: run(images))


def can_read(runtime: str, path: str) -> bool:
  """Whether this runtime can time a file. XLA computes in the file's own precision."""
  from vitcompact import runtimes

  name, precision, _ = runtimes.TIMED[runtime]
  return (pathlib.Path(path).suffix in runtimes.RUNTIMES.get(name, ())
          and (name, precision) != ("xla", "bfloat16"))


def rows_to_time(names, plans, image_size, batch, chosen, threads,
                 folder) -> tuple[list[Row], list[str]]:
  """(rows to time: each model dense and under its plans in each runtime, then exported files;
  which models PyTorch has no network for, and why)."""
  from vitcompact import runtimes, timm_network

  files = [name for name in names if pathlib.Path(name).suffix in (".onnx", ".xml", ".stablehlo")]
  torch = [runtime for runtime in chosen if runtimes.TIMED[runtime][0] == "torch"]
  if torch and set(names) - set(files):
    timm_network.installed()   # before minutes of compiling for the other runtimes
  rows, refusals = [], {}
  for name in names:
    if name in files:
      fitting = [runtime for runtime in chosen if can_read(runtime, name)]
      if plans or image_size is not None:
        raise ValueError(f"{name} has its own plan and size: leave --plan and --image-size out")
      if not fitting:
        known = [runtime for runtime in runtimes.TIMED if can_read(runtime, name)]
        raise ValueError(f"{name} is read by {', '.join(known)}, not by {', '.join(chosen)}: give "
                         "--runtime")
      rows += [exported_row(name, batch, runtime, threads) for runtime in fitting]
      continue
    models = {label if len(names) == 1 or label == name else f"{name}, {label}": model
              for label, model in candidates(name, plans, image_size).items()}
    refused = {label: why for label, model in models.items()
               if torch and (why := timm_network.refusal(model))}
    refusals |= refused
    for runtime in chosen:
      rows += [Row(label, runtimes.TIMED[runtime][2], model,
                   forward(model, batch, runtime, threads, folder))
               for label, model in models.items() if runtime not in torch or label not in refused]
  lines = [f"PyTorch has no row for {label}: {why}" for label, why in refusals.items()]
  if not rows:
    raise ValueError(f"{lines[0]}; give --runtime xla, ort or openvino")
  return rows, lines


def table(rows: list[Row], batch: int, rounds: int, clock=None) -> list[tuple]:
  """A line of COLUMNS for each row; speed is relative to the first row of the same runtime, or for
  exported files to the first of all."""
  import vitcompact as vc
  from vitcompact import bench

  # The same label may appear in two runtimes.
  seconds = bench.rounds_of({str(i): row.call for i, row in enumerate(rows)}, rounds=rounds,
                            clock=clock)
  times = [seconds[str(i)] for i in range(len(rows))]
  counts = [row.model and vc.count(row.model) for row in rows]
  lines = []
  for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
    first = next((j for j, other in enumerate(rows) if other.runtime == row.runtime), 0)
    first = 0 if row.model is None else first
    speed, share = "1", ""
    if i != first:
      middle, low, high = bench.ratio(times[first], times[i])
      speed = f"{middle:.2f}x [{low:.2f}, {high:.2f}]"
      if count and counts[first]:
        share = f"{100 * middle * count.macs / counts[first].macs:.0f}%"
    middle = statistics.median(times[i])
    counted = (f"{count.params / 1e6:.2f} M", f"{count.macs / 1e9:.2f} G") if count else ("", "")
    lines.append((row.label, row.runtime, *counted, f"{1000 * middle:.1f}",
                  f"{batch / middle:.1f}", speed, share))
  return lines


@contextlib.contextmanager
def xla_threads(count: int | None):
  """A context in which XLA, if it has not started yet, starts with `count` threads on a CPU; None
  means one per core."""
  before = os.environ.get(XLA_THREADS)
  if count is not None:
    os.environ[XLA_THREADS] = str(count)
  try:
    yield
  finally:
    if before is None:
      os.environ.pop(XLA_THREADS, None)
    else:
      os.environ[XLA_THREADS] = before


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--plan", "plans", multiple=True,
              help="JSON, or a path to it (*.json). Repeatable, to compare several.")
@click.option("--image-size", type=int, help="Side in pixels.  [default: the model's own]")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True,
              help="Images per batch.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True,
              help="How often each model is timed.")
@click.option("--runtime", default="xla", show_default=True,
              help="xla, xla-bf16, ort (ONNX Runtime), openvino, openvino-bf16, torch, torch-bf16, "
              "torch-compile; or several, separated by commas.")
@click.option("--threads", type=click.IntRange(1),
              help="Threads of each runtime.  [default: one per core]")
@click.option("--wall", is_flag=True, help="Measure wall-clock time instead of CPU time.")
def bench(names, plans, image_size, batch, rounds, runtime, threads, wall):
  """Time a model under plans against the dense one, on this machine.

  \b
  vitcompact bench deit_small_patch16_224 --plan plan.json --image-size 224 --batch 8
  vitcompact bench deploy.safetensors --runtime xla,ort,openvino
  vitcompact bench dense.onnx small.onnx --runtime ort,openvino
  vitcompact bench deit_small_patch16_224 --plan plan.json --runtime xla,ort,openvino,torch

  NAMES are models, or weights (files, folders, hf-hub:org/name) that vitcompact wrote and that have
  their own plan. Both are timed in their deployed form, with random weights, the dense model first.
  Files from vitcompact export are timed as they are, relative to the first row. In each round every
  row is timed once: speed is the median over rounds of the ratio to the dense model in the same
  runtime and round, with the lowest and highest in brackets. PyTorch runs timm's own network, for
  the dense model and for a plan whose factorised layers are all merged. On a CPU the times are CPU
  seconds of this process; pin it to a core for steady numbers (taskset -c 0).
  """
  import jax

  from vitcompact.bench import clock_name, processor
  from vitcompact.runtimes import TIMED, thread_count

  chosen = list(dict.fromkeys(runtime.split(",")))
  if wrong := [name for name in chosen if name not in TIMED]:
    raise ValueError(f"--runtime {wrong[0]!r}: must be one of {', '.join(TIMED)}")
  thread_count(threads)
  load = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as folder, xla_threads(threads):
    rows, skipped = rows_to_time(names, plans, image_size, batch, chosen, threads, folder)
    lines = table(rows, batch, rounds, time.perf_counter if wall else None)
  click.echo("\n".join(f"| {' | '.join(line)} |" for line in (
      COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2)), *lines)))
  host = clock_name() == "cpu"
  device = processor() if host else jax.devices()[0].device_kind
  click.echo(f"\n{device}, jax {jax.__version__}, batch {batch}; "
             f"{'CPU seconds' if host and not wall else 'seconds'}, medians of {rounds} rounds, "
             f"{f'threads {threads}, ' if threads else ''}load {load:.1f}.")
  for line in skipped:
    click.echo(line)
