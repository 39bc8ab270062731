"""Checks the arguments of the public functions: the model, its variables, images and plans.

Each error is one line: what was given, what is expected, and what to do. Only shapes and dtypes are
read, except in `check_values`, so that the functions can be traced.
"""
import functools
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import trees
from vitcompact.methods import METHODS, protocol
from vitcompact.plan import Plan

LARGEST_VALUE = 50.0   # of normalised images; pixels in 0..255 exceed it
FEW_IMAGES = 64        # warn below this number of calibration images
FEW_CLASSES = 0.5      # warn below this share of the expected number of classes
MANY = 3   # mismatches that are shown; the others are counted
VARIABLES = "expected {'params': ..., 'batch_stats': ...} as model.init gives"
IMAGES = "as normalised floats, which vc.preprocess(model) makes"


def describe_value(value) -> str:
  """How an error names a value."""
  text = repr(value)
  if isinstance(value, (str, int, float, type(None))) and len(text) < 60:
    return text
  shape = getattr(value, "shape", None)
  return f"a {type(value).__name__}" + (f" of shape {shape}" if isinstance(shape, tuple) else "")


def check_model(model, what: str = "model"):
  """Raises ValueError unless `model` is a model of ours."""
  if isinstance(model, type) or not all(hasattr(model, name) for name in ("submodules", "variant")):
    where = "" if what == "model" else f"{what}: "
    raise ValueError(f"{where}{describe_value(model)} was given, expected a model, such as "
                     "create_model(NAME)")


def describe(model) -> str:
  return f"{model.variant} (plan={model.plan.to_json()}, deploy={model.deploy})"


def variable_shapes(model):
  """The model's variables as shapes and dtypes."""
  check_model(model)
  return jax.tree.map(lambda leaf: leaf, _traced_shapes(model, jax.config.jax_enable_x64))


@functools.lru_cache(maxsize=64)   # all stages of the path ask for the same few models
def _traced_shapes(model, x64: bool):
  return jax.eval_shape(model.init, jax.random.key(0), image_shapes(model))


def image_shapes(model, batch: int = 1):
  """The shape and dtype of a batch of images that the model was made for."""
  height, width = np.broadcast_to(model.image_size, 2).tolist()
  return jax.ShapeDtypeStruct((batch, height, width, model.in_chans), jnp.float32)


def check_variables(model, variables, what: str = "variables", shapes=None):
  """Raises ValueError unless the variables have the model's names and shapes.

  Other collections are ignored, and so are mask predictors of blocks that mask nothing.
  shapes: the model's `variable_shapes`, if already known.
  """
  if not isinstance(variables, Mapping):
    raise ValueError(f"{what}: {describe_value(variables)} was given, {VARIABLES}")
  expected = _shapes(variable_shapes(model) if shapes is None else shapes)
  if "params" not in variables:
    if {f"params/{name}" for name in _named_arrays(variables)} & expected.keys():
      raise ValueError(f"{what}: these are only the parameters: give {{'params': ...}}, with "
                       "'batch_stats' if the model has any")
    raise ValueError(f"{what}: a dict of {trees.excerpt(sorted(map(repr, variables)), MANY)} was "
                     f"given, {VARIABLES}")
  got = _shapes({name: variables[name] for name in ("params", "batch_stats") if name in variables})
  # Predictors may belong to blocks that are dense at this image size; fold drops them.
  scopes = {protocol.scope_of(kind) for kind in METHODS["attention"].values()}
  got = {name: shape for name, shape in got.items()
         if name in expected or not scopes & set(name.split("/"))}
  if got != expected:
    raise ValueError(f"{what} do not fit {describe(model)}: {_mismatches(model, got, expected)}")


def check_fitting(model, variables, images, what: str = ""):
  """Raises ValueError unless a model, its variables and images go together.

  what: prefix of their names in the error.
  """
  check_model(model, f"{what}model" if what else "model")
  check_variables(model, variables, f"{what}variables")
  check_images(model, images)


