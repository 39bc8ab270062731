"""One tiny run, built (and so compiled) once for all tests, and functions that read runs."""
import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vitcompact import trees
from vitcompact.run import loop
from vitcompact.train import config as configs

ROOT = pathlib.Path(__file__).parents[1]
PLAN = '{"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}'


def tiny_config() -> ConfigDict:
  """Returns a config with everything that a state can hold (averages, batch norm, taps), tiny."""
  return ConfigDict({
      "total_steps": 40, "batch_size": 16, "eval_batch_size": 184, "checkpoint_every": 20,
      "log_every": 10, "ema_half_life": 0.05, "plan": PLAN,
      "model": {"name": "deit_tiny_patch16_224", "image_size": 8, "patch_size": 4, "width": 16,
                "depth": 2, "heads": 2, "drop_path_rate": 0.1, "dtype": "float32", "remat": False},
      "data": {"augment": "digits", "erase": 0.25, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
      "optim": {"warmup_steps": 5, "clip_norm": 1.0}, "mesh": {"fsdp": 2}})


def weights(**given) -> ConfigDict:
  """Returns a config's `loss`, in which every weight that is not given is 0."""
  settings = {**configs.KEYS, **configs.all_settings()}
  return ConfigDict({key.removeprefix("loss."): 0.0 if setting.is_weight else setting.default
                     for key, setting in settings.items() if key.startswith("loss.")} | given)


@pytest.fixture
def config() -> ConfigDict:
  """The tiny config with every key, unlocked so that settings of methods can be added."""
  return configs.complete(tiny_config())


@functools.cache
def build(config) -> loop.Run:
  """Calls loop.build once for equal configs on equal devices, so each program compiles once."""
  return loop.build(config)


@pytest.fixture(scope="session")
def built() -> loop.Run:
  """The tiny run on 8 devices: 4 for data, times 2 for parameters."""
  return build(loop.resolve(tiny_config()))


@pytest.fixture(scope="session")
def built_on_one() -> loop.Run:
  """The tiny run on one device."""
  config = tiny_config()
  config.mesh.fsdp = 1
  with pytest.MonkeyPatch.context() as patch:
    first = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda: first)
    return loop.build(loop.resolve(config))


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, built):
  """40 uninterrupted steps: (workdir, result)."""
  directory = tmp_path_factory.mktemp("uninterrupted")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build", lambda config: built)
    return directory, loop.train(built.config, directory)


@pytest.fixture
def shared(monkeypatch, built):
  """Runs of the tiny config, and of others with the same step, reuse the programs of `built`."""
  same = ("total_steps", "optim", "ema_half_life")

  def reuse(config):
    assert all(config[key] == built.config[key] for key in same)
    return dataclasses.replace(built, config=config)

  monkeypatch.setattr(loop, "build", reuse)


def lines(directory):
  return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def bits(state):
  state = state.replace(key=jax.random.key_data(state.key))
  return {name: np.asarray(leaf).tobytes() for name, leaf in trees.named_leaves(state).items()}


def contents(directory):
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
