"""Names of leaves, by which weight decay, sharding, loading and surgery select parameters.

A variable tree is a nested dict of arrays; a leaf's name is its path joined with "/", as in
`blocks_3/attn/query/kernel`.
"""
import hashlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np


class Leaf(NamedTuple):
  """How training treats a parameter: the meaning of its axes, and whether weight decay applies.

  `axes` has one entry per dimension, a logical name such as "embed" or None; mesh axes are chosen
  from these in `train/sharding.py`. An empty `axes` fits any rank and means: not sharded.
  """
  axes: tuple[str | None, ...] = ()
  decay: bool = False


def name_of(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree) -> dict[str, Any]:
  """{name: leaf}, in the tree's own order."""
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def first_match(rules, tree, *, may_be_idle=False):
  """Maps each leaf of `tree` to the value of the first rule whose pattern matches its full name.

  rules: [(regular expression, value)]. A leaf without a rule is an error. So is a rule without a
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
    raise ValueError(f"rules that match no parameter: {idle}; names look like "
                     f"{list(named_leaves(tree))[:3]}")
  return out


def differences(got, expected) -> list[str]:
  """One line for each leaf in which `got` differs from `expected` by name, shape or dtype."""
  got, expected = named_leaves(got), named_leaves(expected)
  lines = [f"missing {name} {expected[name].shape}" for name in expected if name not in got]
  lines += [f"unexpected {name} {got[name].shape}" for name in got if name not in expected]
  for name in expected.keys() & got.keys():
    if got[name].shape != expected[name].shape:
      lines.append(f"{name} is {got[name].shape}, not {expected[name].shape}")
    elif got[name].dtype != expected[name].dtype:
      lines.append(f"{name} is {got[name].dtype}, not {expected[name].dtype}")
  return sorted(lines)


def excerpt(lines, most: int = 4, *, joint: str = ", ") -> str:
  """The first `most` lines or names, and how many more there are."""
  more = [f"and {len(lines) - most} more"] if len(lines) > most else []
  return joint.join([*map(str, lines[:most]), *more])


def nonfinite(tree) -> dict[str, int]:
  """{name: number of values} of the leaves that hold NaN or infinity."""
  counts = {name: int(np.size(leaf) - np.isfinite(np.asarray(leaf)).sum())
            for name, leaf in named_leaves(tree).items()}
  return {name: count for name, count in counts.items() if count}


def check_finite(what: str, tree):
  """Raises ValueError for NaN or infinity, naming the first leaf and how many more have any."""
  if counts := nonfinite(tree):
    name, count = next(iter(counts.items()))
    more = f", and {len(counts) - 1} more of its arrays" if len(counts) > 1 else ""
    raise ValueError(f"{what}: {name} has {count} values that are NaN or infinite{more}; "
                     "the run diverged, or the file is damaged; allow_nonfinite accepts them")


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
  """sha256 of the names, dtypes, shapes and bytes of all leaves, independent of dict order."""
  sha = hashlib.sha256()
  for name, leaf in sorted(named_leaves(tree).items()):
    array = np.ascontiguousarray(jax.device_get(leaf))
    sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
    sha.update(array.tobytes())
  return sha.hexdigest()
