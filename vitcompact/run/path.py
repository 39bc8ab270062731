"""From a dense model to a smaller deployed one: train or load it, measure, plan, compact, distil,
fold, verify, time. Each stage writes a file to the workdir, and is skipped if that file exists:

    dense/              the run that trains the dense model, if config.init_from is empty
    dense.safetensors   init_from converted to our format, if it is a file from another library
    report.json, .html  the report of `measure`
    plan.json, plan.txt the plan and its reasons; for another plan, copy the report and an edited
                        plan.json to a new workdir
    compact.safetensors the compacted model, from which training starts
"""
import copy
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import vitcompact as vc
from vitcompact import batches, convert, pytorch, trees
from vitcompact.data import pipeline
from vitcompact.data.classes import check_classes
from vitcompact.files import sha256
from vitcompact.models import fields_of
from vitcompact.plan import Plan
from vitcompact.report import GOALS, Report
from vitcompact.run import loop, processes, report, workdir
from vitcompact.train import config as configs
from vitcompact.train import start
from vitcompact.train.build import model_of, preprocess_of

REQUEST = "request.json"   # the budget, plan, data and measurement that the stages began with
MEASUREMENT_KEYS = ("data", "images", "sensitivity")   # the others may change until there is a plan
# Files that the last stage writes: another run's are not overwritten.
OUTPUTS = ("trained.safetensors", "compacted.safetensors", "distilled.safetensors",
           "deploy.safetensors", "receipt.json")


class Start(NamedTuple):
  """What the last stage starts from. config: that of its run; dense: the dense model's file; facts:
  for the receipt."""
  config: ConfigDict
  dense: pathlib.Path
  facts: dict[str, Any]


def budget_of(config) -> dict[str, float]:
  """The goal, such as {"macs": share}, of a config that compacts a dense model, else {}."""
  section = config.get("compact", {})
  return {goal: section[goal] for goal in GOALS if section.get(goal)}


def run(config, directory, say: Callable[[str], Any] = print, **options):
  """Runs all stages of a config in a workdir and writes the receipt; called again, it resumes.

  options: of `loop.train`, for the two stages that train.
  """
  directory = workdir.path_of(directory)
  last = prepare(config, directory, say, **options)
  if not last.config.compact.distil:
    result = evaluate_compacted(last.config, directory, vc.load(last.dense)[1])
  else:
    result = loop.train(last.config, directory, **options)
  rows = {"dense": vc.load(last.dense)}
  if not last.config.compact.distil:
    return report.report(result, directory, before=rows, facts=last.facts, name="compacted")
  rows["compacted"] = vc.load(directory / "compact.safetensors")
  return report.report(result, directory, before=rows, facts=last.facts, name="distilled")


def evaluate_compacted(config, directory, dense) -> loop.Result:
  """Evaluates the compacted model as the result of a run without training. dense: the variables of
  the dense model."""
  config = loop.resolve(config)
  built = loop.build(config)
  _, variables = vc.load(directory / "compact.safetensors")
  metrics = {}
  for split in ("val", "test"):
    metrics |= loop.evaluate_split(built, variables, split, teacher=dense)
  metrics["params_digest"] = trees.digest(variables["params"])
  return loop.Result(config, built.model, None, variables, metrics)


def prepare(config, directory: pathlib.Path, say=print, **options) -> Start:
  """Runs all stages up to compact, and returns what the last one trains or evaluates."""
  config = configs.complete(config)
  budget = budget_of(config)
  if len(budget) != 1:
    raise ValueError(f"config.compact: give one of {', '.join(GOALS)}; got {budget or 'none'}")
  if directory.exists() and not directory.is_dir():
    raise ValueError(f"{directory} is a file; give a directory")
  dense = start.file_of("init_from", config.init_from) if config.init_from else None
  if not dense or not pytorch.is_ours(dense):
    given_plan(config, dense_model_of(config))   # a run that is refused trains and writes nothing
    dense = convert_dense(config, dense, directory / "dense.safetensors", say) if dense else \
        train_dense(config, directory / "dense", say, **options)
  if jax.process_index() == 0:
    measure_plan_compact(config, directory, dense, budget, say)
  processes.barrier("the model is compacted")
  plan = Plan.parse(str(directory / "plan.json"))
  last = copy.deepcopy(config)
  last.plan, last.init_from = plan.to_json(), str(directory / "compact.safetensors")
  if config.compact.distil:
    last.keep_start, last.teacher.file = True, str(dense)
  else:
    labels = float(dense_model_of(config).num_classes > 0)
    last.loss.update(labels=labels, logits=0.0, patches=0.0, hard=0.0, soft=0.0)
  about = convert.read_metadata(directory / "compact.safetensors")
  facts = {"compacted_from": str(dense), "dense_sha256": sha256(dense), **start.source_of(dense),
           "compact_sha256": sha256(directory / "compact.safetensors"), "budget": budget,
           **{key: value for key, value in about.items() if key.startswith("calibration_images")},
           "plan_reasons": (directory / "plan.txt").read_text(encoding="utf-8").splitlines()}
  # The last stage is an ordinary run of this plan: it has no budget.
  for name in GOALS:
    last.compact[name] = 0.0
  return Start(configs.complete(last), dense, facts)


