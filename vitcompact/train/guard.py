"""Skips the updates of steps whose loss or gradient is not finite."""
import jax
import jax.numpy as jnp


def keep_finite(train_step):
  """A train step that changes only the step number if its loss or gradient is not finite.

  As the step number advances, so do the data and all randomness. Metrics get "skipped": 1 for such
  a step, else 0.
  """
  def guarded(state, batch):
    new, metrics = train_step(state, batch)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    return kept.replace(step=new.step), metrics | {"skipped": 1 - finite.astype(jnp.int32)}
  return guarded
