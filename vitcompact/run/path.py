"""From a dense model to a smaller deployed one: train or take it, measure, plan, compact, distil,
fold, verify, time. Each stage leaves a file in the workdir, and is passed over where that is there:

    dense/              a run of its own, where the config gives no file to start from
    dense.safetensors   our file of others' weights, where it gives these
    report.json, .html  what `measure` found
    plan.json, plan.txt the plan and its reasons; edit plan.json to have another
    compact.safetensors the compacted model, where training begins
"""
import copy
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import vitcompact as vc
from vitcompact import convert, pytorch, trees
from vitcompact.data import pipeline
from vitcompact.data.classes import check_classes
from vitcompact.models import fields_of
from vitcompact.plan import Plan
from vitcompact.report import Report
from vitcompact.run import loop, processes, report, workdir
from vitcompact.train import config as configs
from vitcompact.train import start
from vitcompact.train.build import model_of, preprocess_of

GOALS = ("macs", "params")
REQUEST = "request.json"   # with what the stages were begun


class Start(NamedTuple):
  """Where the last stage begins. config: of that run; dense: the file of the dense model."""
  config: ConfigDict
  dense: pathlib.Path
  facts: dict[str, Any]


def asked(config) -> dict[str, float]:
  """{"macs": share} of a config whose plan is to be chosen from data; {} where it is no path."""
  section = config.get("compact", {})
  return {goal: section[goal] for goal in GOALS if section.get(goal)}


def run(config, directory, say: Callable[[str], Any] = print, **options):
  """Runs all stages of a config in a workdir, and writes the receipt; called again, goes on.

  options: of `loop.train`, for the two stages that train.
  """
  directory = workdir.path_of(directory)
  last = prepare(config, directory, say, **options)
  if not last.config.compact.distil:
    result = untrained(last.config, directory, vc.load(last.dense)[1])
  else:
    result = loop.train(last.config, directory, **options)
  rows = {"dense": vc.load(last.dense)}
  if not last.config.compact.distil:
    return report.report(result, directory, before=rows, facts=last.facts, name="compacted")
  rows["compacted"] = vc.load(directory / "compact.safetensors")
  return report.report(result, directory, before=rows, facts=last.facts, name="distilled")


def untrained(config, directory, dense) -> loop.Result:
  """The result of a run of no steps: the compacted model, evaluated. dense: variables of the model
  that it was made of."""
  config = loop.resolve(config)
  built = loop.build(config)
  _, variables = vc.load(directory / "compact.safetensors")
  metrics = {}
  for split in ("val", "test"):
    metrics |= loop.evaluate_split(built, variables, split, teacher=dense)
  metrics["params_digest"] = trees.digest(variables["params"])
  return loop.Result(config, built.model, None, variables, metrics)


def prepare(config, directory: pathlib.Path, say=print, **options) -> Start:
  """Every stage before the last one's training."""
  config = configs.complete(config)
  goal = asked(config)
  if len(goal) != 1:
    raise ValueError(f"config.compact: give one of {', '.join(GOALS)}, a share of the dense "
                     f"model's; got {goal}")
  if directory.exists() and not directory.is_dir():
    raise ValueError(f"{directory} is a file; name a directory")
  directory.mkdir(parents=True, exist_ok=True)
  if not config.init_from:
    dense = train_dense(config, directory / "dense", say, **options)
  elif pytorch.is_ours(dense := start.file_of("init_from", config.init_from)):
    pass
  else:
    dense = convert_dense(config, dense, directory / "dense.safetensors", say)
  if jax.process_index() == 0:
    fit(config, directory, dense, goal, say)
  processes.barrier("the model is compacted")
  plan = Plan.parse(str(directory / "plan.json"))
  after = copy.deepcopy(config)
  after.plan, after.init_from = plan.to_json(), str(directory / "compact.safetensors")
  if config.compact.distil:
    after.keep_start, after.teacher.file = True, str(dense)
  else:
    labels = float(asked_model(config).num_classes > 0)
    after.loss.update(labels=labels, logits=0.0, patches=0.0, hard=0.0, soft=0.0)
  facts = {"compacted_from": str(dense), "dense_sha256": sha256(dense), **start.source_of(dense),
           "compact_sha256": sha256(directory / "compact.safetensors"), "budget": goal,
           "plan_reasons": (directory / "plan.txt").read_text(encoding="utf-8").splitlines()}
  # The budget has been spent: what goes on is a run of this plan.
  for name in GOALS:
    after.compact[name] = 0.0
  return Start(configs.complete(after), dense, facts)


