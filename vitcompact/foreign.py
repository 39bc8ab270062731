"""Finds the sets of weights in another program's checkpoint, their names and their values."""
import os
import re
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vitcompact import trees
from vitcompact.files import CONVERT
from vitcompact.foreign_rules import renamed, translated
from vitcompact.foreign_tensors import is_tensor

# Keys under which checkpoints keep weights, preferred first: averaged weights first, as in timm.
CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema",
              "state_dict", "model_state_dict", "model", "net", "network", "weights", "params",
              "teacher", "student")
OUTER = ("module.", "_orig_mod.")   # prefixes that data parallel and compiled models add to names
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")   # inside names
# Names that are not supported: (pattern, owner, what to do). Supported ones are in `foreign_names`.
OWNERS = (
    (r"(^|\.)layers\.\d+\.(ln1|ffn\.layers)\.", "OpenMMLab's",
     "timm has the same weights under names that are read here: "
     "timm.create_model(NAME, pretrained=True).state_dict()"),
    (r"^params/.*/kernel$", "vitcompact's own", "vitcompact.load reads the file that has them"),
)


class Weights(NamedTuple):
  """One set of weights in a checkpoint.

  name: where it is, such as "model_ema" or "state_dict.teacher"; "" for the checkpoint itself.
  state: {name: value}. prefix: the prefix removed from the names. outside: {name: value} left out
  because they have neither the prefix nor a name of the model. source: whose naming was translated,
  "" for timm's and the authors'; left_out: {what: names} of other parts, such as a text encoder.
  """
  name: str
  state: dict[str, Any]
  prefix: str = ""
  outside: Mapping[str, Any] = types.MappingProxyType({})
  source: str = ""
  left_out: Mapping[str, Sequence[str]] = types.MappingProxyType({})


def find(checkpoint, known: set[str], choice: str | None = None, *,
         least: int = 1) -> tuple[Weights, list[str]]:
  """(the set of weights to take, the names of all sets in the checkpoint).

  Args:
    checkpoint: a state dict, or mappings that contain some, at any depth.
    known: the names that the model looks for. Under any prefix, a set counts if it has at least
      half as many of them as the set with the most.
    choice: the name of a set, or part of it. Default: the first in the order of `CONTAINERS`.
    least: a prefix is removed only if at least this many known names have it.
  """
  _check_given(checkpoint)
  groups = []
  for path, state in _states(checkpoint):
    new = translated(state, known)
    groups += [(hits, weights._replace(source=new.source, left_out=new.left_out))
               for hits, weights in _groups(path, new.state, known, least)]
  if not groups:
    raise ValueError(f"no tensors in the checkpoint, only {_contents(checkpoint)}; expected "
                     "{name: array}")
  most = max(hits for hits, _ in groups)
  sets = [weights for hits, weights in groups if 2 * hits >= most]
  if not most:   # no known names: the error should be about the largest set
    sets = [max(sets, key=lambda weights: len(weights.state))]
  names = [weights.name for weights in sets]
  if choice is not None:
    return _choose([weights for _, weights in groups], choice), names
  first, *others = sorted(sets, key=_rank)
  if others and _rank(first) == _rank(others[0]):
    raise ValueError(f"several sets of weights in the checkpoint, {trees.excerpt(names)}; choose "
                     f"one, as in weights={first.name!r}")
  return first, names


def owner_hint(names) -> str | None:
  """A line that says whose names these are and what to do, if they are a known unsupported kind."""
  for pattern, owner, advice in OWNERS:
    if any(re.search(pattern, name) for name in names):
      return f"the names are {owner}, not timm's or the authors'; {advice}"
  return None


