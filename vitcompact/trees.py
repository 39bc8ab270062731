"""Names of leaves: the one language that decay, sharding, loading and surgery speak.

A variable tree is a nested dict of arrays; a leaf's name is its path joined with "/", as in
`blocks_3/attn/query/kernel`.
"""
import hashlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np


class Leaf(NamedTuple):
  """What a parameter is to a trainer: the meaning of its axes, and whether weight decay applies.

  `axes` has one entry per dimension, a logical name such as "embed" or None; mesh axes are chosen
  from these in `train/sharding.py`. An empty `axes` means: whatever the rank, nothing to shard.
  """
  axes: tuple[str | None, ...] = ()
  decay: bool = False


def name_of(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree) -> dict[str, Any]:
  """{name: leaf}, in the tree's own order."""
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def first_match(rules, tree, *, may_be_idle=False):
  """Maps each leaf of `tree` to the value of the first rule whose pattern is its whole name.

  rules: [(regular expression, value)]. A leaf without a rule is an error; so is a rule without a
  leaf (a typo should fail at the start), unless `may_be_idle`, for lists that serve many models.
  """
  used = set()

  def pick(path, leaf):
    name = name_of(path)
    for pattern, value in rules:
      if re.fullmatch(pattern, name):
        used.add(pattern)
        return value
    raise ValueError(f"no rule for parameter {name} {np.shape(leaf)}: add one to the rule list")

  out = jax.tree_util.tree_map_with_path(pick, tree)
  idle = [pattern for pattern, _ in rules if pattern not in used]
  if idle and not may_be_idle:
    raise ValueError(f"rules that match no parameter: {idle}; the names are like "
                     f"{list(named_leaves(tree))[:3]}")
  return out


def differences(got, wanted) -> list[str]:
  """One line for each leaf by which `got` is not a tree of `wanted`'s names, shapes and dtypes."""
  got, wanted = named_leaves(got), named_leaves(wanted)
  lines = [f"missing {name} {wanted[name].shape}" for name in wanted if name not in got]
  lines += [f"unexpected {name} {got[name].shape}" for name in got if name not in wanted]
  for name in wanted.keys() & got.keys():
    if got[name].shape != wanted[name].shape:
      lines.append(f"{name} is {got[name].shape}, not {wanted[name].shape}")
    elif got[name].dtype != wanted[name].dtype:
      lines.append(f"{name} is {got[name].dtype}, not {wanted[name].dtype}")
  return sorted(lines)


def some(lines, most: int = 4, *, joint: str = ", ") -> str:
  """The first few of many lines or names, and how many more there are."""
  more = [f"and {len(lines) - most} more"] if len(lines) > most else []
  return joint.join([*map(str, lines[:most]), *more])


def nonfinite(tree) -> dict[str, int]:
  """{name: number of values} of the leaves that hold NaN or infinity."""
  counts = {name: int(np.size(leaf) - np.isfinite(np.asarray(leaf)).sum())
            for name, leaf in named_leaves(tree).items()}
  return {name: count for name, count in counts.items() if count}


def check_finite(what: str, tree):
  """Raises ValueError for NaN or infinity, with the first leaf and how many there are."""
  if counts := nonfinite(tree):
    name, count = next(iter(counts.items()))
    more = f", and {len(counts) - 1} more of its arrays" if len(counts) > 1 else ""
    raise ValueError(f"{what}: {name} has {count} values that are NaN or infinite{more}; a run "
                     "that diverged, or damage? allow_nonfinite takes them as they are")


def size(tree) -> int:
  """Number of elements in all leaves (arrays or ShapeDtypeStructs)."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
  """The nested dict of {name: leaf}; inverse of `named_leaves` for trees of dicts."""
  tree = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def digest(tree) -> str:
  """sha256 over names, dtypes, shapes and bytes of all leaves, whatever the order of the dicts."""
  sha = hashlib.sha256()
  for name, leaf in sorted(named_leaves(tree).items()):
    array = np.ascontiguousarray(jax.device_get(leaf))
    sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
    sha.update(array.tobytes())
  return sha.hexdigest()
