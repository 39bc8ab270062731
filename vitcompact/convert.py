"""Converts PyTorch state dicts to our variables and back, and reads and writes our own files."""
import json
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vitcompact import foreign, trees
from vitcompact.checks import check_variables, describe, variable_shapes
from vitcompact.execution import Execution
from vitcompact.files import (
    DTYPES,
    check_ours,
    checked_classes,
    classes_in,
    crop_in,
    read_header,
    read_safetensors,
    write_safetensors,
)
from vitcompact.fit import MANY, check_fit, closest_model
from vitcompact.foreign import CONTAINERS
from vitcompact.foreign_rules import renamed
from vitcompact.foreign_tensors import is_float, is_tensor, to_float32
from vitcompact.models import create_model, fields_of
from vitcompact.plan import Plan, upgraded
from vitcompact.torch_names import (
    Entry,
    adapt_channels,
    leaves_of,
    resize_patches,
    resize_positions,
)

__all__ = ["CONTAINERS", "Loaded", "classes_of", "closest_model", "from_torch", "load", "metadata",
           "read_metadata", "read_model", "read_safetensors", "read_state_dict", "resized", "save",
           "tensors_of", "to_torch", "unwrap", "with_fields", "write_safetensors"]


class Loaded(NamedTuple):
  """What `read_state_dict` did: the variables, and lists of PyTorch names by what was done to them.

  dropped: counters and records. outside: tensors that are not part of the network. container: the
  set of weights that was taken, "" if the checkpoint is itself one; containers: all sets in it.
  prefix: the prefix removed from the names. adapted: RGB kernels adapted to other channels.
  source: whose naming was translated, "" for timm's and the authors'; left_out: {what: names} of
  other parts in such files, such as a text encoder.
  """
  variables: dict[str, Any]
  dropped: list[str]
  resized: list[str]
  reset: list[str]
  container: str = ""
  containers: Sequence[str] = ()
  prefix: str = ""
  outside: Sequence[str] = ()
  adapted: Sequence[str] = ()
  source: str = ""
  left_out: Mapping[str, Sequence[str]] = types.MappingProxyType({})

  def lines(self) -> list[str]:
    """What was done, one line for each kind of change, to print."""
    lines = []
    others = [name for name in self.containers if name != self.container]
    if self.container or others:
      lines.append(f"weights: {self.container or 'without a container'}" + (
          f", not {trees.excerpt(others)} (--weights chooses)" if others else ""))
    if self.source:
      lines.append(f"names: {self.source}, read as timm's")
    if self.prefix:
      lines.append(f"prefix taken off the names: {self.prefix}")
    lines += [f"left out, {what}: {trees.excerpt(names, 2)}"
              for what, names in self.left_out.items()]
    for what, names in (("dropped", self.dropped),
                        ("left out, not part of the model", self.outside),
                        ("resized", self.resized), ("made for other channels", self.adapted),
                        ("initialised anew", self.reset)):
      lines += [f"{what}: {trees.excerpt(names, 8)}"] if names else []
    return lines


