"""A config that cannot mean what it says is refused before anything is computed or written."""
import pytest

from vitcompact.run import workdir
from vitcompact.train import settings


def test_unknown_keys_list_close_names(config):
  config.optim.learning_rat = 1.0
  with pytest.raises(ValueError, match=r"config.optim.learning_rat; did you mean learning_rate"):
    settings.check(config)


def test_missing_keys_are_named(config):
  del config.optim.clip_norm
  with pytest.raises(ValueError, match=r"missing config.optim.clip_norm"):
    settings.check(config)


@pytest.mark.parametrize("changes, words", [
    ({"total_steps": 0}, "config.total_steps=0 must be at least 1"),
    ({"eval_params": "best"}, "'best' is neither 'raw' nor 'ema'"),
    ({"eval_params": "ema", "ema_half_life": 0.0}, "needs averages"),
    ({"data": {"eval_fit": "squash"}}, "eval_fit='squash' is neither 'crop' nor 'warp', which squ"),
    ({"ema_half_life": -1.0}, "is a fraction of the run"),
    ({"accumulate": 3}, "batch_size=16 does not divide into config.accumulate=3"),
    ({"accumulate": 2}, "replicas=1 must be a multiple of config.accumulate=2"),
])
def test_values_that_contradict_are_refused(config, changes, words):
  config.update(changes)
  with pytest.raises(ValueError, match=words):
    settings.check(config)


def test_a_workdir_is_made_with_its_parents_and_claimed_once(config, tmp_path):
  directory = tmp_path / "runs" / "one"
  workdir.claim(directory, config)
  text = (directory / "config.json").read_text()
  workdir.claim(directory, config)
  assert [path.name for path in directory.iterdir()] == ["config.json"]
  config.seed = 1
  with pytest.raises(ValueError, match=r"seed is 0 there and 1 here.*Use another --workdir"):
    workdir.claim(directory, config)
  assert (directory / "config.json").read_text() == text


def test_a_workdir_that_is_a_file_is_refused(config, tmp_path):
  (tmp_path / "file").write_text("precious")
  with pytest.raises(ValueError, match="is a file"):
    workdir.claim(tmp_path / "file", config)


def test_a_config_that_is_no_json_is_refused(config, tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="not readable as JSON"):
    workdir.claim(tmp_path, config)
