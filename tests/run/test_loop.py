"""A run resumes exactly where it stopped, keeps its good checkpoints, and reports what happened."""
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.tiny_run import bits, contents, lines
from vitcompact import trees
from vitcompact.run import loop

pytestmark = pytest.mark.usefixtures("shared")


@pytest.fixture
def copy(uninterrupted, tmp_path):
  """A copy of the finished run that a test may change."""
  return shutil.copytree(uninterrupted[0], tmp_path / "copy")


def test_forty_steps_equal_twenty_and_twenty_more_to_the_last_bit(config, uninterrupted, tmp_path):
  """Parameters, moments, averages, batch statistics, step and key, on 8 devices."""
  half = loop.train(config, tmp_path, until=20)
  assert int(half.state.step) == 20
  assert "test_accuracy" not in half.metrics
  assert bits(half.state) != bits(uninterrupted[1].state)
  resumed = loop.train(config, tmp_path)
  assert bits(resumed.state) == bits(uninterrupted[1].state)
  assert resumed.metrics["params_digest"] == uninterrupted[1].metrics["params_digest"]


def test_one_device_resumes_to_the_same_bits_and_agrees_with_eight(
    config, built_on_one, uninterrupted, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "build", lambda config: built_on_one)
  config = built_on_one.config
  once = loop.train(config, tmp_path / "once")
  loop.train(config, tmp_path / "twice", until=20)
  assert bits(loop.train(config, tmp_path / "twice").state) == bits(once.state)
  losses = [[line["loss"] for line in lines(directory) if "lr" in line]
            for directory in (tmp_path / "once", uninterrupted[0])]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_new_process_of_main_resumes_to_the_same_bits(config, uninterrupted, copy, tmp_path):
  shutil.rmtree(copy / "checkpoints" / "40")
  (tmp_path / "tiny.py").write_text(f"""
from ml_collections import ConfigDict
def get_config():
  return ConfigDict({config.to_dict()!r})
""")
  command = [sys.executable, "main.py", f"--config={tmp_path / 'tiny.py'}", f"--workdir={copy}"]
  root = pathlib.Path(loop.__file__).parents[2]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "resumed at step 20" in done.stdout
  assert not done.stderr
  trained = lines(uninterrupted[0])[-1]
  assert {name: lines(copy)[-1][name] for name in trained} == trained
  saved = [read(directory / "checkpoints" / "40" / "meta" / "metadata")
           for directory in (copy, uninterrupted[0])]
  assert saved[0]["leaves"] == saved[1]["leaves"]   # checksums of every leaf


def read(path):
  return json.loads(path.read_text())


def test_a_finished_run_takes_no_further_step(config, uninterrupted, copy):
  again = loop.train(config, copy)
  assert bits(again.state) == bits(uninterrupted[1].state)
  assert lines(copy)[-1] == lines(uninterrupted[0])[-1]


def test_the_log_has_all_numbers_and_ends_with_the_digest(uninterrupted, built):
  directory, result = uninterrupted
  log = lines(directory)
  training = [line for line in log if "lr" in line]
  assert [line["step"] for line in training] == [10, 20, 30, 40]
  assert set(training[0]) == {"step", "loss", "accuracy", "grad_norm", "lr", "images_per_second",
                              "data_wait"}
  assert [line["step"] for line in log if "val_accuracy" in line] == [20, 40, 40]
  assert log[-1]["mode"] == "train"
  assert log[-1]["params_digest"] == trees.digest(result.state.params)
  assert result.variables["params"] is result.state.params
  assert list(directory.glob("events.out.tfevents.*"))
  assert json.loads((directory / "config.json").read_text()) == json.loads(built.config.to_json())


def test_evaluation_reads_the_newest_checkpoint(config, uninterrupted, copy):
  result = loop.evaluate(config, copy)
  trained, last = lines(uninterrupted[0])[-1], lines(copy)[-1]
  assert last == result.metrics | {"step": 40}
  assert last | {"mode": "train"} == trained


def test_eval_params_ema_evaluates_the_averaged_parameters(config, uninterrupted, copy):
  config.eval_params = "ema"
  result = loop.evaluate(config, copy)
  assert result.metrics["params_digest"] == trees.digest(result.state.ema_params)
  assert result.metrics["params_digest"] != lines(uninterrupted[0])[-1]["params_digest"]
  assert result.metrics["test_loss"] != lines(uninterrupted[0])[-1]["test_loss"]


