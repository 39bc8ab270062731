"""Difference between our logits and PyTorch's, on the small models of references/."""
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

import vitcompact as vc
from tests.models import drawn


class Run(NamedTuple):
  """One image size of one small model, with PyTorch's logits `expected` for drawn weights."""
  name: str
  model: Any
  state: dict[str, np.ndarray]
  images: np.ndarray
  expected: np.ndarray


def runs(family: str) -> list[Run]:
  """Returns every case, image size, plain and probe."""
  out = []
  path = pathlib.Path(__file__).parent / "references" / f"{family}.json"
  for case in json.loads(path.read_text()):
    shapes = {name: tuple(shape) for name, shape in case["shapes"].items()}
    fields = {"plan": "", **case["fields"]}
    fields["plan"] = vc.Plan.parse(fields["plan"])
    for run in case["runs"]:
      size = tuple(run["image_size"])
      model = vc.create_model(case["model"], image_size=size, **fields)
      for kind, probe in (("logits", case.get("plain")), ("probed", case["probe"])):
        out.append(Run(f"{case['model']}-{size[0]}x{size[1]}-{kind}", model,
                       drawn.weights(shapes, probe), drawn.images(size), np.array(run[kind])))
  return out


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, images):
  return model.apply(variables, images)


def difference(run: Run, *, retrace: bool = False) -> float:
  """Largest absolute difference of logits.

  retrace: for tests that patch what the model computes, which jit's cache does not notice.
  """
  apply = jax.jit(lambda *args: run.model.apply(*args)) if retrace else functools.partial(
      _logits, run.model)
  got = apply(vc.from_torch(run.model, run.state), run.images)
  return float(np.max(np.abs(np.asarray(got) - run.expected)))
