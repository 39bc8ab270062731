"""Checks whether a PyTorch state dict fits a model; if not, says what differs and what to do."""
import dataclasses
import functools
from collections.abc import Mapping

from vitcompact import foreign, trees
from vitcompact.checks import describe, variable_shapes
from vitcompact.models import VARIANTS, create_model

MANY = 4   # mismatches of each kind that are shown; the others are counted


def check_fit(what, model, shapes, wanted, heads, got):
  """Raises ValueError, with the first few mismatches, if `what` does not fit the model.

  shapes: {name: shape} of its tensors; wanted: of those of the model; heads: names of classifiers;
  got: {name: shape} under the names of the state dict.
  """
  missing = [name for name in wanted if name not in shapes]
  unexpected = [name for name in shapes if name not in wanted]
  misshapen = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
  wrong = {*missing, *unexpected, *misshapen}
  if not wrong:
    return
  first = (f"{what} does not fit {describe(model)}: {len(missing)} missing, "
           f"{len(unexpected)} unexpected, {len(misshapen)} misshapen")
  if len(missing) > 0.9 * len(wanted) and (line := foreign.owner_hint(got)):
    raise ValueError(f"{first}: {line}")
  hints = _hints(model, missing, unexpected, misshapen, shapes, wanted, heads)
  own = _overlap(shapes.items(), wanted.items())
  if not hints and (closest := closest_model(got, better_than=own)):
    hints = [f"the closest model is {closest}"]
  if not hints and not wanted.keys() & shapes.keys():
    hints = ["none of its names is the model's"]
  raise ValueError("\n".join([
      "; ".join([first, *hints]),
      *_first_lines("missing", [f"missing {name} {wanted[name]}" for name in missing]),
      *_first_lines("unexpected", [f"unexpected {name} {shapes[name]}" for name in unexpected]),
      *_first_lines("misshapen", [f"{name} is {shapes[name]}, not {wanted[name]}"
                                for name in misshapen])]))


def _first_lines(what, lines):
  """The first lines, and how many more there are."""
  more = len(lines) - MANY
  return [*lines[:MANY], *([f"and {more} more {what}"] if more > 0 else [])]


def _hints(model, missing, unexpected, misshapen, shapes, wanted, heads) -> list[str]:
  """What to do about the mismatches, if it is known."""
  hints, wrong = [], {*missing, *unexpected, *misshapen}
  own, other, pool = "norm", "fc_norm", "avg"
  if getattr(model, "global_pool", None) == "avg":
    own, other, pool = "fc_norm", "norm", "token"
  if f"{own}.weight" in missing and f"{other}.weight" in unexpected:
    hints.append(f"it has {other} instead of {own}: create the model with global_pool={pool!r} "
                 f"(--global-pool {pool})")
    wrong -= {f"{name}.{leaf}" for name in (own, other) for leaf in ("weight", "bias")}
  if wrong and wrong <= set(heads):
    hints.append(_classifier_hint(misshapen, shapes, wanted))
  tied = {entry.torch for entry in model.torch_entries()
          if entry.positions is not None and entry.positions.tied}
  if tied & set(misshapen):
    hints.append("mask predictors are tied to the positions of their tokens: load them at their "
                 "own image size, then vitcompact.convert.resized makes them fit another")
  for name in misshapen:
    got, want = shapes[name], wanted[name]
    if len(got) == len(want) == 4 and got[1] != want[1] == model.in_chans and got[0] == want[0]:
      hints.append(f"{name} is for images of {got[1]} channels: create the model with "
                   f"in_chans={got[1]}; only kernels of 3 are made for others")
  return hints


def _classifier_hint(misshapen, shapes, wanted):
  """What to do if only a classifier does not fit: it has other classes, or is missing."""
  rest = "pass reset_head (--reset-head) to keep all but the classifier, which is initialised anew"
  for name in misshapen:
    if shapes[name][1:] == wanted[name][1:] and shapes[name][:1] != wanted[name][:1]:
      there, here = shapes[name][0], wanted[name][0]
      return (f"it has {there} classes, the model {here}: create the model with "
              f"num_classes={there} (--num-classes {there}), or {rest}")
  return f"create the model with num_classes=0 (--num-classes 0) to have features, or {rest}"


def closest_model(shapes: Mapping[str, tuple[int, ...]], better_than: float = 0.0) -> str | None:
  """The named model whose PyTorch tensors {name: shape} agree with the most of these.

  None if no model shares more than `better_than` of all names and shapes.
  """
  by_name = {}
  for name in VARIANTS:
    model = create_model(name)
    timm = [entry.torch for entry in model.torch_entries()]
    by_name[name] = max(_overlap(shapes, timm), _overlap(shapes, map(model.authors_name, timm)))
  # Models of one family share their names: only the best family is worth tracing.
  best = max(by_name.values())
  likely = [name for name, score in by_name.items() if 0 < 0.9 * best <= score]
  scores = {name: max(_overlap(shapes.items(), tensors) for tensors in _tensors(name))
            for name in likely}
  return max((name for name in likely if scores[name] > better_than), key=scores.get, default=None)


def _overlap(got, wanted) -> float:
  got, wanted = set(got), set(wanted)
  return len(got & wanted) / len(got | wanted)


@functools.cache
def _tensors(variant: str):
  """[(name, shape)] of a named model: under timm's names, and under the authors'."""
  model = create_model(variant)
  leaves = _shapes(model)
  timm = [(entry.torch, entry.shape(leaves))
          for entry in model.torch_entries()]
  return timm, [(model.authors_name(name), shape) for name, shape in timm]


def _shapes(model) -> dict[str, tuple[int, ...]]:
  """{name: shape} of a dense model's leaves. Equal blocks are traced once: a dozen models share the
  names of a DeiT, and tracing all blocks of one takes a second."""
  if "depth" not in {field.name for field in dataclasses.fields(model)}:
    return {name: leaf.shape for name, leaf in trees.named_leaves(variable_shapes(model)).items()}
  leaves = trees.named_leaves(variable_shapes(model.clone(depth=1)))
  return {name.replace("/blocks_0/", f"/blocks_{block}/"): leaf.shape
          for name, leaf in leaves.items() for block in range(model.depth)}