def from_torch(model: nn.Module, state_dict: Mapping[str, Any], *, reset_head: bool = False,
               weights: str | None = None, allow_nonfinite: bool = False):
  """Variables of `model` from a PyTorch state dict.

  Args:
    model: dense, or a folded compact DeiT.
    state_dict: {name: array or torch tensor}, under timm's names, the authors', or those of
      `foreign_names.SOURCES`: transformers, torchvision, CLIP, Google's .npz, ... Containers such
      as {"model": ...} are opened, and a prefix of the names such as "module." or "backbone." is
      removed if they fit without it. Half precision becomes float32. Integers that are no weights,
      such as counters, are dropped, and so is the classifier if the model has num_classes=0.
    reset_head: initialise the classifiers anew and ignore those in the state dict, for a different
      number of classes.
    weights: which container to take if there are several: "model_ema", "model", "teacher", ... The
      default is timm's order, averages first, with a warning that there was a choice.
    allow_nonfinite: accept weights that are NaN or infinite.
  Returns:
    {"params", "batch_stats"?}, nested dicts of numpy arrays. `read_state_dict` also returns what
    was done.
  Raises:
    ValueError: names are missing or unexpected, or shapes differ; the first few are listed.
  """
  loaded = read_state_dict(model, state_dict, reset_head=reset_head, weights=weights,
                           allow_nonfinite=allow_nonfinite)
  if weights is None and len(loaded.containers) > 1:
    others = [name for name in loaded.containers if name != loaded.container]
    warnings.warn(f"the checkpoint holds several sets of weights: took {loaded.container!r}, not "
                  f"{trees.excerpt([repr(name) for name in others])}; weights= chooses",
                  stacklevel=2)
  if loaded.outside:
    warnings.warn(f"{len(loaded.outside)} tensors without the prefix {loaded.prefix!r} are not "
                  f"part of {model.variant} and were left out: {trees.excerpt(loaded.outside)}",
                  stacklevel=2)
  return loaded.variables


def to_torch(model: nn.Module, variables, *, names: str = "timm") -> dict[str, np.ndarray]:
  """{name: numpy array}: the PyTorch state dict of a dense model or a folded compact DeiT.

  The exact inverse of `from_torch`. Compact layers are written under our own names, which
  `experiments/torch_deit.py` reads. `num_batches_tracked` is absent; PyTorch fills it in.

  names: "timm" or "authors".
  """
  if names not in ("timm", "authors"):
    raise ValueError(f"names={names!r}: must be 'timm' or 'authors'")
  shapes = variable_shapes(model)
  entries = _entries(model, shapes)
  _check_variables(model, variables, shapes)
  rename = model.authors_name if names == "authors" else str
  return {rename(name): tensor for name, tensor in _tensors(entries, variables).items()}