def train_dense(config, directory, say, **options) -> pathlib.Path:
  """The file of the dense model, trained first where it is not there."""
  path = directory / "trained.safetensors"
  if path.exists():
    return path
  if not config.compact.dense_steps:
    raise ValueError("config.init_from is empty: give the dense model's .safetensors, or config."
                     "compact.dense_steps, for which it is trained first")
  say(f"dense model: {config.compact.dense_steps} steps, in {directory}")
  first = copy.deepcopy(config)
  first.plan, first.total_steps = "", config.compact.dense_steps
  first.optim.learning_rate = config.compact.dense_learning_rate
  first.optim.warmup_steps = first.total_steps // 10
  first.checkpoint_every = max(1, first.total_steps // 4)
  first.loss.update(labels=1.0, logits=0.0, patches=0.0, hard=0.0, soft=0.0)
  for name in GOALS:
    first.compact[name] = 0.0
  result = loop.train(first, directory, **options)
  report.report(result, directory)
  return path


def convert_dense(config, path: pathlib.Path, out: pathlib.Path, say) -> pathlib.Path:
  """Our file of others' weights, which have to be of the model and classes that a config asks for.
  """
  if jax.process_index() == 0:
    model = asked_model(config)
    loaded = convert.read_state_dict(model, pytorch.read_checkpoint(path))
    convert.save(out, model, loaded.variables, force=True,
                 about={"source": str(path), "source_sha256": sha256(path)})
    for line in [f"dense model: {path} as {out.name}", *loaded.lines()]:
      say(line)
  processes.barrier("the dense model is converted")
  return out


def fit(config, directory, dense: pathlib.Path, goal, say):
  """Measures, plans and compacts, each where its file is not there yet."""
  model, variables = vc.load(dense)
  check_dense(config, dense, model)
  wanted = Plan.parse(config.plan)
  if wanted != Plan():
    model.clone(plan=wanted).check()
  check_request(directory, {**goal, "plan": config.plan, "data": config.data.name,
                            **{key: config.compact[key] for key in ("images", "sensitivity")}})

  @functools.cache
  def calibration():
    return calibration_images(config, preprocess_of(config, model))

  digest = trees.digest(variables)
  if (directory / "report.json").exists() and (directory / "report.html").exists():
    found = Report.load(directory)
    found.check_of(model, digest)
  else:
    with Bar("measure") as progress:
      found = vc.measure(model, variables, calibration(), config.compact.sensitivity, progress)
    found.save(directory)
    say(f"measured on {found.images} images: {directory / 'report.html'}")
  if not (directory / "plan.json").exists():
    plan = wanted if wanted != Plan() else found.plan(**goal)
    write(directory / "plan.json", json.dumps(json.loads(plan.to_json()), indent=1) + "\n")
  try:
    plan = Plan.parse(str(directory / "plan.json"))
    model.clone(plan=plan).check()
  except ValueError as error:
    raise ValueError(f"{directory / 'plan.json'}: {error}; mend it, or remove it to have a new "
                     "one") from None
  reasons = reasons_of(found, plan)
  write(directory / "plan.txt", reasons + "\n")
  say(f"plan: {reasons.splitlines()[0]}")
  compacted = directory / "compact.safetensors"
  if compacted.exists():
    there, about = vc.load(compacted)[0].plan, convert.read_metadata(compacted)
    if there != plan or about.get("dense") != digest:
      raise ValueError(f"{compacted} is of another plan or another dense model; remove it to make "
                       "it anew, or use another workdir")
    return
  with Bar("compact") as progress:
    done = []

    def step(name, notes):
      done.append(name)
      progress(name, len(done), len(found.blocks))

    small, fitted = vc.compact(model, variables, plan, calibration(), step)
  names = pipeline.class_names(config.data.name) if model.num_classes else ()
  convert.save(compacted, small, fitted, classes=names or None,
               preprocess=preprocess_of(config, model),
               about={"dense": digest, **start.source_of(dense)})


def check_dense(config, path: pathlib.Path, model):
  """Refuses a file that is no dense model, or of another model or other classes than the run's."""
  if model.plan != Plan() or model.deploy:
    raise ValueError(f"{path} holds plan={model.plan.to_json()}, deploy={model.deploy}: the path "
                     "starts from a dense, unfolded model")
  names, wanted = pipeline.class_names(config.data.name), asked_model(config)
  if model.variant.partition(".")[0] == wanted.variant:   # weights have a tag, the config need not
    wanted = wanted.clone(variant=model.variant)
  free = {"drop_path_rate": 0.0, "dtype": "float32", "remat": False}
  free |= {"mix_token": False} if hasattr(model, "mix_token") else {}
  if wanted.clone(**free) != model.clone(**free, execution=wanted.execution):
    other = {key: (value, fields_of(wanted).get(key)) for key, value in fields_of(model).items()
             if value != fields_of(wanted).get(key) and key not in (*free, "execution")}
    raise ValueError(f"{path} holds {model.variant}, not what config.model and config.data ask for"
                     f": (there, asked for) are {other or wanted.variant}")
  check_classes(str(path), convert.classes_of(path), names, start.WAY_OUT)


def asked_model(config):
  """The dense model of a config and its data."""
  return model_of(config, pipeline.num_classes(config.data.name))


def check_request(directory: pathlib.Path, request: dict):
  """Refuses a workdir that was begun with another budget, plan, data or measurement."""
  path = directory / REQUEST
  if not path.exists():
    write(path, json.dumps(request, indent=1) + "\n")
    return
  try:
    old = json.loads(path.read_text(encoding="utf-8"))
    other = [f"{key} was {old.get(key)!r} and is {request.get(key)!r}"
             for key in sorted({*old, *request}) if old.get(key) != request.get(key)]
  except (ValueError, AttributeError, RecursionError) as error:
    raise ValueError(f"{path}: {error}; use another directory") from None
  if other:
    raise ValueError(f"{directory} was begun otherwise: {'; '.join(other)}. Use another directory, "
                     "or edit its plan.json and remove compact.safetensors")


def reasons_of(found: Report, plan: Plan) -> str:
  try:
    return str(found.explain(plan))
  except ValueError as error:
    return f"by hand: {plan.to_json()} ({error})"


def distillation(file) -> dict[str, float]:
  """Weights of the loss by which a smaller model learns from that of a file: from its logits, and
  from its patches where it has features of them."""
  model = convert.read_model(file)
  return {"labels": 0.0, "logits": float(model.num_classes > 0),
          "patches": float(bool(model.teaches))}


def calibration_images(config, preprocess, split: str = "train") -> np.ndarray:
  """As many images as the config asks for: see `start.calibration_images`."""
  return start.calibration_images(config, preprocess, split, config.compact.images)


def sha256(path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: pathlib.Path, text: str):
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


class Bar:
  """A progress bar with the time that is left, as a callback (name, done, total)."""

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
