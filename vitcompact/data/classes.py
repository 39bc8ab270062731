"""Which output of a model is which class: compares the ordered class names of models and data.

Class folders are numbered in the order of their names as text, like in torchvision: 1, 10, 11, 12,
2. A class that is added, removed or renamed therefore renumbers all classes after it, while the
outputs of a trained model keep their old meaning. The number of classes alone would not show it.
"""
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence


def digest(names: Sequence[str]) -> str:
  """The sha256 of a list of names."""
  return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


HINT = ("Use the data that it was made with, rename the class folders to match its names, or "
           "start without it")


def check_classes(where: str, wanted: Sequence[str] | None, got: Sequence[str] | None,
                  hint: str = HINT, what: str = "the data") -> None:
  """Raises ValueError if the classes of `what` are not those of `where`.

  where: names the model or run in the message, such as "runs/a" or "the teacher t.safetensors".
  wanted: its class names in order, got: those of `what`; None if unknown, as in older files.
  """
  if message := difference(where, wanted, got, what):
    raise ValueError(f"{message}. {hint}")


def difference(where: str, wanted: Sequence[str] | None, got: Sequence[str] | None,
               what: str = "the data") -> str:
  """How the two lists of classes differ, as text; "" if they agree or one is unknown."""
  if wanted is None or got is None or tuple(wanted) == tuple(got):
    return ""
  wanted, got = tuple(wanted), tuple(got)
  first = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b),
               min(len(wanted), len(got)))
  expected, actual = (repr(names[first]) if first < len(names) else "no class"
                      for names in (wanted, got))
  return (f"{where} has other classes than {what}: output {first} is {expected} there and {actual} "
          f"in {what} ({_names_that_differ(wanted, got, what)})")


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
  """The 1,000 classes of ImageNet-1k in order, each by its first synonym."""
  path = pathlib.Path(__file__).with_name("imagenet_1k.json")
  return tuple(name.partition(",")[0]
               for name in json.loads(path.read_text(encoding="utf-8"))["names"])


def describe(names: Sequence[str], limit: int = 12) -> str:
  """"3 classes: 0 cat, 1 dog, 2 fish"; above `limit`, the first ones, the last and the digest."""
  lines = [f"{number} {name}" for number, name in enumerate(names)]
  if len(lines) > limit:
    lines = [*lines[:limit - 2], "...", lines[-1]]
    return f"{len(names)} classes: {', '.join(lines)}; sha256 of the names {digest(names)[:12]}"
  return f"{len(names)} classes: {', '.join(lines)}"
