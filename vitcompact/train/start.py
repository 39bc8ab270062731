"""Where a run starts: fresh parameters, or those of a file, made compact where the plan asks."""
import functools
import json
import pathlib

import jax
import jax.numpy as jnp

import vitcompact as vc
from vitcompact import convert, files, hub, pytorch, trees
from vitcompact.data import pipeline
from vitcompact.data.classes import check_classes
from vitcompact.doors import variable_shapes
from vitcompact.train.step import TrainState

CALIBRATION_IMAGES = 128
WAY_OUT = (f"Use data of the same classes in the same order, or give the file another classifier: "
           f"`{files.CONVERT} FILE --reset-head --out NEW.safetensors`")


def file_of(key: str, name: str) -> pathlib.Path:
  """The file of weights that a config's key names: a path, of a file or of a folder with one, or
  weights by name (a model's with its tag, hf-hub:org/name, a folder with a config.json that tells
  which model it holds), of which a file of ours is made in the cache.

  Weights by name are looked up once in a process, so that all of a run sees one commit of them.
  """
  try:
    if hub.is_file_name(name) or (pathlib.Path(name).is_dir() and not _tells_its_model(name)):
      return files.weights_in(name)
    return pathlib.Path(by_name(name))
  except (ValueError, OSError) as error:
    text = str(error)
    raise type(error)(text if name in text else f"config.{key}={name!r}: {text}") from None


by_name = functools.lru_cache(lambda name: hub.as_file(name, print))


def _tells_its_model(folder: str) -> bool:
  try:
    told = json.loads((pathlib.Path(folder) / hub.config.CONFIG).read_text(encoding="utf-8"))
    return bool({"architecture", "model_type"} & told.keys())
  except (OSError, ValueError, AttributeError):
    return False


def source_of(path) -> dict[str, str]:
  """What a file of ours tells of the weights that it was made of: {"source": "hf-hub:org/name@
  commit", "source_sha256"}; {} where it tells nothing, or is none."""
  path = pathlib.Path(path)
  if not path.is_file() or not pytorch.is_ours(path):
    return {}
  about = convert.read_metadata(path)
  return {key: about[key] for key in ("source", "source_sha256") if key in about}


def load_variables(path: str, model, calibration, classes=None):
  """Variables for `model` from a file that `vitcompact convert` or a run wrote, from weights by
  name, or from weights of others, as `vitcompact convert` reads them; path: see `file_of`.

  classes: names of the data's classes in order, which have to be the file's, if it has any.
  A dense model's are made compact for the model's plan, fitted on the images that `calibration()`
  returns (normalised).
  """
  source = model
  if is_dense(path):
    source = model.clone(plan=vc.Plan())
  variables = _fitting("init_from", path, source, classes)
  if source == model:
    return variables
  return vc.compact(source, variables, model.plan, images=calibration())[1]


def is_dense(path: str) -> bool:
  """Whether a file is of a dense model, as all of others are."""
  path = file_of("init_from", path)
  if not pytorch.is_ours(path):
    return True
  found = convert.read_model(path)
  return found.plan == vc.Plan() and not found.deploy


def load_teacher(path: str, teacher, classes=None):
  """Variables of a teacher from such a file; classes: see `load_variables`."""
  return _fitting("teacher.file", path, teacher, classes)


def _fitting(key: str, name: str, model, classes):
  """Variables of a file, refused unless they are of this model and these classes."""
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
  check_classes(what, convert.classes_of(path), classes, WAY_OUT)
  return variables


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