def _check_given(checkpoint):
  expected = "expected a state dict, {name: array}"
  if isinstance(checkpoint, (str, bytes, os.PathLike)):
    raise ValueError(f"a path was given, {str(checkpoint)!r}; {expected}, such as "
                     "torch.load(path, map_location='cpu', weights_only=True) or "
                     f"safetensors.numpy.load_file(path); `{CONVERT}` reads files")
  if not isinstance(checkpoint, Mapping):
    also = "; pass its .state_dict()" if hasattr(checkpoint, "state_dict") else ""
    raise ValueError(f"a {type(checkpoint).__name__} was given; {expected}{also}")
  if not checkpoint:
    raise ValueError(f"the state dict is empty; {expected}")
  if _has_kernel(checkpoint):
    raise ValueError(f"variables of Flax were given; {expected}. Ours need no conversion: apply, "
                     "vitcompact.save and vitcompact.load take them")


def _has_kernel(mapping, depth=0):
  return any((key == "kernel" and is_tensor(value)) or
             (isinstance(value, Mapping) and depth < 9 and _has_kernel(value, depth + 1))
             for key, value in mapping.items())


def _contents(checkpoint):
  return trees.excerpt([f"{key!r} (a {type(value).__name__})" for key, value in checkpoint.items()])


def _text(key):
  return key.decode("utf-8", "replace") if isinstance(key, bytes) else key


def _states(mapping, path=()):
  """Yields (path, {name: value}) for each mapping with tensors; names without wrapper prefixes."""
  items = [(_text(key), value) for key, value in mapping.items()
           if isinstance(key, (str, bytes))]
  if any(is_tensor(value) for _, value in items):
    yield path, renamed(dict(items), _without_wrappers)
  for key, value in items:
    if isinstance(value, Mapping) and len(path) < 4:
      yield from _states(value, (*path, key))


def _without_wrappers(name):
  for wrapper in INNER:
    name = re.sub(rf"(^|\.){re.escape(wrapper)}", r"\1", name)
  while name.startswith(OUTER):
    name = name.split(".", 1)[1]
  return name


def _groups(path, state, known, least):
  """[(number of known names, Weights)]: one for each prefix under which a network is.

  If there are several, each is named by its prefix.
  """
  hits = Counter(prefix for name in state for prefix in _prefixes(name, known))
  most = max(hits.values(), default=0)
  if 2 * hits[""] >= most or most < least:
    return [(hits[""], Weights(".".join(path), state))]
  prefixes = [prefix for prefix, count in hits.items() if 2 * count >= most]
  out = []
  for prefix in prefixes:
    inside = {name.removeprefix(prefix): value for name, value in state.items()
              if name.startswith(prefix)}
    others = [name for name in state if not name.startswith(tuple(prefixes))]
    # Tensors outside the prefix may belong to the model too, such as a classifier.
    extra = {name: full for full in others for name in _without_prefix(full, prefix)
             if name in known and name not in inside}
    parts = [part for part in prefix.split(".") if part and f"{part}." not in OUTER]
    out.append((hits[prefix], Weights(
        ".".join([*path, *parts] if len(prefixes) > 1 else path),
        inside | {name: state[full] for name, full in extra.items()}, prefix,
        {name: state[name] for name in others if name not in extra.values()})))
  return out


def _without_prefix(name, prefix):
  """A name without each leading part of the prefix that it starts with."""
  ends = [0, *(found.end() for found in re.finditer(r"\.", prefix))]
  return [name[end:] for end in ends if name.startswith(prefix[:end])]


def _prefixes(name, known):
  """The prefixes without which `name` is a known name."""
  starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
  return [name[:start] for start in starts if name[start:] in known]


def _rank(weights):
  """Sort key of preference: by the most preferred part of a set's name, then by all parts."""
  order = [CONTAINERS.index(part) if part in CONTAINERS else len(CONTAINERS)
           for part in weights.name.split(".")] if weights.name else [-1]
  return min(order), sum(order)


def _choose(groups, choice):
  def matches(weights):
    parts = ".".join([weights.name, weights.prefix])
    return f".{choice}." in f".{parts}."

  found = [weights for weights in groups if matches(weights)]
  exact = [weights for weights in found if weights.name == choice]
  if len(exact or found) != 1:
    problem = "stands for several" if found else "is not in the checkpoint"
    names = [weights.name or "weights without a container" for weights in groups]
    raise ValueError(f"weights={choice!r} {problem}; it has {trees.excerpt(names, 8)}")
  return (exact or found)[0]
