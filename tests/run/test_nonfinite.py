"""A NaN changes no state: the run stops and saves the batch, or skips the step and counts it."""
import dataclasses
import pathlib
import types

import numpy as np
import pytest

from tests.tiny_run import lines
from vitcompact.data import pipeline
from vitcompact.run import loop, nonfinite


def skipping(run, config, bad):
  """Returns the run with non-finite steps at the numbers in `bad`, guarded as by `build`."""
  def step(state, batch):
    number = int(state.step) + 1
    if number in bad:
      metrics = {"loss": np.nan, "accuracy": 0.0, "grad_norm": np.nan, "lr": 0.5}
      return state.replace(step=state.step + 1), metrics | {"skipped": 1}
    state, metrics = run.step_at(0)(state, batch)
    return state, metrics | {"skipped": 0}

  return dataclasses.replace(run, config=loop.resolve(config), step_at=lambda _: step)


@pytest.mark.usefixtures("shared")
def test_skips_are_counted_across_restarts_and_limited(config, built, tmp_path, monkeypatch):
  config.optim.skip_nonfinite = 2
  monkeypatch.setattr(loop, "build", lambda config: skipping(built, config, {13, 14, 33}))
  monkeypatch.setattr(loop, "check_first_step", lambda run: None)   # these steps are not jitted
  loop.train(config, tmp_path, until=20)
  numbers = [line for line in lines(tmp_path) if "lr" in line]
  assert [line["skipped"] for line in numbers] == [0, 2]
  assert np.isfinite(numbers[1]["loss"])
  with pytest.raises(FloatingPointError, match="not finite at step 33, and 2 were skipped"):
    loop.train(config, tmp_path)
  assert (tmp_path / "nan_step_33.npz").is_file()
  config.optim.skip_nonfinite = 3      # the user's remedy
  assert int(loop.train(config, tmp_path).state.step) == 40
  assert [line["skipped"] for line in lines(tmp_path) if "lr" in line][-1] == 3


def test_a_nan_is_reported_even_if_its_batch_cannot_be_saved(built, config):
  data = pipeline.train_batches(config.data, image_size=8, batch_size=16, seed=0)
  run_state = types.SimpleNamespace(run=built, skipped=0, data=data,
                                    directory=pathlib.Path("/dev/null"))
  with pytest.raises(FloatingPointError, match=r"loss is nan at step 4; .* could not be written"):
    nonfinite.check(run_state, 3, [{"loss": 1.0, "grad_norm": 1.0},
                                 {"loss": np.nan, "grad_norm": 1.0}])
  data.close()


def test_the_saved_batch_is_that_of_the_step_with_the_nan(config, tmp_path):
  data = pipeline.train_batches(config.data, image_size=8, batch_size=16, seed=0)
  batches = [next(data) for _ in range(9)]
  with np.load(nonfinite.keep_batch(tmp_path, 4, data)) as kept:
    assert kept["step"] == 4
    for name, array in batches[3].items():
      np.testing.assert_array_equal(kept[name], array)
  data.close()
