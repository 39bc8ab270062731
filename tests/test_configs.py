"""Every config of configs/ is whole, and builds; the compact ones differ by their plan alone."""
import importlib
import json
import pathlib

import numpy as np
import pytest

import vitcompact as vc
from vitcompact import trees
from vitcompact.train import loop, optim, settings

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name):
  return importlib.import_module(f"configs.{name}")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
  """The folders of ImageNet's 1000 classes, without an image."""
  root = tmp_path_factory.mktemp("imagenet")
  for label in range(1000):
    (root / "train" / f"n{label:08d}").mkdir(parents=True)
  return root


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_and_its_rules_cover_every_parameter(name, imagenet):
  """Shapes only: nothing is allocated or compiled."""
  config = load(name).get_config()
  if config.data.name.startswith("folder:"):
    config.data.name = f"folder:{imagenet}"
  if any(config.loss[key] for key in ("hard", "soft", "logits", "patches")):
    config.teacher.file = "named on the command line.safetensors"
  run = loop.build(loop.resolve(config))
  params = trees.named_leaves(run.shapes.params)
  assert trees.named_leaves(run.shardings.params).keys() == params.keys()
  assert bool(run.shapes.ema_params) == bool(config.ema_half_life)
  assert all(leaf.dtype == np.float32 for leaf in params.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_names_the_command_that_runs_the_file(name):
  words = " ".join(load(name).__doc__.replace("\\", "").split())
  assert f"python main.py --config=configs/{name}.py --workdir=" in words


@pytest.mark.parametrize("compact, dense", [
    ("digits", "digits_dense"), ("compact_deit_t", "deit_t"), ("compact_deit_s", "deit_s"),
    ("compact_deit_b", "deit_b")])
def test_compact_and_dense_differ_in_the_plan_alone(compact, dense):
  plans = []
  for name in (compact, dense):
    config = load(name).get_config()
    plans.append(vc.Plan.parse(config.plan))
    config.plan = ""
    plans.append(json.loads(config.to_json()))
  assert plans[0] == vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
  assert plans[2] == vc.Plan()
  assert plans[1] == plans[3]


def test_the_configs_give_deits_recipe():
  """Peak rate by batch size, epochs in steps, the half-life of its EMA, its groups for mixing."""
  for name, group in (("deit_t", 256), ("deit_s", 256), ("deit_b", 64)):
    config = load(name).get_config()
    assert config.total_steps == 375_300
    assert config.optim.warmup_steps == 6_255
    assert config.optim.learning_rate == pytest.approx(5e-4 * config.batch_size / 512)
    assert optim.ema_decay(config.ema_half_life, config.total_steps) == pytest.approx(
        0.99996, abs=1e-6)
    assert config.batch_size // config.data.replicas == group


def test_every_config_shows_every_key():
  for name in NAMES:
    settings.check(load(name).get_config())
