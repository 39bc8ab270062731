"""A setting of a training config: its default and its allowed values."""
import math
from typing import Any, NamedTuple


class Setting(NamedTuple):
  """One key of a config. Its type is that of its default; a float may be given as a whole number.

  low, high: inclusive bounds; above, below: exclusive bounds. choices: the allowed values, if they
  are listed. unit: in words, for errors. is_weight: whether it is the weight of a loss term.
  formerly: the key's old name, which configs may still use.
  """
  default: Any
  low: float | None = None
  high: float | None = None
  above: float | None = None
  below: float | None = None
  choices: tuple = ()
  unit: str = ""
  is_weight: bool = False
  formerly: str = ""

  def check(self, key: str, value):
    """Raises ValueError, one line, for a value that is not allowed."""
    if not self._fits(value):
      raise ValueError(f"config.{key}={value!r}: must be {self.rule()}")

  def rule(self) -> str:
    """The allowed values, in words."""
    if self.choices:
      return f"one of {self.choices}"
    kind = {bool: "True or False", int: "a whole number", float: "a number", str: "text",
            tuple: "a list"}.get(type(self.default), "as documented")
    bounds = [f"{word} {bound:g}" for word, bound in (
        ("at least", self.low), ("at most", self.high), ("above", self.above),
        ("below", self.below)) if bound is not None]
    return f"{kind}{' ' * bool(self.unit)}{self.unit}{' ' * bool(bounds)}{' and '.join(bounds)}"

  def _fits(self, value) -> bool:
    if self.choices:
      return any(value == choice and type(value) is type(choice) for choice in self.choices)
    kind = type(self.default)
    if kind is tuple:
      return isinstance(value, (tuple, list))
    if kind is float:
      numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
      return numeric and math.isfinite(value) and self._within(value)
    if kind is int:
      return isinstance(value, int) and not isinstance(value, bool) and self._within(value)
    return isinstance(value, kind)

  def _within(self, value) -> bool:
    return not ((self.low is not None and value < self.low) or
                (self.high is not None and value > self.high) or
                (self.above is not None and value <= self.above) or
                (self.below is not None and value >= self.below))


def weight(default: float = 0.0) -> Setting:
  """The weight of a loss term; 0 drops the term."""
  return Setting(default, low=0, is_weight=True)
