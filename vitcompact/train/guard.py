"""Steps whose loss or gradient is not a number, and which then change nothing."""
import jax
import jax.numpy as jnp


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
