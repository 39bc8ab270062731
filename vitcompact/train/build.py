"""Builds everything that is fixed before the first step of a run, from its config."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

import vitcompact as vc
from vitcompact import convert, files
from vitcompact.data import labels, pipeline
from vitcompact.train import guard, optim, phases, sharding, start
from vitcompact.train import step as steps
from vitcompact.train.config import complete, method_settings
from vitcompact.train.feature_step import make_feature_eval_step
from vitcompact.train.objective import (
    by_replica,
    couples_images,
    make_first_phase,
    make_objective,
)


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that is fixed before the first step."""
  config: FrozenConfigDict
  mesh: jax.sharding.Mesh
  model: Any
  preprocess: Any
  init: Callable
  shapes: steps.TrainState
  shardings: steps.TrainState
  step_at: Callable[[int], Callable]   # step 0, 1, ... -> the jitted train step of its phase
  eval_step: Callable
  augment: Callable     # (key, batch) -> (float images, targets), mixed as in one replica


def resolve(config) -> FrozenConfigDict:
  """A checked, complete and frozen copy. Its plan is JSON text, as a plan's file may change later.
  """
  return FrozenConfigDict(complete(config))


def build(config: FrozenConfigDict, classes: int | None = None) -> Run:
  """Builds the model, the mesh and the jitted functions; nothing is computed or written.

  classes: their number, if the data are not available.
  """
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch("config.batch_size / accumulate", config.batch_size // config.accumulate,
                       mesh)
  sharding.check_batch("config.eval_batch_size", config.eval_batch_size, mesh)
  classes = classes or pipeline.num_classes(config.data.name)
  model = model_of(config, classes).clone(plan=vc.Plan.parse(config.plan))
  model.check()
  if not model.sites():
    raise ValueError("config.model.depth=0: must be at least 1; without blocks there is nothing to "
                     "train but the classifier")
  if model.in_chans != 3:
    raise ValueError(f"config.model.in_chans={model.in_chans}: must be 3, as training decodes "
                     "every image to RGB, grey ones too; leave it out, and convert the trained "
                     f"file afterwards: `{files.CONVERT} FILE --in-chans {model.in_chans}`")
  preprocess, rules = preprocess_of(config, model), model.parameter_rules()
  image_shape = (*preprocess.image_size, 3)
  teacher = make_teacher(config, model)
  phases.check(config, model)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
  optimizers = optim.make_optimizers(config.optim, config.total_steps, params,
                                     optim.decay_mask(params, rules), first_group(config, model))
  decay = (optim.ema_decay(config.ema_half_life, config.total_steps)
           if config.ema_half_life else 0.0)
  init = steps.make_init(model, optimizers.main, image_shape, ema=bool(decay), teacher=teacher)
  shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = steps.state_shardings(shapes, rules, optimizers.main, mesh,
                                    teacher.parameter_rules() if teacher else ())
  check_labels(config, model)
  augment = steps.make_augment(config.data, preprocess.mean, preprocess.std, classes,
                               config.accumulate, getattr(model, "grid", None))

  groups = 1
  if config.data.replicas > 1 and couples_images(model, shapes.batch_stats, config.loss):
    if config.data.replicas % config.accumulate:
      raise ValueError(f"config.data.replicas={config.data.replicas} must be a multiple of config."
                       f"accumulate={config.accumulate}: the gradient of an image depends on the "
                       "other images of its replica, so microbatches cannot split replicas")
    groups = config.data.replicas // config.accumulate

  @functools.cache
  def compiled(phase: phases.Phase):
    step = steps.make_train_step(
        by_replica(objective_of(config, model, teacher, phase), groups),
        optimizers.first if phase.first else optimizers.main, optimizers.rate, augment,
        accumulate=config.accumulate, ema_decay=decay, groups=config.data.replicas)
    if config.optim.skip_nonfinite:
      step = guard.keep_finite(step)
    return steps.jit_train_step(step, shardings, mesh)

  images = preprocess.mean, preprocess.std
  if model.num_classes:
    eval_step = steps.make_eval_step(model, *images)
  else:
    eval_step = make_feature_eval_step(model, model.clone(plan=vc.Plan()), *images)
  one_replica = steps.make_augment(config.data, preprocess.mean, preprocess.std, classes,
                             max(1, config.data.replicas), getattr(model, "grid", None))
  return Run(config, mesh, model, preprocess, steps.jit_init(init, shardings), shapes, shardings,
             lambda step: compiled(phases.phase_at(config, model, step)),
             steps.jit_eval_step(eval_step, mesh), one_replica)


