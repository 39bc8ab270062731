"""Weights that travel: PyTorch state dicts to our variables and back, and files of our own."""
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from vitcompact import trees
from vitcompact.execution import Execution
from vitcompact.models import VARIANTS, create_model
from vitcompact.plan import Plan, modern
from vitcompact.torch_names import (
  Entry,
  resize_patches,
  resize_positions,
  to_leaves,
  to_tensor,
  torch_shape,
)

# In which a training checkpoint keeps its weights, in timm's order of preference.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")   # prefixes of names: data parallel, compiled


class Loaded(NamedTuple):
  """What `read_state_dict` did: the variables, and PyTorch names by what became of them."""
  variables: dict[str, Any]
  dropped: list[str]
  resized: list[str]
  reset: list[str]


def from_torch(model: nn.Module, state_dict: Mapping[str, Any], *, reset_head: bool = False):
  """Variables of `model` from a PyTorch state dict.

  Args:
    model: dense, or a folded compact DeiT.
    state_dict: {name: array}, under timm's names or the authors'; containers such as {"model": ...}
      and prefixes such as "module." are taken off. Half precision becomes float32.
    reset_head: initialise the classifiers anew, whatever the state dict has for them.
  Returns:
    {"params", "batch_stats"?}, nested dicts of numpy arrays.
  Raises:
    ValueError: names are missing, unexpected or misshapen: all are listed, a line each.
  """
  return read_state_dict(model, state_dict, reset_head=reset_head).variables


def to_torch(model: nn.Module, variables, *, names: str = "timm") -> dict[str, np.ndarray]:
  """{name: numpy array}: the PyTorch state dict of a dense model or a folded compact DeiT.

  Inverse of `from_torch`, bit for bit. Compact layers are written under names of our own, which
  `experiments/torch_deit.py` reads. `num_batches_tracked` is absent; PyTorch fills it in.

  names: "timm" or "authors".
  """
  if names not in ("timm", "authors"):
    raise ValueError(f"names={names!r}: must be 'timm' or 'authors'")
  shapes = _variable_shapes(model)
  entries = _entries(model, shapes)
  if lines := trees.differences(variables, shapes):
    raise ValueError("\n".join([f"variables do not fit {_describe(model)}:", *lines]))
  flat = trees.named_leaves(variables)
  rename = model.authors_name if names == "authors" else str
  return {rename(entry.torch): np.ascontiguousarray(
      to_tensor(entry.layout, [np.asarray(flat[leaf]) for leaf in entry.leaves]))
          for entry in entries}


def read_state_dict(model: nn.Module, state_dict, *, reset_head: bool = False,
                    source: nn.Module | None = None) -> Loaded:
  """As `from_torch`, and tells what was dropped, resized and initialised anew.

  source: the model that `to_torch` wrote it of. Else positions of another size are a square's.
  """
  shapes = _variable_shapes(model)
  entries = _entries(model, shapes)
  flat_shapes = {name: leaf.shape for name, leaf in trees.named_leaves(shapes).items()}
  wanted = {entry.torch: torch_shape(entry.layout, [flat_shapes[leaf] for leaf in entry.leaves])
            for entry in entries}
  state = _bare_named(unwrap(state_dict))
  got = {name: np.shape(value) for name, value in state.items()}
  state = _timm_named(model, entries, state)
  heads = _classifiers(model, shapes)
  reset = [name for name in heads if reset_head and name in wanted]
  dropped = [name for name in state if name.endswith("num_batches_tracked")]
  dropped += [name for name in heads if reset_head and name in state.keys() - wanted.keys()]
  arrays = {name: _array(name, value) for name, value in state.items()
            if name not in {*dropped, *reset}}
  arrays |= {name: _fresh(wanted[name]) for name in reset}
  stored = {entry.torch: entry.positions.grid
            for entry in (source.torch_entries() if source else []) if entry.positions}
  fitted = {entry.torch: _fitted(arrays[entry.torch], entry, wanted[entry.torch],
                                 stored.get(entry.torch))
            for entry in entries if entry.torch in arrays}
  resized = [name for name, array in fitted.items() if array is not arrays[name]]
  arrays |= fitted
  _check_fit(model, arrays, wanted, heads, got)
  leaves = {}
  for entry in entries:
    parts = to_leaves(entry.layout, arrays[entry.torch], [flat_shapes[x] for x in entry.leaves])
    leaves |= {name: np.ascontiguousarray(part)
               for name, part in zip(entry.leaves, parts, strict=True)}
  return Loaded(trees.nested(leaves), dropped, resized, reset)


