"""Times of blocks on this device, measured on first use and cached in a file."""
import json
import os
import pathlib
import re

import jax
import numpy as np

import vitcompact
from vitcompact import bench
from vitcompact.calibration import BlockKey
from vitcompact.checks import image_shapes, variable_shapes
from vitcompact.plan import Plan
from vitcompact.planner import Costs
from vitcompact.tune import random_arrays

ROUNDS = 7


def default_file() -> pathlib.Path:
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "vitcompact" / "latency.json"


class Times:
  """Seconds per batch that options save in a model's blocks; the counterpart of `Costs` for MACs.

  Whole models are timed, alternating with the dense one: each reducer, and each option in all equal
  blocks at once, dividing the savings among them. Timing a single block would overestimate its
  saving, because its weights stay in the cache. Under a reducer, an option saves in proportion to
  its MACs. Times are cached in `file` by device, versions, model and plan.
  """

  def __init__(self, costs: Costs, batch: int = 1, file=None):
    self.costs, self.batch = costs, batch
    self.file = pathlib.Path(file) if file else default_file()
    self.known = self._read()
    self.dense = self._time_plan(Plan())[0]
    self.equal = {}
    for name, block in costs.model.compactable_blocks().items():
      self.equal.setdefault(BlockKey(block).text, []).append(name)

  def total(self, reducer) -> float:
    """Seconds of the dense model under a reducer."""
    return self.dense / self._time_plan(Plan(tokens=reducer))[1]

  def saved(self, name: str, axis: str, method, tokens: int | None = None, reducer=None) -> float:
    """Seconds that a block saves with one method, given `tokens` tokens."""
    blocks = self.costs.model.compactable_blocks()
    group = self.equal[BlockKey(blocks[name]).text]
    plan = Plan(blocks={blocks[other].site.block: {axis: method} for other in group})
    seconds = self.dense * (1 - 1 / self._time_plan(plan)[1]) / len(group)
    if reducer is None:
      return seconds
    macs = self.costs.saved(name, {axis: method}, tokens, reducer)[0]
    return seconds * macs / max(self.costs.saved(name, {axis: method})[0], 1)

  def _time_plan(self, plan: Plan) -> tuple[float, float]:
    """(seconds of the dense model, speedup under a plan)."""
    model = self.costs.model

    def measure():
      calls = {"dense": self._call(model)}
      if plan != Plan():
        calls["plan"] = self._call(model.clone(plan=plan))
      timing = list(bench.paired(calls, rounds=ROUNDS).values())
      return [timing[0].seconds, timing[-1].speedup]

    return tuple(self._measure_once(f"{model!r} under {plan.to_json()}", measure))

  def _call(self, model):
    variables = random_arrays(variable_shapes(model))
    if "batch_stats" in variables:   # variances are positive
      variables["batch_stats"] = jax.tree.map(np.ones_like, variables["batch_stats"])
    images = random_arrays(image_shapes(model, self.batch))
    return bench.compiled(model.apply, variables, images).call

  def _measure_once(self, key: str, measure) -> list[float]:
    device = jax.devices()[0]
    # Removes the memory addresses that the repr of functions contains.
    key = re.sub(r" at 0x[0-9a-f]+", "", f"{device.device_kind} {os.cpu_count()} {jax.__version__} "
                 f"{vitcompact.__version__} {self.batch}: {key}")
    if key not in self.known:
      self.known[key] = measure()
      self._write()
    return self.known[key]

  def _read(self) -> dict[str, list[float]]:
    try:
      tree = json.loads(self.file.read_text(encoding="utf-8"))
      return tree if isinstance(tree, dict) else {}
    except (OSError, ValueError, RecursionError):
      return {}    # only a cache: what is lost is measured again

  def _write(self):
    self.file.parent.mkdir(parents=True, exist_ok=True)
    partial = self.file.with_name(f"{self.file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(self.known, indent=0), encoding="utf-8")
    os.replace(partial, self.file)
