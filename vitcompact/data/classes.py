"""Which output of a model is which class: the names in order, compared wherever two meet.

Class folders are numbered in the order of their names as text, torchvision's: 1, 10, 11, 12, 2.
So a class that comes, goes or is renamed moves all that follow it, and a model's outputs keep
their old meanings. The number of classes alone would not show it.
"""
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence


def digest(names: Sequence[str]) -> str:
  """sha256 of the names in order: equal where two lists are."""
  return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


WAY_OUT = ("Use the data that it was made with, rename the class folders to its names, or start "
           "without it")


def check_classes(where: str, wanted: Sequence[str] | None, got: Sequence[str] | None,
                  way_out: str = WAY_OUT, what: str = "the data") -> None:
  """ValueError where the classes of the data are not those that `where` was made with.

  where: what carries the names, for the message: "runs/a", "the teacher t.safetensors". wanted: its
  names in order; got: those of `what`. None where there are none: older files do not carry them.
  """
  if other := difference(where, wanted, got, what):
    raise ValueError(f"{other}. {way_out}")


def difference(where: str, wanted: Sequence[str] | None, got: Sequence[str] | None,
               what: str = "the data") -> str:
  """What `check_classes` refuses, as text; "" where nothing is."""
  if wanted is None or got is None or tuple(wanted) == tuple(got):
    return ""
  wanted, got = tuple(wanted), tuple(got)
  first = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b),
               min(len(wanted), len(got)))
  there, here = (repr(names[first]) if first < len(names) else "no class"
                 for names in (wanted, got))
  return (f"{where} has other classes than {what}: output {first} is {there} there and {here} in "
          f"{what} ({_names_that_differ(wanted, got, what)})")


def _names_that_differ(wanted: tuple[str, ...], got: tuple[str, ...], what: str) -> str:
  missing = [name for name in wanted if name not in set(got)]
  new = [name for name in got if name not in set(wanted)]
  parts = [f"{len(names)} {where} {what}, the first {names[0]!r}"
           for names, where in ((missing, "not in"), (new, "only in")) if names]
  if len(wanted) != len(got):
    parts.insert(0, f"{len(wanted)} classes there, {len(got)} here")
  return "; ".join(parts) or "the same names in another order"


@functools.cache
def imagenet_1k() -> tuple[str, ...]:
  """The 1,000 classes of ImageNet-1k in their order, each by the first of its words."""
  path = pathlib.Path(__file__).with_name("imagenet_1k.json")
  return tuple(name.partition(",")[0]
               for name in json.loads(path.read_text(encoding="utf-8"))["names"])


def describe(names: Sequence[str], most: int = 12) -> str:
  """"3 classes: 0 cat, 1 dog, 2 fish"; of many the first ones, the last, and the digest."""
  lines = [f"{number} {name}" for number, name in enumerate(names)]
  if len(lines) > most:
    lines = [*lines[:most - 2], "...", lines[-1]]
    return f"{len(names)} classes: {', '.join(lines)}; sha256 of the names {digest(names)[:12]}"
  return f"{len(names)} classes: {', '.join(lines)}"
