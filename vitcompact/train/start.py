"""Loads the variables that a run starts from, compacts dense ones, and loads the teacher."""
import functools
import json
import pathlib

import jax
import jax.numpy as jnp

import vitcompact as vc
from vitcompact import convert, files, hub, pytorch, trees
from vitcompact.checks import variable_shapes
from vitcompact.data import pipeline
from vitcompact.data.classes import check_classes
from vitcompact.train.step import TrainState

CALIBRATION_IMAGES = 128
HINT = (f"Use data of the same classes in the same order, or give the file another classifier: "
           f"`{files.CONVERT} FILE --reset-head --out NEW.safetensors`")


def file_of(key: str, name: str) -> pathlib.Path:
  """The file of weights that a config's key names: the path of a file or of a folder with one, or
  weights by name (a model with its tag, hf-hub:org/name, or a folder whose config.json names its
  model), which are converted to a file of ours in the cache.

  Weights by name are looked up once in a process, so that a run uses one commit throughout.
  """
  try:
    if hub.is_file_name(name) or (pathlib.Path(name).is_dir() and not _has_model_config(name)):
      return files.weights_in(name)
    return pathlib.Path(by_name(name))
  except (ValueError, OSError) as error:
    text = str(error)
    raise type(error)(text if name in text else f"config.{key}={name!r}: {text}") from None


by_name = functools.lru_cache(lambda name: hub.as_file(name, print))


def _has_model_config(folder: str) -> bool:
  try:
    config = json.loads((pathlib.Path(folder) / hub.config.CONFIG).read_text(encoding="utf-8"))
    return bool({"architecture", "model_type"} & config.keys())
  except (OSError, ValueError, AttributeError):
    return False


def source_of(path) -> dict[str, str]:
  """The source of the weights, from the metadata of a file of ours: {"source": "hf-hub:org/name@
  commit", "source_sha256"}; {} for a file without it, or another kind of file."""
  path = pathlib.Path(path)
  if not path.is_file() or not pytorch.is_ours(path):
    return {}
  about = convert.read_metadata(path)
  return {key: about[key] for key in ("source", "source_sha256") if key in about}


def load_variables(path: str, model, calibration, classes=None):
  """Variables for `model` from a file that `vitcompact convert` or a run wrote, from weights by
  name, or from another library's weights, as `vitcompact convert` reads them; path: see `file_of`.

  A dense model's variables are compacted for the model's plan, with the normalised calibration
  images that `calibration()` returns.
  classes: names of the data's classes in order, which must be the file's, if it has any.
  """
  source = model
  if is_dense(path):
    source = model.clone(plan=vc.Plan())
  variables = _fitting("init_from", path, source, classes)
  if source == model:
    return variables
  return vc.compact(source, variables, model.plan, images=calibration())[1]


def is_dense(path: str) -> bool:
  """Whether a file holds a dense model; all files of other libraries do."""
  path = file_of("init_from", path)
  if not pytorch.is_ours(path):
    return True
  found = convert.read_model(path)
  return found.plan == vc.Plan() and not found.deploy


def load_teacher(path: str, teacher, classes=None):
  """Variables of a teacher from a file of its model; classes: see `load_variables`."""
  return _fitting("teacher.file", path, teacher, classes)


def _fitting(key: str, name: str, model, classes):
  """Reads variables from a file; raises ValueError unless they fit the model and the classes."""
  what, path = f"{key}={name!r}", file_of(key, name)
  if not pytorch.is_ours(path):
    try:
      variables = pytorch.read_for(model, path)
    except ValueError as error:
      raise ValueError(f"{what}: {'; '.join(str(error).splitlines())}") from None
    return jax.tree.map(jnp.asarray, variables)
  found, variables = convert.load(path)
  variables = jax.tree.map(jnp.asarray, variables)
  _check_fits(what, found, variables, model)
  check_classes(what, convert.classes_of(path), classes, HINT)
  return variables


def _check_fits(what: str, found, variables, model):
  if lines := trees.differences(variables, variable_shapes(model)):
    raise ValueError(f"{what} is {found.variant} with plan={found.plan.to_json()}, "
                     f"which does not fit {model.variant}: {trees.excerpt(lines, 3, joint='; ')}. "
                     f"`{files.CONVERT}` resizes positions and replaces a classifier")


def state_with_variables(state: TrainState, variables, shardings: TrainState) -> TrainState:
  """The state with these variables as parameters, batch statistics and averages."""
  trees = variables["params"], variables.get("batch_stats", {})
  # jnp.copy: the step donates its state, and no buffer may be donated twice. A fitted batch norm
  # has one array as its bias and its mean.
  params, stats = jax.tree.map(jnp.copy, trees)
  averages = jax.tree.map(jnp.copy, trees) if state.ema_params else ({}, {})
  new = state.replace(params=params, batch_stats=stats, ema_params=averages[0],
                      ema_batch_stats=averages[1])
  return jax.device_put(new, shardings)


def calibration_images(config, preprocess, split: str = "train", count: int = CALIBRATION_IMAGES):
  """Calibration images (B, H, W, C): normalised, as in evaluation, evenly spread over a split."""
  return preprocess.normalise(pipeline.sample(config.data, split, count, preprocess))