def read_state_dict(model: nn.Module, state_dict, *, reset_head: bool = False,
                    source: nn.Module | None = None, weights: str | None = None,
                    allow_nonfinite: bool = False) -> Loaded:
  """As `from_torch`, but also returns what was dropped, resized and initialised anew.

  source: the model that the tensors are from, if `to_torch` or `tensors_of` made them; `model` may
    then have any form. Without it, position embeddings of another size are taken to be square.
  """
  shapes = variable_shapes(model)
  entries = _entries(model, shapes) if source is None else _all_entries(model, shapes)
  flat_shapes = {name: leaf.shape for name, leaf in trees.named_leaves(shapes).items()}
  expected = {entry.torch: entry.shape(flat_shapes) for entry in entries}
  heads = _classifiers(model, shapes)
  timm_names = {model.authors_name(name): name for name in [*heads, *expected]}
  found, containers = foreign.find(state_dict, {*heads, *expected, *timm_names}, weights,
                                   least=len(expected) // 4)
  state, got = _with_timm_names(timm_names, found.state), _shapes_of(found.state)
  reset = [name for name in heads if reset_head and name in expected]
  without_head = reset_head or not model.num_classes
  dropped = [name for name, value in state.items() if name.endswith("num_batches_tracked")
             or (name not in expected and not is_float(value))]
  dropped += [name for name in heads if without_head and name in state.keys() - expected.keys()]
  outside = [name for name, value in found.outside.items() if is_float(value)]
  dropped += [name for name in found.outside if name not in outside]
  what = "the state dict"
  if len(containers) > 1:
    what = f"{found.name!r}, of the sets of weights {trees.excerpt(containers)},"
  if found.source:
    what += f" (names {found.source}, read as timm's)"
  arrays = {name: to_float32(name, value) for name, value in state.items()
            if name in expected and name not in reset}
  if not allow_nonfinite:
    trees.check_finite(what, arrays)
  adapted = _adapt_channels(model, arrays, expected)
  arrays |= {name: _new_classifier(expected[name]) for name in reset}
  unexpected = {name: shape for name, shape in _shapes_of(state).items()
                if name not in {*expected, *dropped}}
  stored = {entry.torch: entry.positions.grid
            for entry in (source.torch_entries() if source else []) if entry.positions}
  fitted = {entry.torch: _resized_tensor(arrays[entry.torch], entry, expected[entry.torch],
                                 stored.get(entry.torch))
            for entry in entries if entry.torch in arrays}
  resized = [name for name, array in fitted.items() if array is not arrays[name]]
  arrays |= fitted
  check_fit(what, model, _shapes_of(arrays) | unexpected, expected, heads, got)
  variables = trees.nested(leaves_of(entries, arrays, flat_shapes))
  return Loaded(variables, dropped, resized, reset, found.name, containers, found.prefix, outside,
                adapted, found.source, found.left_out)


def resized(model: nn.Module, variables, **sizes) -> tuple[nn.Module, dict[str, Any]]:
  """(model, variables) for another `image_size`, `patch_size` or `in_chans`, in either form.

  Position embeddings are interpolated, and so are mask predictors that are tied to them, which keep
  their rank; patch embedding kernels are resampled, or adapted to the number of channels.
  """
  other = with_fields(model, **sizes)
  return other, read_state_dict(other, tensors_of(model, variables), source=model,
                                allow_nonfinite=True).variables


def tensors_of(model: nn.Module, variables) -> dict[str, np.ndarray]:
  """As `to_torch`, for any form: leaves without a PyTorch counterpart keep our names."""
  return _tensors(_all_entries(model, variable_shapes(model)), variables)


def with_fields(model: nn.Module, **fields) -> nn.Module:
  """The model with other fields; raises ValueError where `create_model` would."""
  if {"image_size", "patch_size"} & fields.keys():
    fields = {"plan": model.plan.at_size(model.sites()), **fields}
  return create_model(model.variant, **{**fields_of(model), **fields})


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
  """The first of `CONTAINERS` that a training checkpoint has, or the checkpoint itself.

  `from_torch` searches further: for a model's names, at any depth."""
  for name in CONTAINERS:
    if isinstance(checkpoint.get(name), Mapping):
      return checkpoint[name]
  return checkpoint


def save(path, model: nn.Module, variables, *, force: bool = False, dtype: str = "float32",
         classes: Sequence[str] | None = None, preprocess: Any = None,
         allow_nonfinite: bool = False, about: Mapping[str, str] | None = None):
  """Writes a model and its variables as .safetensors, under our names, with the model's settings.

  Args:
    path: ends in .safetensors.
    force: overwrite a file that exists.
    dtype: "float16" or "bfloat16" to halve the file; `load` still returns float32.
    classes: names of the classes, in the order of the logits; `classes_of` reads them.
    preprocess: how images were evaluated, if not as `vc.preprocess(model)` does; it is stored in
      the file, and `vc.preprocess(path)` reads it.
    allow_nonfinite: write variables that are NaN or infinite.
    about: further metadata, which `read_metadata` returns.
  Raises:
    ValueError: the file exists, or the variables, classes or values do not fit.
  """
  _check_variables(model, variables, variable_shapes(model))
  if dtype not in DTYPES:
    raise ValueError(f"{dtype=}: must be one of {', '.join(DTYPES)}")
  leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(variables).items()}
  if not allow_nonfinite:
    trees.check_finite("variables", leaves)
  with np.errstate(over="ignore"):
    half = {name: leaf.astype(DTYPES[dtype], copy=False) for name, leaf in leaves.items()}
  large = trees.nonfinite(half).keys() - trees.nonfinite(leaves).keys()
  if large:
    raise ValueError(f"{min(large)} has values too large for {dtype}; save it as bfloat16 or "
                     "float32")
  about = {**(about or {}), **metadata(model)}
  if classes is not None:
    about["classes"] = json.dumps(checked_classes(classes, model.num_classes))
  if preprocess is not None:
    about["crop"] = json.dumps(preprocess.crop)
    about["pixels"] = json.dumps({name: value for name, value in vars(preprocess).items()
                                  if name not in ("crop", "image_size")})
  write_safetensors(path, half, about, force=force)


