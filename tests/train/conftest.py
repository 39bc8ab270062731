"""One tiny run, built (and so compiled) once for all tests of training."""
import dataclasses
import functools
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from vitcompact.run import loop

ROOT = pathlib.Path(__file__).parents[2]
PLAN = '{"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}'


def tiny_config() -> ConfigDict:
  """Everything that a state can hold (averages, batch norm, taps), as small as it gets."""
  return ConfigDict({
      "seed": 0, "init_from": "", "total_steps": 40, "batch_size": 16, "accumulate": 1,
      "eval_batch_size": 184, "checkpoint_every": 20, "keep_last": 2, "log_every": 10,
      "ema_half_life": 0.05, "eval_params": "raw", "plan": PLAN,
      "model": {"name": "deit_tiny_patch16_224", "image_size": 8, "patch_size": 4, "width": 16,
                "depth": 2, "heads": 2, "drop_path_rate": 0.1, "dtype": "float32", "remat": False},
      "data": {"name": "digits", "augment": "digits", "workers": 0, "erase": 0.25,
               "eval_fit": "crop", "eval_crop": 0.0, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
               "replicas": 1, "repeats": 1, "on_bad": "stop", "max_bad": 0},
      "loss": {"labels": 1.0, "patch_labels": 1.0, "hard": 0.0, "soft": 0.0, "temperature": 1.0,
               "logits": 0.0, "patches": 0.0, "patch_error": "square", "kept_ratio": 0.0,
               "consistency": 0.0, "companion_r": 7},
      "teacher": {"file": "", "name": ""},
      "reconstruct": {"steps": 0, "weight": 0.01, "learning_rate": 3e-4, "warmup_steps": 0,
                      "warmup_learning_rate": 0.0, "final_learning_rate": 2e-4},
      "keep_warmup": {"start": 0, "steps": 0},
      "optim": {"name": "adamw", "schedule": "step", "epoch_steps": 1, "cooldown_steps": 0,
                "rates": (), "learning_rate": 1e-3, "warmup_steps": 5, "warmup_learning_rate": 1e-6,
                "final_learning_rate": 1e-5, "weight_decay": 0.05, "b1": 0.9, "b2": 0.999,
                "eps": 1e-8, "clip_norm": 1.0,
                "skip_nonfinite": 0},
      "mesh": {"data": -1, "fsdp": 2, "tensor": 1},
  })


@pytest.fixture
def config() -> ConfigDict:
  return tiny_config()


@functools.cache
def build(config) -> loop.Run:
  """loop.build, once for equal configs on equal devices: what it jits, compiles once."""
  return loop.build(config)


@pytest.fixture(scope="session")
def built() -> loop.Run:
  """The tiny run on 8 devices: 4 for data, times 2 for parameters."""
  return build(loop.resolve(tiny_config()))


@pytest.fixture(scope="session")
def built_alone() -> loop.Run:
  """The tiny run on one device."""
  config = tiny_config()
  config.mesh.fsdp = 1
  with pytest.MonkeyPatch.context() as patch:
    first = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda: first)
    return loop.build(loop.resolve(config))


@pytest.fixture(scope="session")
def straight(tmp_path_factory, built):
  """40 steps without a stop: (workdir, result)."""
  directory = tmp_path_factory.mktemp("straight")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build", lambda config: built)
    return directory, loop.train(built.config, directory)


@pytest.fixture
def shared(monkeypatch, built):
  """Runs of the tiny config, and of others with the same step, use what `built` compiled."""
  same = ("total_steps", "optim", "ema_half_life")

  def reuse(config):
    assert all(config[key] == built.config[key] for key in same)
    return dataclasses.replace(built, config=config)

  monkeypatch.setattr(loop, "build", reuse)