def test_every_image_of_a_split_is_evaluated_once(built, uninterrupted):
  """The batch size of evaluation, and so its padding, does not affect the result."""
  variables = uninterrupted[1].variables
  sums = loop.evaluate_split(built, variables, "test")
  correct = sums["test_accuracy"] * 360
  assert correct == pytest.approx(round(correct), abs=1e-4)


def poison(run, config, step, spoil):
  """Returns the run with a step that makes its state NaN "before" or "after" it takes the loss."""
  def ruined(state):
    return state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))

  def train_step(state, batch):
    now = int(state.step) + 1 == step
    state, metrics = run.step_at(0)(ruined(state) if now and spoil == "before" else state, batch)
    return ruined(state) if now and spoil == "after" else state, metrics

  return dataclasses.replace(run, config=config, step_at=lambda _: train_step)


@pytest.mark.parametrize("step, spoil, words", [
    (27, "before", "loss is nan at step 27; stopped"),
    (40, "after", "the state after step 40 is not finite; it was not saved"),
])
def test_a_nan_stops_the_run_and_leaves_the_last_good_checkpoint(
    built, copy, monkeypatch, step, spoil, words):
  shutil.rmtree(copy / "checkpoints" / "40")
  before = contents(copy / "checkpoints")
  monkeypatch.setattr(loop, "build", lambda config: poison(built, config, step, spoil))
  with pytest.raises(FloatingPointError, match=words):
    loop.train(built.config, copy)
  assert contents(copy / "checkpoints") == before
  assert [path.name for path in copy.glob("nan_step_*")] == ["nan_step_27.npz"] * (step == 27)


def test_a_damaged_checkpoint_is_skipped_only_on_request(config, uninterrupted, copy, capsys):
  """Training again from the checkpoint before it gives the same bits."""
  data = [path for path in (copy / "checkpoints/40/state").rglob("d/*") if path.is_file()]
  for path in data:
    path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(ValueError, match=r"/40 cannot be read.*\(step 20\).*restore=last_good"):
    loop.train(config, copy)
  evaluated = loop.evaluate(config, copy, restore_from="last_good")
  assert int(evaluated.state.step) == 20
  assert (copy / "checkpoints" / "40").is_dir()      # evaluation moves nothing
  again = loop.train(config, copy, restore_from="last_good")
  assert "WARNING" in capsys.readouterr().err
  assert bits(again.state) == bits(uninterrupted[1].state)
  assert (copy / "checkpoints" / "damaged.40").is_dir()
  assert any("falling back" in line.get("fallback", "") for line in lines(copy))


def test_without_an_intact_checkpoint_a_run_does_not_start_over(config, copy):
  for path in (copy / "checkpoints").glob("*/meta/metadata"):
    path.write_text("{}")
  with pytest.raises(ValueError, match=r"none of the checkpoints \[20, 40\] of .* is intact"):
    loop.train(config, copy, restore_from="last_good")


def test_a_workdir_of_another_config_is_refused_and_left_alone(config, copy):
  before = contents(copy)
  config.optim.weight_decay, config.data.mixup = 0.1, 0.0
  with pytest.raises(ValueError, match=r"data.mixup was 0.8 and is now 0.0; "
                                       r"optim.weight_decay was 0.05 and is now 0.1"):
    loop.train(config, copy)
  assert contents(copy) == before


def test_settings_that_do_not_affect_the_result_may_change(config, copy):
  config.log_every, config.data.workers, config.keep_last = 5, 0, 3
  assert int(loop.train(config, copy).state.step) == 40


def test_a_checkpoint_of_another_model_is_refused(config, copy, monkeypatch):
  config.model.width = 32
  monkeypatch.undo()   # build the other model
  before = contents(copy / "checkpoints")
  with pytest.raises(ValueError, match=r"checkpoints/40 holds another state: .*float32\["):
    loop.train(config, copy, allow=["model.width"])
  assert contents(copy / "checkpoints") == before


def test_evaluating_an_empty_workdir_is_refused_and_creates_nothing(config, tmp_path):
  with pytest.raises(ValueError, match="holds no checkpoints; train first"):
    loop.evaluate(config, tmp_path / "none")
  assert not (tmp_path / "none").exists()
