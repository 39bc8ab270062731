"""A user's own backbone, one file, behaves like any other model: the example of docs/adding.md."""
import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models.own.overlap_vit import VARIANTS
from vitcompact import models, trees

PLANS = {
    "merging": vc.Plan(heads=vc.HMHSA(), tokens=vc.ToMe(r=3), ffn=vc.CFFN()),
    "sparse": vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(factor="both"), attention=vc.Sparsifiner(
        keep=0.5, granularity="block", window=2, min_tokens=0)),
}


@pytest.fixture(autouse=True)
def list_own_model(monkeypatch):
  for name, variant in VARIANTS.items():
    monkeypatch.setitem(models.VARIANTS, name, variant)


def small(plan=None, **fields):
  return vc.create_model("overlap_vit_tiny", plan=plan or vc.Plan(), **{**tiny.SIZES, **fields})


def test_it_is_a_named_model_and_is_counted():
  assert vc.list_models("overlap*") == ["overlap_vit_tiny"]
  width, blocks, kernel = 192, 12, 32 * 32 * 3
  block = 4 * (width * width + width) + 8 * width * width + 5 * width + 4 * width
  head = 2 * width + 1000 * (width + 1)
  assert vc.count(vc.create_model("overlap_vit_tiny")).params == (
      width * (kernel + 1) + blocks * block + head)


@pytest.mark.parametrize("plan", PLANS)
def test_methods_of_every_axis_fold_on_it_to_the_same_function(plan):
  model = small(PLANS[plan])
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = vc.fold(model, variables)
  np.testing.assert_allclose(jax.jit(deploy.apply)(folded, x), jax.jit(model.apply)(variables, x),
                             rtol=1e-4, atol=1e-4)
  shapes = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, shapes) == []


def test_moving_an_object_changes_the_logits():
  """Patches without positions would be an unordered set."""
  model = small()
  variables, x = tiny.init(model), np.zeros((1, 32, 32, 3), np.float32)
  x[:, 10:14, 10:14] = 1      # covered by equally many patches, in the same way, at both positions
  there, moved = jax.jit(model.apply)(variables, np.concatenate([x, np.roll(x, 8, axis=(1, 2))]))
  assert np.abs(there - moved).max() > 1e-4


def test_every_leaf_has_a_rule_and_weights_round_trip_through_pytorch(tmp_path):
  dense = small()
  variables = tiny.init(dense)
  assert trees.first_match(dense.parameter_rules(), variables["params"], may_be_idle=True)
  state = vc.to_torch(dense, variables)
  assert "blocks.0.attn.qkv.weight" in state
  assert trees.digest(vc.from_torch(dense, state)) == trees.digest(variables)
  model = small(PLANS["merging"])
  variables = tiny.init(model)
  assert trees.first_match(model.parameter_rules(), variables["params"], may_be_idle=True)
  vc.save(tmp_path / "own.safetensors", model, variables)
  loaded, loaded_variables = vc.load(tmp_path / "own.safetensors")
  assert loaded == model and trees.digest(loaded_variables) == trees.digest(variables)


def test_features_it_lacks_are_rejected_with_the_reason():
  with pytest.raises(ValueError, match=r"EViT.*needs a class token, which overlap_vit_tiny does"):
    small(vc.Plan(tokens=vc.EViT(0.5, blocks=(0,))))
