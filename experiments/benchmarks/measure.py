"""What all suites share: the setting, the candidates, and the rows of results."""
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peer import TorchPeer
from vitcompact import bench, trees


class Setting(NamedTuple):
  """Where a suite runs, and for how many rounds.

  torch: a peer to take turns with, or None. cores: those available before the process was pinned.
  """
  platform: str
  rounds: int = 5
  torch: TorchPeer | None = None
  cores: tuple[int, ...] = ()

  @property
  def on_host(self) -> bool:
    return self.platform == "cpu"

  @property
  def dtype(self) -> str:
    return "float32" if self.on_host else "bfloat16"


# {name of a row: kind of the peer}
PEERS = {"torch f32": "f32", "torch f32, SDPA": "f32 sdpa", "torch bf16": "bf16 sdpa",
         "torch.compile f32": "f32 sdpa compile", "torch.compile bf16": "bf16 sdpa compile",
         "timm f32": "f32 timm", "timm bf16": "bf16 timm"}


class Candidate(NamedTuple):
  """Something to time. call: a function or a remote, or None if it cannot be measured; facts:
  further entries of its row, such as the "reason" why it is not measured."""
  call: Callable[[], Any] | bench.Remote | None
  facts: Mapping[str, Any]


def compiled(function: Callable, *args, **facts) -> Candidate:
  """Returns a candidate compiled ahead of time, with the compile time as a fact; if it does not
  compile, one without a call but with the reason."""
  try:
    program = bench.compiled(function, *args)
  except Exception as error:   # the other candidates are still worth measuring
    return Candidate(None, {"reason": f"{type(error).__name__}: {str(error).splitlines()[:1]}"})
  return Candidate(program.call, {"compile_seconds": program.seconds,
                                  "temporary_bytes": program.temporary, **facts})


def rows(case: Mapping[str, Any], candidates: Mapping[str, Candidate], setting: Setting,
         min_seconds: float = 0.1, warmup_calls: int = 0) -> Iterator[dict]:
  """Yields a row for each candidate of a case. Candidates take turns; every round is kept, so that
  any ratio can be computed later."""
  calls = {name: candidate.call for name, candidate in candidates.items() if candidate.call}
  taken = {} if not calls else bench.rounds_of(
      calls, rounds=setting.rounds, min_seconds=min_seconds, warmup_calls=warmup_calls)
  for name, candidate in candidates.items():
    seconds = taken.get(name)
    yield {**case, "name": name, "seconds": seconds and statistics.median(seconds),
           "rounds": seconds, **candidate.facts}


def torch_candidates(setting: Setting, names, model, **what) -> dict[str, Candidate]:
  """Returns PyTorch's versions of a dense DeiT with the sizes of `model`; what: batch, train."""
  out = {}
  for name in names:
    if setting.torch is None:
      out[name] = Candidate(None, {"reason": "no --torch PYTHON was given"})
    else:
      call, reason = setting.torch.build(
          kind=PEERS[name], image_size=model.image_size, depth=model.depth, width=model.width,
          heads=model.heads, **what)
      out[name] = Candidate(call, {} if call else {"reason": reason})
  return out


def random_weights(shapes, dtype: str = "float32"):
  """Returns weights for timing, without running an init: N(0, 0.02^2); scales and variances are 1.
  """
  rng = np.random.default_rng(0)

  def draw(name, leaf):
    if name.endswith(("scale", "var")):
      return jnp.ones(leaf.shape, dtype)
    return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype)

  return trees.nested({name: draw(name, leaf) for name, leaf in trees.named_leaves(shapes).items()})


def random_variables(model, images, dtype: str = "float32"):
  return random_weights(jax.eval_shape(model.init, jax.random.key(0), images), dtype)


def normal(shape, dtype: str = "float32", seed: int = 0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


class Child:
  """A new Python process that prints the seconds it took; it takes turns with other candidates."""

  def __init__(self, code: str, *arguments: str, clear_cache: bool = False):
    self.command, self.cache = [sys.executable, "-c", code, *arguments], clear_cache

  def seconds(self, calls: int) -> float:
    total = 0.0
    for _ in range(calls):
      with tempfile.TemporaryDirectory() as empty:
        command = self.command + [empty] * self.cache
        done = subprocess.run(command, capture_output=True, text=True, check=True)
      total += json.loads(done.stdout.splitlines()[-1])
    return total / calls