def resized(model: nn.Module, variables, **sizes) -> tuple[nn.Module, dict[str, Any]]:
  """(model, variables) for another `image_size` or `patch_size`, in training or deployed form.

  Positions are interpolated, and so are mask predictors that are tied to them, which keep their
  rank; a kernel of patches is made anew.
  """
  other, leaves = altered(model, **sizes), trees.named_leaves(variables)
  shapes = {name: leaf.shape for name, leaf in trees.named_leaves(_variable_shapes(other)).items()}
  for stored, wanted in zip(model.torch_entries(), other.torch_entries(), strict=True):
    if stored.positions or stored.patches:
      (name,), layout = wanted.leaves, wanted.layout
      tensor = to_tensor(layout, [np.asarray(leaves[name])])
      grid = stored.positions and stored.positions.grid
      tensor = _fitted(tensor, wanted, torch_shape(layout, [shapes[name]]), grid)
      (leaves[name],) = to_leaves(layout, tensor, [shapes[name]])
  return other, trees.nested(leaves)


def altered(model: nn.Module, **fields) -> nn.Module:
  """The model with other fields, refused where `create_model` would refuse them."""
  if {"image_size", "patch_size"} & fields.keys():
    fields = {"plan": model.plan.at_size(model.sites()), **fields}
  return create_model(model.variant, **{**_fields(model), **fields})


def _fields(model) -> dict[str, Any]:
  return {field.name: getattr(model, field.name) for field in dataclasses.fields(model)
          if field.name not in ("parent", "name", "variant")}


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
  """The state dict inside a training checkpoint, or the checkpoint itself if it is one."""
  for name in CONTAINERS:
    if isinstance(checkpoint.get(name), Mapping):
      return checkpoint[name]
  return checkpoint


def save(path, model: nn.Module, variables, *, force: bool = False):
  """Writes a model and its variables as .safetensors: our names, and how to build the model.

  Raises ValueError for a file that exists, without `force`, and for variables that do not fit.
  """
  if lines := trees.differences(variables, _variable_shapes(model)):
    raise ValueError("\n".join([f"variables do not fit {_describe(model)}:", *lines]))
  write_safetensors(path, trees.named_leaves(variables), metadata(model), force=force)


