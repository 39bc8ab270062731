"""A NaN changes nothing: the run stops and keeps the batch, or skips so many steps and counts."""
import dataclasses
import types

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_run import lines
from vitcompact.data import pipeline
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
def test_a_skipped_step_changes_its_number_alone(bad):
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


def skipping(run, config, bad):
  """The run, whose steps of these numbers are not finite, guarded as `build` guards them."""
  def step(state, batch):
    number = int(state.step) + 1
    if number in bad:
      metrics = {"loss": np.nan, "accuracy": 0.0, "grad_norm": np.nan, "lr": 0.5}
      return state.replace(step=state.step + 1), metrics | {"skipped": 1}
    state, metrics = run.step_at(0)(state, batch)
    return state, metrics | {"skipped": 0}

  return dataclasses.replace(run, config=loop.resolve(config), step_at=lambda _: step)


@pytest.mark.usefixtures("shared")
def test_skips_are_counted_over_restarts_and_bounded(config, built, tmp_path, monkeypatch):
  config.optim.skip_nonfinite = 2
  monkeypatch.setattr(loop, "build", lambda config: skipping(built, config, {13, 14, 33}))
  loop.train(config, tmp_path, until=20)
  numbers = [line for line in lines(tmp_path) if "lr" in line]
  assert [line["skipped"] for line in numbers] == [0, 2]
  assert np.isfinite(numbers[1]["loss"])
  with pytest.raises(FloatingPointError, match="not finite at step 33, and 2 were skipped"):
    loop.train(config, tmp_path)
  assert (tmp_path / "nan_step_33.npz").is_file()
  config.optim.skip_nonfinite = 3      # the way out that the user has
  assert int(loop.train(config, tmp_path).state.step) == 40
  assert [line["skipped"] for line in lines(tmp_path) if "lr" in line][-1] == 3


def test_the_guard_is_part_of_the_step_when_asked_for(config):
  """Traced only: the metrics of the guarded step have its mark, those of the plain one do not."""
  for most in (0, 1):
    config.optim.skip_nonfinite = most
    run = loop.build(loop.resolve(config))
    batch = {"image": jax.ShapeDtypeStruct((16, 8, 8, 3), np.uint8),
             "label": jax.ShapeDtypeStruct((16,), np.int32)}
    _, metrics = jax.eval_shape(run.step_at(0), run.shapes, batch)
    assert ("skipped" in metrics) == bool(most)


def test_a_nan_is_told_even_where_its_batch_cannot_be_written(built, config):
  data = pipeline.train_batches(config.data, image_size=8, batch_size=16, seed=0)
  under = types.SimpleNamespace(run=built, skipped=0, data=data, directory=guard.pathlib.Path(
      "/dev/null"))
  with pytest.raises(FloatingPointError, match=r"loss is nan at step 4; .* could not be written"):
    loop.check_finite(under, 3, [{"loss": 1.0, "grad_norm": 1.0},
                                 {"loss": np.nan, "grad_norm": 1.0}])
  data.close()


def test_the_batch_that_is_kept_is_the_one_of_that_step(config, tmp_path):
  data = pipeline.train_batches(config.data, image_size=8, batch_size=16, seed=0)
  batches = [next(data) for _ in range(9)]
  with np.load(guard.keep_batch(tmp_path, 4, data)) as kept:
    assert kept["step"] == 4
    for name, array in batches[3].items():
      np.testing.assert_array_equal(kept[name], array)
  data.close()