def model_of(config, classes: int):
  """The dense model of a config, for data with `classes` classes; config.model.num_classes=0 leaves
  the classifier out."""
  sizes = config.model.to_dict()
  num_classes = sizes.pop("num_classes", classes)
  if num_classes not in (0, classes):
    raise ValueError(f"config.model.num_classes={num_classes}, and {config.data.name} has "
                     f"{classes} classes; leave it out, or give 0 for a model without a classifier")
  return vc.create_model(sizes.pop("name"), num_classes=num_classes, **sizes)


def preprocess_of(config, model):
  """How images are prepared in evaluation: the model's own way, with the crop of the config if that
  gives one, and without a crop for images generated at the model's size. If the file `init_from`
  was trained with another mean and std, these are kept.
  """
  own = vc.preprocess(model)
  file = config.init_from and start.file_of("init_from", config.init_from)
  if file and file.suffix == ".safetensors" and "pixels" in convert.read_metadata(file):
    own = dataclasses.replace(vc.preprocess(file), crop=own.crop, image_size=own.image_size)
  if pipeline.shows_whole(config.data.name):
    return dataclasses.replace(own, crop=1.0, crop_mode="center")
  crop = None if config.data.eval_fit == "warp" else config.data.eval_crop or own.crop
  return dataclasses.replace(own, crop=crop)


def batch_shapes(run: Run) -> dict:
  """The shapes, dtypes and sharding of the batch that the train step takes."""
  size, place = run.config.batch_size, sharding.batches(run.mesh)
  shapes = {"image": ((*run.preprocess.image_size, 3), np.uint8), "label": ((), np.int32)}
  if run.config.data.augment == "token_labels":
    shapes |= {"label_map": (labels.SHAPE, np.float16), "label_box": ((4,), np.float32)}
  return {name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=place)
          for name, (shape, dtype) in shapes.items()}


def check_labels(config, model):
  """Raises ValueError if the model cannot learn from token labels, or if no weight of the loss has
  an effect."""
  of_classes = [name for name in ("labels", "hard", "soft", "logits") if config.loss[name]]
  if of_classes and not model.num_classes:
    raise ValueError(f"config.loss.{of_classes[0]}={config.loss[of_classes[0]]} needs a "
                     "classifier, and config.model.num_classes=0 leaves it out; set it to 0, and "
                     "learn from features with config.loss.patches and a teacher")
  if not model.num_classes and not config.compact.distil:
    return   # the model is compacted but not trained
  weights = {f"loss.{name}" for name in ("labels", "hard", "soft", "logits", "patches")}
  weights |= {key for key, setting in method_settings(model.plan.methods()).items()
              if setting.is_weight and key.startswith("loss.")}
  if "patch logits" in model.teaches:
    weights.add("loss.patch_labels")
  if not any(config.loss[key.removeprefix("loss.")] for key in weights):
    raise ValueError(f"every weight of config.loss that affects {model.variant} is 0: nothing "
                     f"would be learnt; set one of {', '.join(sorted(weights))}")
  if config.data.augment != "token_labels":
    return
  if "patch logits" not in model.teaches:
    raise ValueError(f"config.data.augment='token_labels' needs the patch logits of LV-ViT, and "
                     f"{model.variant} has none; use 'randaugment'")
  if config.data.mixup or config.data.cutmix:
    raise ValueError("config.data.augment='token_labels' is used with MixToken, not with mixup or "
                     "cutmix: set config.data.mixup and config.data.cutmix to 0")


