"""PyTorch in `vitcompact bench`: timm's own network if there is one, otherwise a message.

PyTorch is not installed where these tests run, so most of them use stand-ins for it and for timm.
"""
import contextlib
import importlib.util
import os
import sys
import types

import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import bench, cli, timm_network
from vitcompact.execution import Execution

NAME = "deit_tiny_patch16_224"
EVIT = '{"tokens": {"method": "evit", "keep": 0.5}}'
FACTORS = vc.Plan(ffn=vc.CFFN(factor="both"))


class Tensor(np.ndarray):
  """An array that can be converted to another precision."""

  def to(self, dtype):
    return self


class Network:
  """Accepts weights with the expected names and shapes."""

  def __init__(self, wanted):
    self.wanted = wanted

  def load_state_dict(self, state):
    if {name: array.shape for name, array in state.items()} != self.wanted:
      raise RuntimeError("Error(s) in loading state_dict:\n\tMissing key(s)")

  def eval(self):
    return self

  def to(self, dtype):
    return self

  def __call__(self, images):
    return images


@pytest.fixture
def requests(monkeypatch):
  """Requests made to the stand-ins."""
  return stand_ins(monkeypatch)


def stand_ins(patch) -> dict:
  """Replaces PyTorch and timm, which knows only DeiTs here; returns the requests made to them."""
  seen = {"threads": [], "networks": [], "compiled": 0}

  def create_model(name, *, pretrained, num_classes, in_chans, **sizes):
    assert not pretrained
    seen["networks"].append({"name": name, **sizes})
    names = {"img_size": "image_size", "embed_dim": "width", "num_heads": "heads"}
    model = vc.create_model(name, num_classes=num_classes, in_chans=in_chans, deploy=True,
                            **{names.get(key, key): n for key, n in sizes.items()})
    return Network(timm_network._tensors(model))

  def compile(network):
    seen["compiled"] += 1
    return network

  torch, timm = types.ModuleType("torch"), types.ModuleType("timm")
  torch.float32, torch.bfloat16, torch.compile = "float32", "bfloat16", compile
  torch.set_num_threads, torch.inference_mode = seen["threads"].append, contextlib.nullcontext
  torch.from_numpy = lambda array: array
  torch.randn = lambda *shape: np.zeros(shape, np.float32).view(Tensor)
  timm.is_model, timm.create_model = lambda name: name.startswith("deit_"), create_model
  patch.setitem(sys.modules, "torch", torch)
  patch.setitem(sys.modules, "timm", timm)
  return seen


def rows_of(printed: str) -> list[list[str]]:
  """Returns the first two cells of each row of the table."""
  return [[cell.strip() for cell in line.strip("|").split("|")][:2]
          for line in printed.splitlines()[2:] if line.startswith("|")]


def test_dense_models_are_timed_and_plans_without_a_timm_network_named(requests):
  printed = command.succeeds(
      "bench", NAME, "--plan", EVIT, "--image-size", 32, "--batch", 1, "--rounds", 1, "--threads",
      1, "--runtime", "xla,torch,torch-bf16,torch-compile")
  assert rows_of(printed) == [
      ["dense", "XLA"], [EVIT, "XLA"], ["dense", "PyTorch"], ["dense", "PyTorch, bfloat16"],
      ["dense", "PyTorch, compiled"]]
  about, note = printed.splitlines()[-2:]
  assert "threads 1" in about
  assert note == f"PyTorch has no row for {EVIT}: timm has no network of its plan"
  assert set(requests["threads"]) == {1} and requests["compiled"] == 1
  assert requests["networks"] == 3 * [{"name": NAME, "img_size": 32}]


def test_sizes_that_differ_from_the_named_model_reach_timm(requests, tmp_path):
  model = tiny.deit()
  path = tmp_path / "dense.safetensors"
  vc.save(path, *vc.fold(model, tiny.init(model)))
  assert rows_of(command.succeeds("bench", path, "--batch", 1, "--rounds", 1, "--runtime", "torch")
                 ) == [["dense", "PyTorch"], [str(path), "PyTorch"]]
  assert requests["networks"][-1] == {"name": NAME, "img_size": 32, "patch_size": 8,
                                      "embed_dim": 24, "depth": 2, "num_heads": 4}


