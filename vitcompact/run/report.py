"""The end of a run: folds, verifies, evaluates and times the model; writes it with a receipt."""
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
from vitcompact.files import sha256
from vitcompact.methods import protocol
from vitcompact.receipt import Receipt, Row, environment, provenance
from vitcompact.run import loop
from vitcompact.train import sharding, start
from vitcompact.train import step as steps
from vitcompact.train.config import formats_of
from vitcompact.train.feature_step import make_feature_eval_step

TIMED_IMAGES = 32
HALF_TOLERANCE = 0.05   # for bfloat16, in which two forms of one function round differently


def report(result: loop.Result, workdir, *, before=None, facts=None,
           name: str = "trained") -> Receipt:
  """Writes trained.safetensors (from which another run may start), deploy.safetensors, receipt.json
  and receipt.md of a finished run to its workdir.

  before: {name: (model, variables)} of earlier stages, such as the dense model, which are evaluated
  as well; facts: more facts for the receipt; name: of this run's model.

  The deployed model is evaluated on the test images itself, as it need not have the trained model's
  accuracy. Folding is verified in float32: in bfloat16, two forms of one function differ much more.
  """
  config, model = result.config, result.model
  run = loop.build(config)
  variables = jax.device_get(sharding.gather(result.variables, run.mesh))
  deploy, folded = vc.fold(model, variables)
  # On the device, so that the timings do not include the transfer.
  images = jnp.asarray(start.calibration_images(config, run.preprocess, "val", TIMED_IMAGES))
  tested = pipeline.num_examples(config.data.name, "test")
  models = {**(before or {}), name: (model, variables), "deployed": (deploy, folded)}
  dense = model.clone(plan=vc.Plan())
  if dense != model and "dense" not in models:
    models = {"dense": (dense, None), **models}
  rows, errors = [], {}
  teacher = models["dense"][1] if "dense" in models else None
  for row, (row_model, row_variables) in models.items():
    scores = {} if row_variables is None else (
        result.metrics if row == name else _test_scores(run, row_model, row_variables, teacher))
    if not model.num_classes and "test_loss" in scores:
      errors[row] = scores["test_loss"]
    accuracy = scores.get("test_accuracy")
    rows.append(Row(row, vc.count(row_model, variables=row_variables), accuracy,
                    tested=0 if accuracy is None else tested))
  timings = _time(rows, models, images)
  random = jax.random.normal(jax.random.key(config.seed), images.shape)
  float32 = (model.clone(dtype="float32"), variables, deploy.clone(dtype="float32"), folded)
  further = {"random images": vc.verify(*float32, random)}
  if model.dtype != "float32":
    further[model.dtype] = vc.verify(model, variables, deploy, folded, images,
                                     tolerance=HALF_TOLERANCE)
  # Read from a file only: weights by name may have a newer commit by now.
  source = start.source_of(config.init_from)
  facts = {
      "model": config.model.name, "plan": config.plan,
      **{f"source of {type(method).__name__}": provenance(method)
         for method in model.plan.methods()}, "data": config.data.name,
      "steps": int(result.state.step) if result.state else 0,
      "batch_size": config.batch_size, "seed": config.seed,
      "eval_params": config.eval_params,
      **{key: result.metrics[key] for key in ("val_accuracy",) if key in result.metrics},
      **({"feature_error": errors} if errors else {}),
      **({"val_is_test": True} if tested and _val_is_test(config, model) else {}),
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
    receipt = write(directory, receipt, {name: (model, variables), "deploy": (deploy, folded)},
                    run.preprocess, source)
    # deploy.safetensors has been written already.
    if formats := [other for other in formats_of(config) if other != "safetensors"]:
      found = exports(formats, directory, deploy.clone(dtype="float32"), folded,
                      preprocess=run.preprocess, classes=classes or None)
      receipt = dataclasses.replace(receipt, facts={**receipt.facts, "exports": found})
      receipt.write(directory)
  return receipt


def _val_is_test(config, model) -> bool:
  """Whether val and test are the same images, as one serves as both if the data lacks the other."""
  val, test = (pipeline.source(config.data.name, split, image_size=model.image_size)
               for split in ("val", "test"))
  return len(val) == len(test) and all(np.array_equal(val[i]["image"], test[i]["image"])
                                       for i in (0, len(val) - 1))


def write(directory: pathlib.Path, receipt: Receipt, files: dict, preprocess=None,
          source=None) -> Receipt:
  """Writes the files {name: (model, variables)}, whose metadata get `preprocess`, the run's
  evaluation, and `source`, that of its initial weights (see `start.source_of`); then the receipt,
  which it returns, with the digests of the files."""
  digests = {}
  try:
    for name, (model, variables) in files.items():
      path = directory / f"{name}.safetensors"
      convert.save(path, model, variables, force=True, classes=receipt.classes or None,
                   preprocess=preprocess, about=source)
      digests[f"{name}_sha256"] = sha256(path)
    receipt = dataclasses.replace(receipt, facts={**receipt.facts, **digests})
    receipt.write(directory)
  except OSError as error:
    raise OSError(f"the run is done, but its report was not written: {error}. Then run the "
                  "same command again") from error
  return receipt


def exports(formats, directory: pathlib.Path, model, variables, **about) -> list[dict]:
  """Exports the deployed model to `formats`; returns each file's digest, its largest difference,
  and its speed relative to XLA, by paired timing."""
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
    facts = {"file": path.name, "runtime": done.runtime, "sha256": done.sha256,
             "largest_difference": done.max_rel, "compared_on": done.images}
    if name in ("onnx", "openvino"):   # the other formats run in XLA
      run, batch = runtimes.load(path), np.asarray(images)
      xla = functools.partial(jax.jit(model.apply), jax.device_put(variables), images)
      timing = bench.paired({"XLA": xla, name: lambda run=run, batch=batch: run(batch)})[name]
      facts |= {"speed_xla_is_1": [timing.speedup, timing.low, timing.high], "clock": timing.clock}
    found.append(facts)
  return found


def method_facts(model, variables, images) -> dict[str, float]:
  """Facts that the plan's methods report about a batch, such as the share of pairs scored."""
  sown = sorted({name for method in model.plan.methods() for name in protocol.collections(method)})
  methods = [method for method in model.plan.methods() if hasattr(method, "facts")]
  if not methods:
    return {}
  _, new = jax.jit(functools.partial(model.apply, mutable=sown))(variables, images)
  return {name: value for method in methods for name, value in protocol.facts(method, new).items()}


def _test_scores(run: loop.Run, model, variables, teacher) -> dict[str, float]:
  """Metrics of a model on test. teacher: variables of the dense model, with whose features those of
  a model without a classifier are compared, or None."""
  images = run.preprocess.mean, run.preprocess.std
  if model.num_classes:
    eval_step = steps.make_eval_step(model, *images)
  else:
    eval_step = make_feature_eval_step(
        model, model.clone(plan=vc.Plan(), deploy=False), *images)
  run = dataclasses.replace(run, model=model, eval_step=steps.jit_eval_step(eval_step, run.mesh))
  return loop.evaluate_split(run, variables, "test", teacher=teacher)


def _time(rows, models, images) -> dict[str, bench.Timing]:
  """Times the rows' models in one paired run; a model without variables is initialised first."""
  calls = {}
  for row in rows:
    model, variables = models[row.name]
    if variables is None:
      variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    calls[row.name] = functools.partial(jax.jit(model.apply), jax.device_put(variables), images)
  return bench.paired(calls)
