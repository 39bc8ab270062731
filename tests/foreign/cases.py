"""The cases of references.json: random foreign state dicts, and what their models compute."""
import functools
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from tests.models import drawn

REFERENCES = pathlib.Path(__file__).parent / "references.json"


class Case(NamedTuple):
  """model, fields: as for `create_model`. state: under the foreign names. timm: {name: shape} of
  timm's model, or None if it has none. expected: logits, features or tokens of `one_image`.
  live: names in memory, if they differ from those in files. config: transformers' own."""
  name: str
  model: str
  fields: dict[str, Any]
  state: dict[str, np.ndarray]
  timm: dict[str, tuple[int, ...]] | None
  expected: np.ndarray
  live: list[str]
  config: dict[str, Any]


def drawn_state(shapes) -> dict[str, np.ndarray]:
  """Returns random weights of these names and shapes; DINOv3's bias masks are not random (ones, and
  zeros for keys)."""
  state = drawn.weights({name: tuple(shape) for name, shape in shapes.items()})
  return state | {name: np.repeat(np.float32([1, 0, 1]), len(value) // 3)
                  for name, value in state.items() if name.endswith("bias_mask")}


def one_image(size: int) -> np.ndarray:
  """(1, size, size, 3)."""
  return drawn.images((size, size), 1)


@functools.cache
def cases() -> dict[str, Case]:
  """Returns {name: Case}."""
  out = {}
  for row in json.loads(REFERENCES.read_text()):
    fields = {key: tuple(value) if isinstance(value, list) else value
              for key, value in row["fields"].items()}
    timm = row.get("timm") and {name: tuple(shape) for name, shape in row["timm"].items()}
    out[row["name"]] = Case(row["name"], row["model"], fields, drawn_state(row["shapes"]), timm,
                            np.array(row["wanted"]), row.get("live", []), row.get("config", {}))
  return out
