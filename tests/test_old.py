"""Files written by older code keep their meaning; tests/old/make_old.py describes them."""
import functools
import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import vitcompact as vc
from tests.old import common
from vitcompact import convert
from vitcompact.plan import upgraded
from vitcompact.run import loop

OLD = pathlib.Path(__file__).parent / "old"


def names_of(pattern):
  return sorted(path.name.split(".")[0] for path in OLD.glob(pattern))


def read(name):
  return json.loads((OLD / name).read_text())


@functools.cache
def logits():
  return dict(np.load(OLD / "logits.npz"))


@pytest.mark.parametrize("name", names_of("models/*.safetensors"))
def test_an_old_model_file_computes_the_same_function(name):
  model, variables = convert.load(OLD / "models" / f"{name}.safetensors")
  assert model.plan == vc.Plan.from_json(read("plans.json")[name])
  assert model.deploy == name.endswith("_folded")
  chosen = {"backends": vc.Execution({1: "tiled"}, chunk=2),
            "ffn_merged": vc.Execution(merged=("blocks_1/mlp/fc2",))}
  assert model.execution == chosen.get(name.removesuffix("_folded"), vc.Execution())
  got, expected = jax.jit(model.apply)(variables, common.images(model)), logits()[name]
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", read("plans.json"))
def test_an_old_plan_is_read_without_loss(name):
  text = read("plans.json")[name]
  plan = vc.Plan.from_json(text)
  assert plan == vc.Plan.from_json(plan.to_json())
  assert json.loads(plan.to_json()) == upgraded(json.loads(text))[0]


@pytest.mark.parametrize("name", [name for name in read("plans.json") if "default" in name])
def test_a_plan_of_bare_method_names_has_the_old_defaults(name):
  written = read("plans.json")[name]
  short = {axis: {"method": spec["method"]} for axis, spec in json.loads(written).items()}
  assert vc.Plan.from_json(json.dumps(short)) == vc.Plan.from_json(written)


@pytest.mark.parametrize("name", names_of("workdirs/*.tar.xz"))
def test_an_old_run_resumes_to_the_same_result(name, tmp_path, monkeypatch):
  """To the same bits, if the machine is of the kind that the run began on."""
  monkeypatch.setattr(jax, "jit", common.jit_without_the_new_flag(jax.jit))
  monkeypatch.chdir(tmp_path)
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: first)
  shutil.copy(OLD / "workdirs" / "dense.safetensors", tmp_path)
  with tarfile.open(OLD / "workdirs" / f"{name}.tar.xz") as tar:
    tar.extractall(filter="data")
  workdir = tmp_path / name
  config = ConfigDict(json.loads((workdir / "config.json").read_text()))
  log = workdir / "metrics.jsonl"
  before = log.read_text()
  end = loop.train(config, workdir)
  assert log.read_text().startswith(before)
  new = [json.loads(line) for line in log.read_text()[len(before):].splitlines()]
  stopped = json.loads(before.splitlines()[-1])["step"]
  assert stopped < new[0]["step"] <= new[-1]["step"] == config.total_steps   # it resumed
  got, expected = common.variables_of(end.state), dict(np.load(OLD / "ends" / f"{name}.npz"))
  assert got.keys() == expected.keys()
  for leaf, array in expected.items():
    np.testing.assert_allclose(got[leaf], array, rtol=1e-4, atol=1e-4, err_msg=leaf)
  recorded = read("made.json")
  if common.machine() == recorded["machine"]:
    assert not [leaf for leaf in expected if got[leaf].tobytes() != expected[leaf].tobytes()]
    assert end.metrics["params_digest"] == recorded["params_digests"][name]