def test_the_thread_count_is_set_only_while_xla_starts(monkeypatch):
  name = cli.bench.XLA_THREADS
  for before in (None, "7"):
    monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
    for count, expected in ((2, "2"), (None, before)):
      with cli.bench.xla_threads(count):
        assert os.environ.get(name) == expected
      assert os.environ.get(name) == before


def test_the_refusal_says_why_timm_has_no_network(requests):
  """EViT has the dense model's weights, but computes something else."""
  refusal = timm_network.refusal
  assert refusal(tiny.deit(deploy=True)) is None
  for plan in (vc.Plan(tokens=vc.EViT(keep=0.5, blocks=(1,))), vc.Plan(heads=vc.HMHSA()), FACTORS):
    assert refusal(tiny.deit(plan, deploy=True)) == "timm has no network of its plan"
  merged = tuple(f"blocks_{i}/mlp/{layer}" for i in range(2) for layer in ("fc1", "fc2"))
  half, whole = (tiny.deit(FACTORS, deploy=True, execution=Execution(merged=merged[:end]))
                 for end in (3, 4))
  assert refusal(half) == "timm has no network of its plan" and refusal(whole) is None
  timm_network.forward(whole, tiny.init(whole), 1)
  assert "has no network named" in refusal(vc.create_model("lvvit_s"))
  assert refusal(tiny.deit(layer_scale=0.1)) == (
      f"timm's network of {NAME} has no option for layer_scale=0.1")


@pytest.mark.parametrize("name", ["shvit_s1", "nextvit_small"])
def test_models_whose_deployed_form_timm_lacks_are_named(name, requests, monkeypatch):
  monkeypatch.setattr(sys.modules["timm"], "is_model", lambda _: True)
  assert timm_network.refusal(vc.create_model(name, deploy=True)) == (
      "timm has no network of its deployed form, whose norms are folded into other layers")
  assert timm_network.refusal(vc.create_model("pvt_v2_b0", deploy=True)) is None


def test_nothing_left_to_time_is_an_error(requests):
  assert ("timm has no network named lvvit_s; give --runtime xla, ort "
          "or openvino") in command.fails("bench", "lvvit_s", "--runtime", "torch")


@pytest.mark.parametrize("name", ["torch", "timm"])
def test_missing_packages_are_named_before_anything_is_compiled(name, requests, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.setattr(bench, "compiled", None)
  assert (f"needs {name}, which is not installed; pip install torch timm"
          ) in command.fails("bench", NAME, "--runtime", "xla,torch")


def test_a_broken_pytorch_is_not_called_missing(requests, monkeypatch):
  def broken():
    raise ImportError("cannot import name 'Mlp' from 'timm.layers'", name="timm.layers")

  monkeypatch.setattr(timm_network, "import_timm", broken)
  assert ("PyTorch or timm is installed and does not import (cannot import name 'Mlp' from "
          "'timm.layers'); pip install --upgrade torch timm"
          ) in command.fails("bench", NAME, "--runtime", "torch")


@pytest.mark.parametrize("name,fields", [
    (NAME, {}), (NAME, {"image_size": 48, "in_chans": 1, "num_classes": 7, "depth": 2}),
    ("deit3_small_patch16_224", {"depth": 2}), ("vit_small_patch14_dinov2", {"depth": 1})])
def test_timms_network_computes_the_same_logits(name, fields):
  if not all(importlib.util.find_spec(name) for name in ("torch", "timm")):
    pytest.skip("no torch, or no timm")
  torch, _ = timm_network.import_timm()
  model = vc.create_model(name, deploy=True, **fields)
  variables = tiny.init(model, spread=0.05)
  shape = (2, *np.broadcast_to(model.image_size, 2), model.in_chans)
  images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  with torch.inference_mode():
    got = timm_network.network(model, variables)(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  expected = tiny.apply(model, variables, images)
  np.testing.assert_allclose(got.numpy(), expected, atol=1e-4 * np.abs(expected).max())
