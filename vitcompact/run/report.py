"""The end of a run: fold, verify, evaluate and time the deployed model, write it and a receipt."""
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vitcompact as vc
from vitcompact import bench, convert, runtimes, trees
from vitcompact.data import pipeline
from vitcompact.export import FORMATS, export, photographs
from vitcompact.methods import protocol
from vitcompact.receipt import Receipt, Row, environment
from vitcompact.run import loop
from vitcompact.train import sharding, start
from vitcompact.train import step as steps
from vitcompact.train.config import formats_of
from vitcompact.train.feature_step import make_feature_eval_step

TIMED_IMAGES = 32
HALF_TOLERANCE = 0.05   # of bfloat16, which rounds two forms of one function apart


def report(result: loop.Result, workdir, *, before=None, facts=None,
           name: str = "trained") -> Receipt:
  """Writes trained.safetensors (what another run may start from), deploy.safetensors, receipt.json
  and receipt.md of a finished run into its workdir.

  before: {name: (model, variables)} of the stages before this run, such as the dense model, which
  are evaluated as well; facts: further ones for the receipt; name: of the model of this run.

  The deployed model is evaluated on the test images itself: its accuracy is not taken over. Folding
  is verified in float32: bfloat16 rounds two forms of one function apart by far more.
  """
  config, model = result.config, result.model
  run = loop.build(config)
  variables = jax.device_get(sharding.gather(result.variables, run.mesh))
  deploy, folded = vc.fold(model, variables)
  # On the device: it is the model that is timed, not the way there.
  images = jnp.asarray(start.calibration_images(config, run.preprocess, "val", TIMED_IMAGES))
  tested = pipeline.num_examples(config.data.name, "test")
  models = {**(before or {}), name: (model, variables), "deployed": (deploy, folded)}
  dense = model.clone(plan=vc.Plan())
  if dense != model and "dense" not in models:
    models = {"dense": (dense, None), **models}
  rows, errors = [], {}
  teacher = models["dense"][1] if "dense" in models else None
  for row, (its, own) in models.items():
    scores = {} if own is None else (
        result.metrics if row == name else _test_scores(run, its, own, teacher))
    if not model.num_classes and "test_loss" in scores:
      errors[row] = scores["test_loss"]
    accuracy = scores.get("test_accuracy")
    rows.append(Row(row, vc.count(its, variables=own), accuracy,
                    tested=0 if accuracy is None else tested))
  timings = _time(rows, models, images)
  random = jax.random.normal(jax.random.key(config.seed), images.shape)
  float32 = (model.clone(dtype="float32"), variables, deploy.clone(dtype="float32"), folded)
  further = {"random images": vc.verify(*float32, random)}
  if model.dtype != "float32":
    further[model.dtype] = vc.verify(model, variables, deploy, folded, images,
                                     tolerance=HALF_TOLERANCE)
  # Of a file: of weights by name the newest commit may be another by now.
  source = start.source_of(config.init_from)
  facts = {
      "model": config.model.name, "plan": config.plan, "data": config.data.name,
      "steps": int(result.state.step) if result.state else 0,
      "batch_size": config.batch_size, "seed": config.seed,
      "eval_params": config.eval_params,
      **{key: result.metrics[key] for key in ("val_accuracy",) if key in result.metrics},
      **({"feature_error": errors} if errors else {}),
      "timed_batch": len(images), "params_digest": result.metrics["params_digest"],
      "deploy_digest": trees.digest(folded["params"]),
      **{key: result.metrics[key] for key in ("kept",) if key in result.metrics},
      **method_facts(deploy, folded, images), **source, **(facts or {}), **environment()}
  classes = pipeline.class_names(config.data.name) if model.num_classes else ()
  receipt = Receipt(
      f"{config.model.name} on {config.data.name}",
      tuple(dataclasses.replace(row, timing=timings[row.name]) for row in rows),
      vc.verify(*float32, images), facts, tuple(classes), further)
  if jax.process_index() == 0:
    directory = pathlib.Path(workdir)
    write(directory, receipt, {name: (model, variables), "deploy": (deploy, folded)},
          run.preprocess, source)
    # deploy.safetensors is there already.
    if formats := [other for other in formats_of(config) if other != "safetensors"]:
      found = exports(formats, directory, deploy.clone(dtype="float32"), folded,
                      preprocess=run.preprocess, classes=classes or None)
      receipt = dataclasses.replace(receipt, facts={**receipt.facts, "exports": found})
      receipt.write(directory)
  return receipt


