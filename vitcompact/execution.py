"""Execution: how a model is computed. It changes time and memory, never the function."""
import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence

from flax.core import FrozenDict

from vitcompact.attention import FORMS

MERGED = re.compile(r"blocks_(\d+)/mlp/(\w+)")


@dataclasses.dataclass(frozen=True)
class Execution:
  """Choices that `tune` makes by measuring on a device; a model has one, separate from its plan.

  attention: {block: form}, one of `attention.FORMS`; for an absent block the core chooses.
  chunk: inference computes a batch in chunks of `chunk` images; None: all at once.
  merged: paths such as "blocks_3/mlp/fc2" of factorised layers that are deployed as one matrix A B.

  >>> Execution(attention={3: "tiled"}, chunk=8)
  """
  attention: Mapping[int, str] = FrozenDict()
  chunk: int | None = None
  merged: tuple[str, ...] = ()

  def __post_init__(self):
    if not isinstance(self.attention, Mapping):
      raise ValueError(f"Execution(attention={self.attention!r}): must be a dict such as "
                       "{7: 'tiled'}")
    for block, form in self.attention.items():
      if not isinstance(block, int) or isinstance(block, bool) or block < 0:
        raise ValueError(f"Execution(attention={{{block!r}: ...}}): blocks are numbered 0, 1, ...")
      if form not in FORMS:
        raise ValueError(f"Execution(attention={{{block}: {form!r}}}): must be one of "
                         f"{', '.join(FORMS)}")
    if self.chunk is not None and not (type(self.chunk) is int and self.chunk > 0):
      raise ValueError(f"Execution(chunk={self.chunk!r}): must be a whole number of images, at "
                       "least 1, or None")
    if not isinstance(self.merged, (tuple, list)) or not all(
        isinstance(path, str) and MERGED.fullmatch(path) for path in self.merged):
      raise ValueError(f"Execution(merged={self.merged!r}): must be paths such as "
                       "'blocks_3/mlp/fc2'")
    object.__setattr__(self, "attention", FrozenDict(sorted(self.attention.items())))
    object.__setattr__(self, "merged", tuple(sorted(set(self.merged))))

  def merged_in(self, block: int) -> tuple[str, ...]:
    """Layers of a block's FFN that are merged into one matrix."""
    found = [MERGED.fullmatch(path).groups() for path in self.merged]
    return tuple(layer for number, layer in found if int(number) == block)

  def check(self, mergeable: Sequence[Collection[str]]):
    """Raises ValueError if this names blocks or layers that a model does not have.

    mergeable: the layers of each block's FFN that may be merged.
    """
    named = [*self.attention, *(int(MERGED.fullmatch(path)[1]) for path in self.merged)]
    if missing := [block for block in named if block >= len(mergeable)]:
      raise ValueError(f"the execution names block {missing[0]}, but the model has blocks 0 to "
                       f"{len(mergeable) - 1}")
    for block, layers in enumerate(mergeable):
      wrong = set(self.merged_in(block)) - set(layers)
      if layers and wrong:   # not for dense blocks, which may be compacted later
        raise ValueError(f"Execution(merged=('blocks_{block}/mlp/{min(wrong)}',)): the plan does "
                         f"not factorise this layer; in block {block} it does {sorted(layers)}")

  def to_json(self) -> str:
    out = {"attention": {str(block): form for block, form in self.attention.items()},
           "chunk": self.chunk, "merged": list(self.merged)}
    return json.dumps({key: value for key, value in out.items() if value})

  @classmethod
  def from_json(cls, text: str) -> "Execution":
    """Inverse of `to_json`."""
    try:
      tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
      raise ValueError(f"an execution must be JSON: {error}; got {text[:60]!r}") from None
    if not isinstance(tree, dict) or not tree.keys() <= {"attention", "chunk", "merged"}:
      raise ValueError(f"an execution must be a JSON object of attention, chunk and merged, got "
                       f"{text[:60]!r}")
    forms = tree.pop("attention", {})
    if not isinstance(forms, dict) or not all(block.isdecimal() for block in forms):
      raise ValueError(f'execution, attention={forms!r}: must be an object such as '
                       '{"7": "tiled"}')
    return cls(attention={int(block): form for block, form in forms.items()}, **tree)
