"""bench: how long functions take, compared in one run."""
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Timing(NamedTuple):
  """Of one function: median seconds a call, and speed relative to the first function of the run.

  speedup: median over rounds of (seconds of the first) / (seconds of this one) in the same round;
  low, high: the least and the most of these. clock: "cpu" (CPU seconds of the process, for hosts,
  where wall time depends on what else runs) or "wall". load: of the host, when the run began.
  """
  seconds: float
  speedup: float
  low: float
  high: float
  clock: str
  load: float


def paired(functions: Mapping[str, Callable[[], object]], *, rounds: int = 7,
           least: float = 0.1) -> dict[str, Timing]:
  """Times functions of no arguments in turn, in an order that rotates from round to round.

  Each returns arrays, which are waited for. Compilation happens before the clock starts; a function
  is called as often in a round as takes `least` seconds.
  """
  names = list(functions)
  on_host = jax.default_backend() == "cpu"
  clock = time.process_time if on_host else time.perf_counter
  load = os.getloadavg()[0]

  def seconds(name: str, calls: int) -> float:
    start = clock()
    for _ in range(calls):
      jax.block_until_ready(functions[name]())
    return (clock() - start) / calls

  for name in names:
    jax.block_until_ready(functions[name]())
  calls = {name: max(1, round(least / max(seconds(name, 1), 1e-6))) for name in names}
  taken = {name: [] for name in names}
  for turn in range(rounds):
    order = names[turn % len(names):] + names[:turn % len(names)]
    for name in order:
      taken[name].append(seconds(name, calls[name]))
  first = taken[names[0]]
  out = {}
  for name in names:
    ratios = [a / b for a, b in zip(first, taken[name], strict=True)]
    out[name] = Timing(statistics.median(taken[name]), statistics.median(ratios), min(ratios),
                       max(ratios), "cpu" if on_host else "wall", load)
  return out