def first_group(config, model) -> optim.FirstGroup | None:
  """The parameters that a method's first phase trains; None if the plan has no such method."""
  if (found := phases.first_phase(model.plan)) is None:
    return None
  scope, phase = found
  return optim.FirstGroup(scope, phase.parameters, config[phase.section])


def objective_of(config, model, teacher, phase: phases.Phase):
  """The objective that a phase minimises."""
  student = model.clone(plan=phase.plan)
  if phase.first is not None:
    return make_first_phase(student, phase.first, config[phase.first.section].weight,
                            config.batch_size // config.data.replicas)
  second = None if phase.second is None else model.clone(plan=phase.second)
  return make_objective(student, config.loss, teacher, second)


def make_teacher(config, model):
  """The teacher, or None: the model `config.teacher.name`, or the dense form of `model`."""
  weights = [key for key in ("hard", "soft", "logits", "patches", "attention")
             if config.loss[key]]
  if not config.teacher.file:
    if weights:
      raise ValueError(f"config.loss.{weights[0]}={config.loss[weights[0]]} learns from a teacher; "
                       "give config.teacher.file=FILE.safetensors, or set it to 0")
    return None
  if not weights:
    raise ValueError(f"config.teacher.file={config.teacher.file!r} is not used by any loss: give "
                     "config.loss.hard, soft, logits, patches or attention a weight")
  if model.mixes_images:
    raise ValueError("MixToken mixes images inside the student, and the teacher would see them "
                     "unmixed; set config.model.mix_token=False")
  if config.loss.patches and not model.teaches:
    raise ValueError(f"config.loss.patches={config.loss.patches} needs the patches of DeiT or "
                     f"LV-ViT before pooling, and {model.variant} has none; set it to 0")
  if config.loss.patch_error == "divergence" and "patch logits" not in model.teaches:
    raise ValueError("config.loss.patch_error='divergence' is for LV-ViT's patch logits, and "
                     f"{model.variant} has patch features; use 'square'")
  if not config.teacher.name:
    return model.clone(plan=vc.Plan())
  if config.loss.patches:
    raise ValueError(f"config.loss.patches compares with the dense form of {model.variant}; use "
                     f"config.teacher.name='' instead of {config.teacher.name!r}, or set it to 0")
  teacher = vc.create_model(config.teacher.name, num_classes=model.num_classes,
                            image_size=model.image_size, dtype=model.dtype)
  ours, theirs = vc.preprocess(model), vc.preprocess(teacher)
  if (ours.mean, ours.std) != (theirs.mean, theirs.std):
    raise ValueError(f"config.teacher.name={config.teacher.name!r} takes images with mean "
                     f"{theirs.mean} and std {theirs.std}, and {model.variant} with {ours.mean} "
                     f"and {ours.std}, but both see the same images; use another teacher")
  return teacher


def fresh_state(run: Run) -> steps.TrainState:
  """The state before step 1: parameters drawn from the seed or read from `config.init_from`, and
  the teacher's variables."""
  config, state = run.config, run.init(jax.random.key(run.config.seed))
  classes = pipeline.class_names(config.data.name)
  if config.teacher.file:
    teacher = start.load_teacher(config.teacher.file, make_teacher(config, run.model), classes)
    state = state.replace(teacher=jax.device_put(teacher, run.shardings.teacher))
  first = phases.first_phase(run.model.plan)
  if first and not phases.first_steps(config, run.model.plan) and (
      not config.init_from or start.is_dense(config.init_from)):
    scope, phase = first
    raise ValueError(f"the parameters of the plan's {scope} are newly initialised, and only their "
                     f"first phase trains them; set config.{phase.section}.steps, or start from a "
                     "file that has trained ones")
  if not config.init_from:
    return state
  variables = start.load_variables(
      config.init_from, run.model,
      lambda: start.calibration_images(config, run.preprocess), classes)
  return start.state_with_variables(state, variables, run.shardings)
