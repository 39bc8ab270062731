"""A step with a non-finite loss or gradient changes nothing."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact.run import loop
from vitcompact.train import guard


@flax.struct.dataclass
class State:
  step: jax.Array
  weight: jax.Array
  key: jax.Array


def toy_step(state, batch):
  gradient = state.weight * batch
  new = state.replace(step=state.step + 1, weight=state.weight - gradient,
                      key=jax.random.fold_in(state.key, 1))
  return new, {"loss": batch.sum(), "grad_norm": jnp.sqrt(jnp.sum(gradient ** 2))}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_skipped_step_changes_only_the_step_number(bad):
  state = State(jnp.array(3), jnp.array([1.0, 2.0]), jax.random.key(0))
  step = jax.jit(guard.keep_finite(toy_step))
  new, metrics = step(state, jnp.array([bad, 1.0]))
  assert metrics["skipped"] == 1
  assert new.step == 4
  assert new.weight.tolist() == [1.0, 2.0]
  assert jax.random.key_data(new.key).tolist() == jax.random.key_data(state.key).tolist()
  good, metrics = step(state, jnp.array([0.5, 1.0]))
  expected, _ = toy_step(state, jnp.array([0.5, 1.0]))
  assert metrics["skipped"] == 0
  assert good.weight.tolist() == expected.weight.tolist() != [1.0, 2.0]


def test_guard_is_part_of_the_step_on_request(config):
  """Traced only: the guarded step has an additional metric, the plain one does not."""
  for allowed in (0, 1):
    config.optim.skip_nonfinite = allowed
    run = loop.build(loop.resolve(config))
    batch = {"image": jax.ShapeDtypeStruct((16, 8, 8, 3), np.uint8),
             "label": jax.ShapeDtypeStruct((16,), np.int32)}
    _, metrics = jax.eval_shape(run.step_at(0), run.shapes, batch)
    assert ("skipped" in metrics) == bool(allowed)