def write(directory: pathlib.Path, receipt: Receipt, files: dict, preprocess=None, source=None):
  """files: {name: (model, variables)}. preprocess: of the run's evaluation, which they keep, as
  they do the source of the weights that the run began with, see `start.source_of`."""
  try:
    for name, (model, variables) in files.items():
      convert.save(directory / f"{name}.safetensors", model, variables, force=True,
                   classes=receipt.classes or None, preprocess=preprocess, about=source)
    receipt.write(directory)
  except OSError as error:
    raise OSError(f"the run is done, but its report was not written: {error}. Then give the "
                  "same command again") from error


def exports(formats, directory: pathlib.Path, model, variables, **about) -> list[dict]:
  """Writes the deployed model in these formats; of each file its digest, its proof, and its speed
  against XLA's, paired, on images of its own."""
  found = []
  for name in formats:
    path = directory / f"deploy{FORMATS[name].suffix}"
    try:
      done = export(model, variables, path, force=True, **about)
    except (ValueError, OSError) as error:
      raise type(error)(f"the run is done, but its model was not exported: {error}. `vitcompact "
                        f"export {directory / 'deploy.safetensors'}` exports it") from error
    images = jnp.asarray(about["preprocess"].normalise(
        photographs(about["preprocess"], TIMED_IMAGES)))
    told = {"file": path.name, "runtime": done.runtime, "sha256": done.sha256,
            "largest_difference": done.max_rel, "compared_on": done.images}
    if name in ("onnx", "openvino"):   # the others are XLA, too
      run, shown = runtimes.opened(path), np.asarray(images)
      ours = functools.partial(jax.jit(model.apply), jax.device_put(variables), images)
      timing = bench.paired({"XLA": ours, name: lambda run=run, shown=shown: run(shown)})[name]
      told |= {"speed_xla_is_1": [timing.speedup, timing.low, timing.high], "clock": timing.clock}
    found.append(told)
  return found


def method_facts(model, variables, images) -> dict[str, float]:
  """What the plan's methods tell of a batch of inference, such as the share of pairs scored."""
  sown = sorted({name for method in model.plan.methods() for name in protocol.collections(method)})
  telling = [method for method in model.plan.methods() if hasattr(method, "facts")]
  if not telling:
    return {}
  _, new = jax.jit(functools.partial(model.apply, mutable=sown))(variables, images)
  return {name: value for method in telling for name, value in protocol.facts(method, new).items()}


def _test_scores(run: loop.Run, model, variables, teacher) -> dict[str, float]:
  """teacher: variables of the dense model, which features are compared with; None without any."""
  images = run.preprocess.mean, run.preprocess.std
  if model.num_classes:
    eval_step = steps.make_eval_step(model, *images)
  else:
    eval_step = make_feature_eval_step(
        model, model.clone(plan=vc.Plan(), deploy=False), *images)
  run = dataclasses.replace(run, model=model, eval_step=steps.jit_eval_step(eval_step, run.mesh))
  return loop.evaluate_split(run, variables, "test", teacher=teacher)


def _time(rows, models, images) -> dict[str, bench.Timing]:
  """Forward passes of the rows' models, in one paired run; an untrained one times as well."""
  calls = {}
  for row in rows:
    model, variables = models[row.name]
    if variables is None:
      variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    calls[row.name] = functools.partial(jax.jit(model.apply), jax.device_put(variables), images)
  return bench.paired(calls)