def check_images(model, images, what: str = "images"):
  """Raises ValueError unless `images` is a batch of normalised images for the model.

  Their height and width are checked by the model itself.
  """
  expected = f"expected (B, height, width, {model.in_chans}), {IMAGES}"
  shape, dtype = (getattr(images, name, None) for name in ("shape", "dtype"))
  if shape is None or dtype is None:
    raise ValueError(f"{what}: {describe_value(images)} was given, {expected}")
  if len(shape) != 4 or shape[-1] != model.in_chans:
    raise ValueError(f"{what} of shape {tuple(shape)}, {expected}")
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{what} of {dtype}, {expected}")
  if shape[0] == 0:
    raise ValueError(f"no {what} were given: shape {tuple(shape)}, {expected}")


def check_finite(variables):
  """Raises ValueError if the variables hold NaN or infinity."""
  if bad := trees.nonfinite(variables):
    raise ValueError(f"variables: {min(bad)} holds NaN or infinity: nothing can be fitted to the "
                     "outputs of such a model")


def check_values(images):
  """Raises ValueError if images hold NaN or infinity, or pixels in 0..255. Warns if they are all
  the same, or look like pixels in 0..1."""
  bad = int(jnp.sum(~jnp.isfinite(jnp.asarray(images)).all(axis=(1, 2, 3))))
  if bad:
    raise ValueError(f"{bad} of {len(images)} images hold NaN or infinity; leave them out")
  least, most = float(jnp.min(jnp.asarray(images))), float(jnp.max(jnp.asarray(images)))
  if (largest := max(-least, most)) > LARGEST_VALUE:
    raise ValueError(f"values of the images reach {largest:.3g}: give them {IMAGES}")
  if len(images) > 1 and np.all(np.ptp(np.asarray(images), axis=0) == 0):
    warnings.warn(f"the {len(images)} images are all the same; give different ones", stacklevel=3)
  elif least >= 0 and most <= 1:
    warnings.warn(f"values of the images are from {least:.3g} to {most:.3g}, like pixels that were "
                  f"not normalised; give them {IMAGES}", stacklevel=3)


def warn_if_few_classes(logits, stacklevel: int):
  """Warns if a model sees fewer classes in calibration images than mixed ones would have."""
  classes = len(np.unique(logits.argmax(-1)))
  expected = min(logits.shape[-1], len(logits) // 8)
  if classes < FEW_CLASSES * expected or (classes == 1 and len(logits) > 1):
    warnings.warn(f"the model sees only {classes} of its {logits.shape[-1]} classes in the "
                  f"{len(logits)} images. Are they of mixed classes, and normalised as "
                  "vc.preprocess(model) does? Or is the model not trained?",
                  stacklevel=stacklevel + 1)


def check_plan(plan):
  """Raises ValueError unless `plan` is a Plan."""
  if not isinstance(plan, Plan):
    raise ValueError(f"plan: {describe_value(plan)} was given, expected a Plan; Plan.parse reads "
                     "a dict, JSON or a path to it")


def _named_arrays(tree):
  return trees.named_leaves(dict(tree))


def _shapes(tree) -> dict:
  return {name: tuple(leaf.shape) if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
          for name, leaf in _named_arrays(tree).items()}


def _mismatches(model, got, expected) -> str:
  other = model.clone(deploy=not model.deploy)
  if got == _shapes(variable_shapes(other)):
    if model.deploy:
      return "they are the training form's: vc.fold(model, variables) gives the deployed ones"
    return "they are the deployed form's: give the deployed model, which vc.fold returned with them"
  # A collection that is entirely absent is reported once.
  absent = {name.split("/")[0] for name in expected} - {name.split("/")[0] for name in got}
  lines = [f"no {name!r}" for name in sorted(absent, reverse=True)]
  lines += [f"missing {name} {expected[name]}" for name in expected
            if name not in got and name.split("/")[0] not in absent]
  lines += [f"unexpected {name} {got[name]}" for name in got if name not in expected]
  lines += [f"{name} is {got[name]}, not {expected[name]}" for name in expected
            if name in got and got[name] != expected[name]]
  return trees.excerpt(lines, MANY, joint="; ")
