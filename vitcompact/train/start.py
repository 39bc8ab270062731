"""Where a run starts: fresh parameters, or those of a file, made compact where the plan asks."""
import jax
import jax.numpy as jnp

import vitcompact as vc
from vitcompact import convert, files, trees
from vitcompact.data import pipeline
from vitcompact.data.classes import check_classes
from vitcompact.doors import variable_shapes
from vitcompact.train.step import TrainState

CALIBRATION_IMAGES = 128
WAY_OUT = (f"Use data of the same classes in the same order, or give the file another classifier: "
           f"`{files.CONVERT} FILE --reset-head --out NEW.safetensors`")


def load_variables(path: str, model, calibration, classes=None):
  """Variables for `model` from a .safetensors file that `vitcompact convert` or a run wrote.

  classes: names of the data's classes in order, which have to be the file's, if it has any.
  A dense model's are made compact for the model's plan, fitted on the images that `calibration()`
  returns (normalised).
  """
  found, variables = _load(path)
  source = model
  if found.plan == vc.Plan() and not found.deploy:
    source = model.clone(plan=vc.Plan())
  _check_fits(f"init_from={path!r}", found, variables, source)
  check_classes(f"init_from={path!r}", convert.classes_of(path), classes, WAY_OUT)
  if source == model:
    return variables
  return vc.compact(source, variables, model.plan, images=calibration())[1]


def is_dense(path: str) -> bool:
  """Whether a file is of a dense model."""
  return _load(path)[0].plan == vc.Plan()


def load_teacher(path: str, teacher, classes=None):
  """Variables of a teacher from such a file; classes: see `load_variables`."""
  found, variables = _load(path)
  _check_fits(f"teacher.file={path!r}", found, variables, teacher)
  check_classes(f"teacher.file={path!r}", convert.classes_of(path), classes, WAY_OUT)
  return variables


def _load(path: str):
  found, variables = convert.load(path)
  return found, jax.tree.map(jnp.asarray, variables)


def _check_fits(what: str, found, variables, model):
  if lines := trees.differences(variables, variable_shapes(model)):
    raise ValueError(f"{what} holds {found.variant} with plan={found.plan.to_json()}, "
                     f"which does not fit {model.variant}: {trees.some(lines, 3, joint='; ')}. "
                     f"`{files.CONVERT}` resizes positions and replaces a classifier")


def state_with_variables(state: TrainState, variables, shardings: TrainState) -> TrainState:
  """A fresh state with these variables in place of its own, averages included."""
  trees = variables["params"], variables.get("batch_stats", {})
  # jnp.copy: the step donates its state, and no buffer may be given away twice. A fitted batch norm
  # has one array as its bias and its mean.
  params, stats = jax.tree.map(jnp.copy, trees)
  averages = jax.tree.map(jnp.copy, trees) if state.ema_params else ({}, {})
  new = state.replace(params=params, batch_stats=stats, ema_params=averages[0],
                      ema_batch_stats=averages[1])
  return jax.device_put(new, shardings)


def calibration_images(config, preprocess, split: str = "train", count: int = CALIBRATION_IMAGES):
  """Normalised images of a split, as evaluation sees them, evenly spread over it: (B, H, W, C)."""
  return preprocess.normalise(pipeline.sample(config.data, split, count, preprocess))
