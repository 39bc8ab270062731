"""Numbers that are not numbers: a run stops at them and keeps the batch, or skips so many steps."""
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

WATCHED = ("loss", "grad_norm")


def keep_finite(train_step):
  """The same train step, which changes nothing where its loss or gradient is not finite.

  The step's number moves on all the same, and with it the data and all randomness. Metrics gain
  "skipped": 1 for such a step, else 0.
  """
  def guarded(state, batch):
    new, metrics = train_step(state, batch)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    return kept.replace(step=new.step), metrics | {"skipped": 1 - finite.astype(jnp.int32)}
  return guarded


def first_bad(first_step: int, metrics: list[dict]) -> tuple[int, str] | None:
  """(step, what) of the first loss or gradient that cannot be trained on and was not skipped."""
  for step, values in enumerate(metrics, first_step):
    for name in WATCHED:
      if not values.get("skipped") and not math.isfinite(values[name]):
        return step, f"{name} is {values[name]} at step {step}"
  return None


def keep_batch(directory: pathlib.Path, step: int, data) -> pathlib.Path:
  """Writes this process's share of a step's batch to nan_step_STEP.npz, as it left the host.

  Steps are found out to be bad when their batch is long gone. Data are deterministic, so they are
  read again; `data` stands elsewhere afterwards.
  """
  index = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
  path = directory / f"nan_step_{step}{index}.npz"
  data.set_state({**data.get_state(), "next_index": step - 1})
  batch = next(data)
  np.savez(path, step=step, **{name: np.asarray(array) for name, array in batch.items()})
  return path
