"""Non-finite losses and gradients: a run stops and keeps the batch, or skips such steps."""
import math
import pathlib

import jax
import numpy as np

WATCHED = ("loss", "grad_norm")


def check(run_state, first_step: int, metrics: list[dict]):
  """Raises FloatingPointError at the first step whose loss or gradient is not finite.

  run_state: a `loop.RunState`. config.optim.skip_nonfinite: the number of such steps that are
  skipped first; they changed nothing.
  """
  limit, skips = run_state.run.config.optim.skip_nonfinite, 0
  bad = first_bad(first_step, metrics)
  for step, values in enumerate(metrics, first_step):
    skips += int(values.get("skipped", 0))
    if run_state.skipped + skips > limit and values.get("skipped"):
      bad = step, f"loss or gradient is not finite at step {step}, and {limit} were skipped"
      break
  run_state.skipped += skips
  if bad:
    try:
      batch = f"The batch is in {keep_batch(run_state.directory, bad[0], run_state.data)}"
    except OSError as error:
      batch = f"The batch could not be written ({error.strerror})"
    raise FloatingPointError(
        f"{bad[1]}; stopped, and nothing was saved since the last checkpoint. {batch}. A lower "
        "config.optim.learning_rate or a config.optim.clip_norm may help")


def first_bad(first_step: int, metrics: list[dict]) -> tuple[int, str] | None:
  """(step, message) of the first non-finite loss or gradient that was not skipped."""
  for step, values in enumerate(metrics, first_step):
    for name in WATCHED:
      if not values.get("skipped") and not math.isfinite(values[name]):
        return step, f"{name} is {values[name]} at step {step}"
  return None


def keep_batch(directory: pathlib.Path, step: int, data) -> pathlib.Path:
  """Writes this process's part of a step's batch, before device augmentation, to nan_step_STEP.npz.

  A bad step is detected when its batch has long been freed. Data are deterministic, so the batch is
  read again, which changes the position of `data`.
  """
  index = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
  path = directory / f"nan_step_{step}{index}.npz"
  data.set_state({**data.get_state(), "next_index": step - 1})
  batch = next(data)
  np.savez(path, step=step, **{name: np.asarray(array) for name, array in batch.items()})
  return path