def load(path, *, allow_nonfinite: bool = False) -> tuple[nn.Module, dict[str, Any]]:
  """(model, variables) from a file that `save` wrote; nothing in it is executed.

  Values are float32, whatever their dtype in the file. `classes_of` reads the class names.
  """
  arrays, about = read_safetensors(path)
  check_ours(path, arrays, about)
  model, shapes = _model_from_metadata(path, about)
  classes_in(path, about)
  if "crop" in about:
    crop_in(path, about)
  arrays = {name: array.astype(np.float32) if array.dtype.name in DTYPES else array
            for name, array in arrays.items()}
  # Compared flat: `nested` cannot take a name that is both a leaf and the prefix of another.
  if lines := trees.differences(arrays, trees.named_leaves(shapes)):
    raise ValueError(f"{path} does not fit {describe(model)}:\n"
                     + trees.excerpt(lines, 3 * MANY, joint="\n"))
  if not allow_nonfinite:
    trees.check_finite(str(path), arrays)
  variables = trees.nested(arrays)
  return model, variables


def read_model(path) -> nn.Module:
  """The model of a file that `save` wrote; its variables are not read."""
  names, about = read_header(path)
  check_ours(path, names, about)
  return _model_from_metadata(path, about)[0]


def _model_from_metadata(path, about):
  """(the model that a file's metadata describe, the shapes of its variables)."""
  try:
    model = create_model(about["model"], **json.loads(about["fields"]),
                         plan=Plan.from_json(about["plan"]))
    model = model.clone(execution=_execution(about, model))
    model.check()
    return model, variable_shapes(model)
  # A file may hold anything: deeply nested JSON raises RecursionError.
  except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
    raise ValueError(f"{path}: its metadata does not describe a model: {error}") from None


def read_metadata(path) -> dict[str, str]:
  """The metadata of a .safetensors file, without reading its arrays; for ours, see `metadata`."""
  return read_header(path)[1]


def classes_of(path) -> list[str] | None:
  """Class names in a file of ours, in the order of the logits; None if it has none."""
  names, about = read_header(path)
  check_ours(path, names, about)
  return classes_in(path, about)


def metadata(model: nn.Module) -> dict[str, str]:
  """What `create_model` needs to rebuild a model, as strings: model, fields, plan, execution."""
  fields = fields_of(model)
  plan, execution = fields.pop("plan"), fields.pop("execution")
  return {"model": model.variant, "fields": json.dumps(fields), "plan": plan.to_json(),
          "execution": execution.to_json()}


def _execution(about: Mapping[str, str], model) -> Execution:
  """A file's execution settings, which older files keep in their plan."""
  if "execution" in about:
    return Execution.from_json(about["execution"])
  tree, old = upgraded(json.loads(about["plan"]))
  merged, overrides = old.pop("merged", {}), tree.get("blocks", {})
  forms = {int(block): form for block, form in old.pop("attention", {}).items()}
  paths = [f"blocks_{site.block}/mlp/{layer}" for site in model.sites()
           for layer in merged.get(str(site.block) if "ffn" in overrides.get(str(site.block), {})
                                   else None, ())]
  return Execution(attention=forms, merged=tuple(paths), **old)


def _entries(model, shapes) -> list[Entry]:
  """The model's entries; ValueError unless they cover each of its leaves exactly once."""
  entries = model.torch_entries()
  covered = sorted(leaf for entry in entries for leaf in entry.leaves
                   if entry.part is None or entry.part[0] == 0)
  if covered != sorted(trees.named_leaves(shapes)):
    assert model.plan != Plan() or model.deploy, (
        f"{model.variant}: torch_entries and leaves differ in "
        f"{sorted(set(covered) ^ trees.named_leaves(shapes).keys())}")
    raise ValueError(f"{describe(model)} has no PyTorch form: load the dense model and compact "
                     "it; fold a compact DeiT to write it")
  return entries


