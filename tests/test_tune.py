"""Tuning changes the form, never the function; what it chose travels with the model."""
import dataclasses
import importlib

import jax
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import bench, convert, trees

tuning = importlib.import_module("vitcompact.tune")   # `vitcompact.tune` is the function

PLAN = vc.Plan(heads=vc.HMHSA(), tokens=vc.EViT(blocks=(1,), keep=0.5),
               ffn=vc.CFFN(factor="both", rank_ratio=0.25), blocks={0: {"heads": None}})


@pytest.fixture(scope="module")
def folded():
  """(training form, its variables, deployed form, its variables, images)."""
  model = tiny.deit(PLAN)
  variables = tiny.init(model)
  return model, variables, *vc.fold(model, variables), tiny.images(model)


def faster(monkeypatch, *names):
  """Measurements in which these forms are twice as fast as all others, when called by a layer."""
  def rounds_of(functions, **_):
    return {name: [1.0 if name in names else 2.0] * 3 for name in functions}
  monkeypatch.setattr(bench, "rounds_of", rounds_of)


def test_a_tuned_model_is_the_same_function_in_a_file_and_when_folded_again(
    folded, monkeypatch, tmp_path):
  model, variables, deploy, deployed, x = folded
  faster(monkeypatch, "matrix")
  tuned, tuned_variables = vc.tune(deploy, deployed, x)
  assert all(tuned.plan.at(i).ffn.merged == ("fc1", "fc2") for i in range(2))
  assert vc.verify(model, variables, tuned, tuned_variables, x).max_rel <= 1e-5
  asked = jax.eval_shape(tuned.init, jax.random.key(0), x)
  assert trees.differences(tuned_variables, asked) == []
  assert vc.count(tuned).params > vc.count(deploy).params     # rank 6 of 24: dense is larger
  # The choice is in the plan: folding the training form under it gives the same form, untimed.
  again, refolded = vc.fold(model.clone(plan=tuned.plan), variables)
  assert again == tuned and trees.differences(refolded, tuned_variables) == []
  assert vc.verify(tuned, tuned_variables, again, refolded, x).ok
  assert vc.fold(tuned, tuned_variables)[0] == tuned
  convert.save(tmp_path / "tuned.safetensors", tuned, tuned_variables)
  loaded, loaded_variables = convert.load(tmp_path / "tuned.safetensors")
  assert loaded == tuned and trees.digest(loaded_variables) == trees.digest(tuned_variables)
  # Nothing is left to choose, and dense layers go to PyTorch as such.
  assert vc.tune(tuned, tuned_variables, x)[0] == tuned
  assert "blocks.1.mlp.fc2.weight" in vc.to_torch(tuned, tuned_variables)


def test_forms_that_are_no_faster_stay_as_fold_gives_them(folded, monkeypatch):
  _, _, deploy, deployed, x = folded
  faster(monkeypatch, "factors")
  tuned, variables = vc.tune(deploy, deployed, x)
  assert tuned == deploy and trees.digest(variables) == trees.digest(deployed)


def test_layers_of_one_size_are_measured_once_and_chosen_by_layer(folded, monkeypatch):
  _, _, deploy, deployed, x = folded
  layers = tuning.factorised(deploy, deployed, x)
  shapes = {path: layer.shape for path, layer in layers.items()}
  # EViT reduces between the attention and the FFN of block 1: half of 16 patches and one fused.
  assert shapes == {
      ("blocks_0", "mlp", "fc1"): (3, 17, 24), ("blocks_0", "mlp", "fc2"): (3, 17, 96),
      ("blocks_1", "mlp", "fc1"): (3, 10, 24), ("blocks_1", "mlp", "fc2"): (3, 10, 96)}
  asked = []

  def answer(layer, rounds):
    asked.append((layer, rounds))
    return layer.shape == (3, 10, 96)

  monkeypatch.setattr(tuning, "merging_is_faster", answer)
  tuned, variables = vc.tune(deploy, deployed, x, rounds=3)
  assert sorted(asked) == sorted((layer, 3) for layer in layers.values())
  assert tuned.plan.blocks == {**deploy.plan.blocks, 1: {
      "ffn": dataclasses.replace(PLAN.ffn, merged=("fc2",))}}
  assert vc.verify(deploy, deployed, tuned, variables, x).ok


def test_the_two_forms_are_really_run():
  """Compiled and timed: at a rank far above break-even, two factors are twice the work."""
  layer = tuning.Layer(features=64, rank=256, shape=(512, 64), dtype="float32")
  assert tuning.merging_is_faster(layer, rounds=3)
  assert not tuning.merging_is_faster(layer._replace(features=512, shape=(512, 512), rank=4), 3)


def test_only_a_folded_model_is_tuned():
  model = tiny.deit(PLAN)
  with pytest.raises(ValueError, match="not folded; give it what"):
    vc.tune(model, {}, None)


@pytest.mark.parametrize("fields", [{"merged": ("fc1",)}, {"merged": "fc2"}])
def test_only_factorised_layers_can_be_merged(fields):
  with pytest.raises(ValueError, match="layers that are factorised, of \\('fc2',\\)"):
    vc.CFFN(**fields)
