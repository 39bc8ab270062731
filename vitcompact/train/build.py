"""All that is fixed before the first step of a run, made from its config."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

import vitcompact as vc
from vitcompact.data import pipeline
from vitcompact.train import guard, optim, settings, sharding, start
from vitcompact.train import step as steps


@dataclasses.dataclass(frozen=True)
class Run:
  """All that is fixed before the first step."""
  config: FrozenConfigDict
  mesh: jax.sharding.Mesh
  model: Any
  preprocess: Any
  init: Callable
  shapes: steps.TrainState
  shardings: steps.TrainState
  train_step: Callable
  eval_step: Callable
  augment: Callable     # (key, uint8 images, labels) -> (float images, targets)


def resolve(config) -> FrozenConfigDict:
  """A checked, frozen copy whose plan is JSON text: a file that it names may change later."""
  config = ConfigDict(config.to_dict() if hasattr(config, "to_dict") else config)
  settings.check(config)
  config.plan = vc.Plan.parse(config.plan).to_json()
  return FrozenConfigDict(config)


def build(config: FrozenConfigDict, classes: int | None = None) -> Run:
  """The model, the mesh, and the jitted functions; nothing is computed or written.

  classes: where the data are not here to count theirs.
  """
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch("config.batch_size / accumulate", config.batch_size // config.accumulate,
                       mesh)
  sharding.check_batch("config.eval_batch_size", config.eval_batch_size, mesh)
  classes = classes or pipeline.num_classes(config.data.name)
  sizes = config.model.to_dict()
  model = vc.create_model(sizes.pop("name"), plan=vc.Plan.parse(config.plan), num_classes=classes,
                          **sizes)
  preprocess, rules = vc.preprocess(model), model.leaf_rules()
  image_shape = (*preprocess.image_size, 3)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
  mask = optim.decay_mask(params, rules)
  optimizer = optim.make_optimizer(config.optim, config.total_steps, mask)
  decay = (optim.ema_decay(config.ema_half_life, config.total_steps)
           if config.ema_half_life else 0.0)
  init = steps.make_init(model, optimizer, image_shape, ema=bool(decay))
  shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = steps.state_shardings(shapes, rules, optimizer, mesh)
  augment = steps.make_augment(config.data, preprocess.mean, preprocess.std, classes,
                               config.accumulate)
  train_step = steps.make_train_step(
      model, optimizer, optim.schedule(config.optim, config.total_steps), augment,
      accumulate=config.accumulate, ema_decay=decay)
  if config.optim.skip_nonfinite:
    train_step = guard.keep_finite(train_step)
  eval_step = steps.make_eval_step(model, preprocess.mean, preprocess.std)
  return Run(config, mesh, model, preprocess, steps.jit_init(init, shardings), shapes, shardings,
             steps.jit_train_step(train_step, shardings, mesh),
             steps.jit_eval_step(eval_step, mesh), augment)


def fresh_state(run: Run) -> steps.TrainState:
  """Drawn from the seed, or from the file that `config.init_from` names."""
  state = run.init(jax.random.key(run.config.seed))
  if not run.config.init_from:
    return state
  variables = start.load_variables(
      run.config.init_from, run.model,
      lambda: start.calibration_images(run.config, run.preprocess))
  return start.started_from(state, variables, run.shardings)
