"""bench: how long functions take, compared in one run."""
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

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


class Remote(Protocol):
  """Something timed elsewhere, such as in another Python's process, alternating with the others."""

  def seconds(self, calls: int) -> float:
    """Seconds a call, by the clock that `clock_name` names, over `calls` calls."""


class Compiled(NamedTuple):
  """A function compiled for its arguments.

  seconds: it took to trace and compile; temporary: bytes that a call needs beside its arguments and
  results, None where the compiler does not say.
  """
  call: Callable[[], object]
  seconds: float
  temporary: int | None


def processor() -> str:
  """The host's processor, by name where the system tells it."""
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def clock_name() -> str:
  """"cpu" on hosts, "wall" on accelerators, whose time a host's CPU seconds do not show."""
  return "cpu" if jax.default_backend() == "cpu" else "wall"


def now() -> float:
  return time.process_time() if clock_name() == "cpu" else time.perf_counter()


def compiled(function: Callable, *args) -> Compiled:
  """Compiles `function` for these arrays; `call` runs it on them."""
  start = now()
  program = jax.jit(function).lower(*args).compile()
  seconds = now() - start
  memory = program.memory_analysis()
  return Compiled(lambda: program(*args), seconds, memory and memory.temp_size_in_bytes)


def rounds_of(functions: Mapping[str, Callable[[], object] | Remote], *, rounds: int = 7,
              min_seconds: float = 0.1, warmup_calls: int = 0,
              clock: Callable[[], float] | None = None) -> dict[str, list[float]]:
  """{name: seconds a call in each round}, of functions that take turns.

  Their order rotates from round to round. A function of no arguments returns arrays, which are
  waited for; its first call, which may compile, is not counted. A function is called as often in a
  round as takes `min_seconds`, at least once; min_seconds=0: once, without a call to find out. A
  turn begins with `warmup_calls` calls that are not counted: a large one pays for what the one
  before it left, such as memory that went back to the system. clock: `now`, if no other.
  """
  names = list(functions)
  timers = {name: getattr(function, "seconds", None) or _timer(function, clock or now)
            for name, function in functions.items()}
  for name in names:
    timers[name](1)
  calls, taken = dict.fromkeys(names, 1), {name: [] for name in names}
  if min_seconds:
    once = {name: timers[name](1) for name in names}
    calls = {name: max(1, round(min_seconds / max(once[name], 1e-6))) for name in names}
    if set(calls.values()) == {1} and not warmup_calls:   # then that was the first round
      taken = {name: [seconds] for name, seconds in once.items()}
  for turn in range(len(taken[names[0]]), rounds):
    shift = turn % len(names)
    for name in names[shift:] + names[:shift]:
      if warmup_calls:
        timers[name](warmup_calls)
      taken[name].append(timers[name](calls[name]))
  return taken


def _timer(function: Callable[[], object], clock) -> Callable[[int], float]:
  def seconds(calls: int) -> float:
    start = clock()
    for _ in range(calls):
      out = function()
      # A host that waits for each call costs an accelerator idle time between them.
      if clock_name() == "cpu":
        jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (clock() - start) / calls
  return seconds


def ratio(first: list[float], other: list[float]) -> tuple[float, float, float]:
  """How much faster `other` is than `first`: the median over rounds, the least and the most."""
  ratios = [a / b for a, b in zip(first, other, strict=True)]
  return statistics.median(ratios), min(ratios), max(ratios)


def paired(functions: Mapping[str, Callable[[], object] | Remote], *, rounds: int = 7,
           min_seconds: float = 0.1) -> dict[str, Timing]:
  """Times functions alternately, as `rounds_of` does, each against the first."""
  load = os.getloadavg()[0]
  taken = rounds_of(functions, rounds=rounds, min_seconds=min_seconds)
  first = next(iter(taken.values()))
  return {name: Timing(statistics.median(seconds), *ratio(first, seconds), clock_name(), load)
          for name, seconds in taken.items()}