def _all_entries(model, shapes) -> list[Entry]:
  """The entries of a model in any form; leaves without a PyTorch counterpart keep our names."""
  leaves = trees.named_leaves(shapes)
  entries = [entry for entry in model.torch_entries() if leaves.keys() >= set(entry.leaves)]
  covered = {leaf for entry in entries for leaf in entry.leaves}
  return [*entries, *(Entry(name, (name,)) for name in leaves if name not in covered)]


def _tensors(entries, variables) -> dict[str, np.ndarray]:
  flat = trees.named_leaves(variables)
  return {entry.torch: entry.tensor(flat) for entry in entries}


def _check_variables(model, variables, shapes):
  """As `checks.check_variables`, but also refuses other collections and other dtypes."""
  check_variables(model, variables, shapes=shapes)
  if lines := trees.differences(variables, shapes):
    raise ValueError(f"variables do not fit {describe(model)}: "
                     + trees.excerpt(lines, MANY, joint="; "))


def _shapes_of(state):
  return {name: tuple(np.shape(value)) for name, value in state.items()
          if is_tensor(value)}


def _with_timm_names(names, state):
  """The state under timm's names, if most of its names are the authors'.

  names: {the authors': timm's}.
  """
  if len(names.keys() & state.keys()) <= len(set(names.values()) & state.keys()):
    return state
  return renamed(state, lambda name: names.get(name, name))


def _adapt_channels(model, arrays, expected) -> list[str]:
  """Adapts RGB kernels to the model's `in_chans`, in place; returns their names."""
  if model.in_chans == 3:
    return []
  # A kernel with 3 input channels where the model has in_chans is the one that sees the image.
  names = [name for name, array in arrays.items()
           if array.ndim == 4 and len(expected[name]) == 4 and array.shape[1] == 3
           and expected[name][1] == model.in_chans and array.shape[0] == expected[name][0]]
  arrays |= {name: adapt_channels(arrays[name], model.in_chans) for name in names}
  return names


def _classifiers(model, shapes) -> list[str]:
  """PyTorch names of the tensors of the classifiers; for a model without classes, of all that it
  would have with classes (which may include a norm)."""
  if not model.num_classes:
    own = {entry.torch for entry in model.torch_entries()}
    return [entry.torch for entry in model.clone(num_classes=1).torch_entries()
            if entry.torch not in own]
  rules = [(pattern, "classes" in leaf.axes) for pattern, leaf in model.parameter_rules()]
  leaves = trees.named_leaves(trees.first_match(rules, shapes["params"], may_be_idle=True))
  owners = {name.rsplit("/", 1)[0] for name, by_class in leaves.items() if by_class}
  return [entry.torch for entry in model.torch_entries()
          if entry.leaves[0].removeprefix("params/").rsplit("/", 1)[0] in owners]


def _new_classifier(shape):
  """A new classifier tensor: a kernel from N(0, 0.02^2), or a zero bias."""
  if len(shape) == 1:
    return np.zeros(shape, np.float32)
  return 0.02 * np.random.default_rng(0).standard_normal(shape, np.float32)


def _resized_tensor(array, entry: Entry, expected, stored):
  """The tensor resized to the expected shape if possible, otherwise unchanged.

  stored: the grid of its position embeddings, if known.
  """
  # Grids with equally many points, such as 2 x 8 and 4 x 4, have positions of the same shape.
  if array.shape == expected and (stored is None or stored == entry.positions.grid):
    return array
  if entry.patches and array.ndim == 4 and array.shape[:2] == expected[:2]:
    return resize_patches(array, expected[2:])
  return _resized_positions(array, entry.positions, expected, stored) if entry.positions else array


def _resized_positions(array, positions, expected, stored):
  """Position embeddings resized from the stored grid, or from a square one if that is unknown."""
  if (array.ndim != len(expected) or array.shape[-1] != expected[-1]
      or (not stored and positions.tied)):
    return array
  points = array.shape[-2] - positions.prefix
  stored = stored or (round(max(points, 0) ** 0.5),) * 2
  if points < 1 or stored[0] * stored[1] != points:
    return array
  return resize_positions(array, stored, positions)