def train_dense(config, directory, say, **options) -> pathlib.Path:
  """The file of the dense model, which is trained first if there is none."""
  path = directory / "trained.safetensors"
  if path.exists():
    return path
  if not config.compact.dense_steps:
    raise ValueError("config.init_from is empty: give the dense model's .safetensors, or set "
                     "config.compact.dense_steps to train it first")
  say(f"dense model: {config.compact.dense_steps} steps, in {directory}")
  dense = copy.deepcopy(config)
  dense.plan, dense.total_steps = "", config.compact.dense_steps
  dense.optim.learning_rate = config.compact.dense_learning_rate
  dense.optim.warmup_steps = dense.total_steps // 10
  dense.checkpoint_every = max(1, dense.total_steps // 4)
  dense.loss.update(labels=1.0, logits=0.0, patches=0.0, hard=0.0, soft=0.0)
  for name in GOALS:
    dense.compact[name] = 0.0
  result = loop.train(dense, directory, **options)
  report.report(result, directory)
  return path


def convert_dense(config, path: pathlib.Path, out: pathlib.Path, say) -> pathlib.Path:
  """Converts another library's weights of the config's model and classes to a file of ours."""
  if jax.process_index() == 0:
    model = dense_model_of(config)
    loaded = convert.read_state_dict(model, pytorch.read_checkpoint(path))
    out.parent.mkdir(parents=True, exist_ok=True)
    convert.save(out, model, loaded.variables, force=True,
                 about={"source": str(path), "source_sha256": sha256(path)})
    for line in [f"dense model: {path} as {out.name}", *loaded.lines()]:
      say(line)
  processes.barrier("the dense model is converted")
  return out


def measure_plan_compact(config, directory, dense: pathlib.Path, budget, say):
  """Measures, plans and compacts, skipping each stage whose file exists."""
  model, variables = vc.load(dense)
  check_dense(config, dense, model)
  given = given_plan(config, model)
  batch = config.compact.latency_batch
  timed = {"latency_batch": batch} if budget.keys() & {"speedup", "latency_ms"} else {}
  request = {**budget, **timed, "plan": config.plan, "data": config.data.name,
             **{key: config.compact[key] for key in ("images", "sensitivity")}}
  check_request(directory, request)

  @functools.cache
  def calibration():
    return calibration_images(config, preprocess_of(config, model))

  digest = trees.digest(variables)
  found = measured(config, directory, model, variables, digest, calibration, say)
  # Not earlier: settings that are refused may be corrected in the same workdir.
  write(directory / REQUEST, json.dumps(request, indent=1) + "\n")
  plan = planned(directory, model, given, found, budget, batch)
  out = directory / "compact.safetensors"
  if out.exists():
    check_compacted(out, plan, digest)
  reasons = directory / "plan.txt"
  if not (out.exists() and reasons.exists()):   # a time would be measured again
    write(reasons, reasons_of(found, plan, budget, batch) + "\n")
  say(f"plan: {reasons.read_text(encoding='utf-8').splitlines()[0]}")
  if out.exists():
    return
  images = calibration()
  with Bar("compact") as progress:
    blocks_done = []

    def step(name, notes):
      blocks_done.append(name)
      progress(name, len(blocks_done), len(found.blocks))

    small, fitted = vc.compact(model, variables, plan, images, step)
  names = pipeline.class_names(config.data.name) if model.num_classes else ()
  convert.save(out, small, fitted, classes=names or None, preprocess=preprocess_of(config, model),
               about={"dense": digest, **start.source_of(dense),
                      "calibration_images": str(len(images)),
                      "calibration_images_digest": trees.digest({"images": images})})


def given_plan(config, model) -> Plan:
  """The config's plan, checked: `Plan()` if it is to be chosen from data."""
  plan = Plan.parse(config.plan)
  model.clone(plan=plan).check()
  return plan


def measured(config, directory, model, variables, digest: str, calibration, say) -> Report:
  """The report in the workdir, measured on the images of `calibration()` if there is none."""
  if (directory / "report.json").exists() and (directory / "report.html").exists():
    try:
      found = Report.load(directory)
      found.check_model(model, digest)
    except ValueError as error:
      raise ValueError(f"{error}, after removing {directory / 'report.json'}") from None
    return found
  with Bar("measure") as progress:
    found = vc.measure(model, variables, calibration(), config.compact.sensitivity, progress)
  directory.mkdir(parents=True, exist_ok=True)
  found.save(directory, force=True)
  say(f"measured on {found.images} images: {directory / 'report.html'}")
  return found


def planned(directory, model, given: Plan, found: Report, budget, batch: int) -> Plan:
  """The plan in the workdir, written if there is none: the given one or the report's."""
  if not (directory / "plan.json").exists():
    plan = given if given != Plan() else found.plan(**budget, batch=batch)
    write(directory / "plan.json", json.dumps(json.loads(plan.to_json()), indent=1) + "\n")
  try:
    plan = Plan.from_json((directory / "plan.json").read_text(encoding="utf-8"))
    model.clone(plan=plan).check()
  except ValueError as error:
    raise ValueError(f"{directory / 'plan.json'}: {error}; correct it, or remove it to get a new "
                     "one") from None
  return plan


def check_compacted(path: pathlib.Path, plan: Plan, digest: str):
  """Raises ValueError unless a compacted file has this plan and this digest of the dense model."""
  try:
    old_plan, about = vc.load(path)[0].plan, convert.read_metadata(path)
  except ValueError as error:
    raise ValueError(f"{error}; remove it to compact again") from None
  if old_plan != plan or about.get("dense") != digest:
    raise ValueError(f"{path} is of another plan or another dense model; for another plan, copy "
                     "report.json, report.html and plan.json to a new directory, and run the same "
                     "command with that one")


def check_dense(config, path: pathlib.Path, model):
  """Raises ValueError unless the file holds the run's dense model, with the run's classes."""
  if model.plan != Plan() or model.deploy:
    raise ValueError(f"{path} holds plan={model.plan.to_json()}, deploy={model.deploy}: the path "
                     "starts from a dense, unfolded model")
  names, expected = pipeline.class_names(config.data.name), dense_model_of(config)
  if model.variant.partition(".")[0] == expected.variant:   # the config may leave the tag out
    expected = expected.clone(variant=model.variant)
  asked = fields_of(expected)
  other = {key: (value, asked.get(key)) for key, value in fields_of(model).items()
           if value != asked.get(key) and key not in model.free_fields}
  if other or model.variant != expected.variant:
    raise ValueError(f"{path} holds {model.variant}, not what config.model and config.data ask for"
                     f": (in the file, asked for) are {other or expected.variant}")
  check_classes(str(path), convert.classes_of(path), names, start.HINT)


def dense_model_of(config):
  """The dense model that a config and its data ask for."""
  return model_of(config, pipeline.num_classes(config.data.name))


def check_request(directory: pathlib.Path, request: dict):
  """Raises ValueError for a workdir that began with another budget, plan, data or measurement, or
  that has the results of another run."""
  path = directory / REQUEST
  if not path.exists():
    if others := [name for name in OUTPUTS if (directory / name).exists()]:
      raise ValueError(f"{directory / others[0]} exists, and is not of a run like this; give "
                       "another directory")
    return
  try:
    old = json.loads(path.read_text(encoding="utf-8"))
    keys = {*old, *request} if (directory / "plan.json").exists() else MEASUREMENT_KEYS
    changes = [f"{key} was {old.get(key)!r} and is {request.get(key)!r}"
               for key in sorted(keys) if old.get(key) != request.get(key)]
  except (ValueError, AttributeError, RecursionError) as error:
    raise ValueError(f"{path}: {error}; use another directory") from None
  if changes:
    raise ValueError(f"{directory} began with other settings: {'; '.join(changes)}. Use another "
                     "directory")


def reasons_of(found: Report, plan: Plan, budget: dict[str, float], batch: int) -> str:
  try:
    return str(found.explain(plan, batch, **budget))
  except ValueError as error:   # a plan by hand, with methods that the report has not tried
    shares = dict(zip(("macs", "params"), found.shares(plan), strict=True))
    missed = [f"{name}={target:g}" for name, target in budget.items()
              if shares.get(name, 0) > target]
    return (f"by hand: MACs {shares['macs']:.1%}, parameters {shares['params']:.1%} of the dense "
            f"model{f', which does not reach {missed[0]}' if missed else ''}; no predicted KL: "
            f"{error}")


def distillation(file) -> dict[str, float]:
  """Loss weights for distilling from the model in a file: from its logits if it has a classifier,
  and from its patches if it has patch features."""
  model = convert.read_model(file)
  return {"labels": 0.0, "logits": float(model.num_classes > 0),
          "patches": float(bool(model.teaches))}


def calibration_images(config, preprocess, split: str = "train") -> np.ndarray:
  """`config.compact.images` calibration images, see `start.calibration_images`, or as many as the
  memory for them holds."""
  count, (height, width) = config.compact.images, preprocess.image_size
  most = batches.MOST_VALUES // (height * width * len(preprocess.mean))
  if count > most:
    warnings.warn(f"of {count:,} calibration images only {most:,} are used: of {height} x {width} "
                  "pixels, they take 1 GiB of memory", stacklevel=2)
  return start.calibration_images(config, preprocess, split, min(count, most))


def write(path: pathlib.Path, text: str):
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


class Bar:
  """A progress bar with the remaining time, as a callback (name, done, total)."""

  def __init__(self, title: str):
    import rich.progress
    columns = rich.progress.Progress.get_default_columns()
    self.progress = rich.progress.Progress(*columns, transient=True)
    self.task = self.progress.add_task(title, total=None)

  def __enter__(self):
    self.progress.start()
    return lambda name, done, total: self.progress.update(self.task, completed=done, total=total)

  def __exit__(self, *_):
    self.progress.stop()
