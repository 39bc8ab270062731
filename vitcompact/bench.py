"""bench: times functions against each other in one run."""
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax


class Timing(NamedTuple):
  """Times of one function: median seconds per call, and speed relative to the run's first function.

  speedup: median over rounds of (seconds of the first) / (seconds of this one) in the same round;
  low, high: lowest and highest of these. clock: "cpu" (CPU seconds of the process, used on hosts,
  where wall time depends on what else runs) or "wall". load: of the host at the start of the run.
  """
  seconds: float
  speedup: float
  low: float
  high: float
  clock: str
  load: float


class Remote(Protocol):
  """A function that is timed elsewhere, such as in another Python's process."""

  def seconds(self, calls: int) -> float:
    """Seconds per call, by the clock that `clock_name` names, over `calls` calls."""


class Compiled(NamedTuple):
  """A function compiled for its arguments.

  seconds: to trace and compile; temporary: bytes that a call needs in addition to its arguments and
  results, None if the compiler does not say.
  """
  call: Callable[[], object]
  seconds: float
  temporary: int | None


def processor() -> str:
  """The name of the host's processor, as far as the system knows it."""
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def clock_name() -> str:
  """"cpu" on hosts; "wall" on accelerators, whose time the host's CPU seconds do not include."""
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
  """{name: seconds per call in each round}; in each round every function is timed once.

  Their order rotates from round to round. A function takes no arguments and returns arrays, which
  are waited for; its first call, which may compile, is not counted. In a round it is called for
  about `min_seconds`, at least once; min_seconds=0 means exactly once, without a trial call. Before
  each measurement come `warmup_calls` calls that are not counted: a large function pays for what
  the one before it left, such as memory returned to the system. clock: default `now`.
  """
  names = list(functions)
  timers = {name: getattr(function, "seconds", None) or _timer(function, clock or now)
            for name, function in functions.items()}
  for name in names:
    timers[name](1)
  calls, times = dict.fromkeys(names, 1), {name: [] for name in names}
  if min_seconds:
    once = {name: timers[name](1) for name in names}
    calls = {name: max(1, round(min_seconds / max(once[name], 1e-6))) for name in names}
    if set(calls.values()) == {1} and not warmup_calls:   # the trial calls are the first round
      times = {name: [seconds] for name, seconds in once.items()}
  for turn in range(len(times[names[0]]), rounds):
    shift = turn % len(names)
    for name in names[shift:] + names[:shift]:
      if warmup_calls:
        timers[name](warmup_calls)
      times[name].append(timers[name](calls[name]))
  return times


def _timer(function: Callable[[], object], clock) -> Callable[[int], float]:
  def seconds(calls: int) -> float:
    start = clock()
    for _ in range(calls):
      out = function()
      # Waiting for each call would leave an accelerator idle between calls.
      if clock_name() == "cpu":
        jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (clock() - start) / calls
  return seconds


def ratio(first: list[float], other: list[float]) -> tuple[float, float, float]:
  """How much faster `other` is than `first`: median, lowest and highest over rounds."""
  ratios = [a / b for a, b in zip(first, other, strict=True)]
  return statistics.median(ratios), min(ratios), max(ratios)


def paired(functions: Mapping[str, Callable[[], object] | Remote], *, rounds: int = 7,
           min_seconds: float = 0.1) -> dict[str, Timing]:
  """Times functions alternately, as `rounds_of` does, and compares each with the first."""
  load = os.getloadavg()[0]
  times = rounds_of(functions, rounds=rounds, min_seconds=min_seconds)
  first = next(iter(times.values()))
  return {name: Timing(statistics.median(seconds), *ratio(first, seconds), clock_name(), load)
          for name, seconds in times.items()}