def write_safetensors(path, arrays: Mapping[str, Any], about: dict[str, str], *,
                      force: bool = False):
  """Writes {name: array} and string metadata; a file of that name is whole at every moment."""
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise ValueError(f"{path}: must end in .safetensors")
  if path.exists() and not force:
    raise ValueError(f"{path} exists; give another name, or ask to overwrite it with force")
  arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  try:
    safetensors.numpy.save_file(arrays, partial, metadata=about)
    os.replace(partial, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise OSError(f"{path} cannot be written: {error}; make room, or name another place") from error
  finally:
    partial.unlink(missing_ok=True)


def load(path) -> tuple[nn.Module, dict[str, Any]]:
  """(model, variables) of a file that `save` wrote; nothing in it is executed."""
  arrays, about = read_safetensors(path)
  if not {"model", "fields", "plan"} <= about.keys():
    raise ValueError(f"{path} is no file of ours: its metadata has {sorted(about)}, not model, "
                     "fields, plan; PyTorch weights go through experiments.convert")
  try:
    model = create_model(about["model"], **json.loads(about["fields"]),
                         plan=Plan.from_json(about["plan"]))
    model = model.clone(execution=_execution(about, model))
    model.check()
    shapes = _variable_shapes(model)
  # Whatever strangers may write there: RecursionError is JSON's, of lists in lists in lists.
  except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
    raise ValueError(f"{path}: its metadata describes no model: {error}") from None
  # Flat, as `nested` cannot take a name that is both a leaf and the start of another's.
  if lines := trees.differences(arrays, trees.named_leaves(shapes)):
    raise ValueError("\n".join([f"{path} does not fit {_describe(model)}:", *lines]))
  variables = trees.nested(arrays)
  return model, variables


def read_safetensors(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """({name: array}, metadata) of a .safetensors file."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is no whole .safetensors file: {error}") from None


def metadata(model: nn.Module) -> dict[str, str]:
  """What `create_model` needs to build it again, as strings: model, fields, plan, execution."""
  fields = _fields(model)
  plan, execution = fields.pop("plan"), fields.pop("execution")
  return {"model": model.variant, "fields": json.dumps(fields), "plan": plan.to_json(),
          "execution": execution.to_json()}


def _execution(about: Mapping[str, str], model) -> Execution:
  """A file's execution record, which files of before hold in their plan."""
  if "execution" in about:
    return Execution.from_json(about["execution"])
  tree, old = modern(json.loads(about["plan"]))
  merged, overrides = old.pop("merged", {}), tree.get("blocks", {})
  forms = {int(block): form for block, form in old.pop("attention", {}).items()}
  paths = [f"blocks_{site.block}/mlp/{layer}" for site in model.sites()
           for layer in merged.get(str(site.block) if "ffn" in overrides.get(str(site.block), {})
                                   else None, ())]
  return Execution(attention=forms, merged=tuple(paths), **old)


def _variable_shapes(model):
  height, width = np.broadcast_to(model.image_size, 2).tolist()
  images = jax.ShapeDtypeStruct((1, height, width, model.in_chans), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def _entries(model, shapes) -> list[Entry]:
  """The model's entries, if they hold all of its leaves, each once."""
  entries = model.torch_entries()
  held = sorted(leaf for entry in entries for leaf in entry.leaves)
  if held != sorted(trees.named_leaves(shapes)):
    assert model.plan != Plan() or model.deploy, (
        f"{model.variant}: torch_entries and leaves differ in "
        f"{sorted(set(held) ^ trees.named_leaves(shapes).keys())}")
    raise ValueError(f"{_describe(model)} has no PyTorch form: load the dense model and compact "
                     "it; fold a compact DeiT to write it")
  return entries


def _describe(model) -> str:
  return f"{model.variant} (plan={model.plan.to_json()}, deploy={model.deploy})"


def _bare_named(state):
  """Names without the prefixes that wrappers add."""
  def bare(name):
    while name.startswith(WRAPPERS):
      name = name.split(".", 1)[1]
    return name
  return {bare(name): value for name, value in state.items()}


def _timm_named(model, entries, state):
  """Under timm's names, if more of the names are the authors'."""
  names = {model.authors_name(entry.torch): entry.torch for entry in entries}
  if len(names.keys() & state.keys()) <= len(set(names.values()) & state.keys()):
    return state
  return {names.get(name, name): value for name, value in state.items()}


def _array(name, value):
  array = np.asarray(value)
  if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
    raise ValueError(f"{name} is {array.dtype}, not an array of floating point numbers")
  return array.astype(np.float32, copy=False)


def _classifiers(model, shapes) -> list[str]:
  """PyTorch names of the layers that end in classes, or would if the model had any."""
  if not model.num_classes:
    model = model.clone(num_classes=1)
    shapes = _variable_shapes(model)
  rules = [(pattern, "classes" in leaf.axes) for pattern, leaf in model.parameter_rules()]
  leaves = trees.named_leaves(trees.first_match(rules, shapes["params"], may_be_idle=True))
  owners = {name.rsplit("/", 1)[0] for name, by_class in leaves.items() if by_class}
  return [entry.torch for entry in model.torch_entries()
          if entry.leaves[0].removeprefix("params/").rsplit("/", 1)[0] in owners]


def _fresh(shape):
  """A new classifier's kernel from N(0, 0.02^2), its bias zero."""
  if len(shape) == 1:
    return np.zeros(shape, np.float32)
  return 0.02 * np.random.default_rng(0).standard_normal(shape, np.float32)


def _fitted(array, entry: Entry, wanted, stored):
  """Resized where that is all it takes; otherwise left for the check of shapes.

  stored: the grid that its positions are of, if known.
  """
  # Grids of as many points, such as 2 x 8 and 4 x 4, have positions of one shape.
  if array.shape == wanted and (stored is None or stored == entry.positions.grid):
    return array
  if entry.patches and array.ndim == 4 and array.shape[:2] == wanted[:2]:
    return resize_patches(array, wanted[2:])
  return _fit_positions(array, entry.positions, wanted, stored) if entry.positions else array


def _fit_positions(array, positions, wanted, stored):
  """Resized from the grid that is stored, or from a square one."""
  if array.ndim != len(wanted) or array.shape[-1] != wanted[-1] or (not stored and positions.tied):
    return array
  points = array.shape[-2] - positions.prefix
  stored = stored or (round(max(points, 0) ** 0.5),) * 2
  if points < 1 or stored[0] * stored[1] != points:
    return array
  return resize_positions(array, stored, positions)


def _check_fit(model, arrays, wanted, heads, got):
  """heads: names of classifiers; got: {name: shape} as the state dict has them."""
  missing = [name for name in wanted if name not in arrays]
  unexpected = [name for name in arrays if name not in wanted]
  misshapen = [name for name in wanted
               if name in arrays and arrays[name].shape != wanted[name]]
  wrong = {*missing, *unexpected, *misshapen}
  if not wrong:
    return
  first = (f"the state dict does not fit {_describe(model)}: {len(missing)} missing, "
           f"{len(unexpected)} unexpected, {len(misshapen)} misshapen")
  own = _overlap({name: array.shape for name, array in arrays.items()}.items(), wanted.items())
  tied = {entry.torch for entry in model.torch_entries()
          if entry.positions is not None and entry.positions.tied}
  if wrong <= set(heads):
    first += "; pass reset_head to initialise another classifier"
  elif tied & set(misshapen):
    first += ("; mask predictors are tied to the positions of their tokens: load them at their own "
              "image size, then vitcompact.convert.resized makes them fit another")
  elif closest := closest_model(got, better_than=own):
    first += f"; the closest model is {closest}"
  raise ValueError("\n".join(
      [first, *(f"missing {name} {wanted[name]}" for name in missing),
       *(f"unexpected {name} {arrays[name].shape}" for name in unexpected),
       *(f"{name} is {arrays[name].shape}, not {wanted[name]}" for name in misshapen)]))


def closest_model(shapes: Mapping[str, tuple[int, ...]], better_than: float = 0.0) -> str | None:
  """The named model whose PyTorch tensors {name: shape} agree with the most of these.

  None where no model shares more than `better_than` of all names and shapes.
  """
  by_name = {}
  for name in VARIANTS:
    model = create_model(name)
    timm = [entry.torch for entry in model.torch_entries()]
    by_name[name] = max(_overlap(shapes, timm), _overlap(shapes, map(model.authors_name, timm)))
  # Sizes of one family share their names: only these are worth tracing.
  best = max(by_name.values())
  likely = [name for name, score in by_name.items() if 0 < 0.9 * best <= score]
  scores = {name: max(_overlap(shapes.items(), tensors) for tensors in _tensors(name))
            for name in likely}
  return max((name for name in likely if scores[name] > better_than), key=scores.get, default=None)


def _overlap(got, wanted) -> float:
  got, wanted = set(got), set(wanted)
  return len(got & wanted) / len(got | wanted)


def _tensors(variant: str):
  """[(name, shape)] of a named model: under timm's names, and under the authors'."""
  model = create_model(variant)
  leaves = trees.named_leaves(_variable_shapes(model))
  timm = [(entry.torch, torch_shape(entry.layout, [leaves[leaf].shape for leaf in entry.leaves]))
          for entry in model.torch_entries()]
  return timm, [(model.authors_name(name), shape) for name, shape in timm]
