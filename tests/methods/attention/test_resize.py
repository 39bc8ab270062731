"""Predictors are tied to positions: for another image size they are resized, or it is an error."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import convert, trees


def test_predictor_for_another_token_count_is_rejected_with_a_way_out():
  plan = vc.Plan(attention=vc.Sparsifiner())
  small, large = tiny.deit(plan, depth=1), tiny.deit(plan, depth=1, image_size=64)
  variables = tiny.init(small)
  variables["params"]["pos_embed"] = tiny.init(large)["params"]["pos_embed"]
  with pytest.raises(ValueError, match=r"for 17 tokens at rank 2.*convert\.resized.*rank=2"):
    jax.eval_shape(large.apply, variables, tiny.images(large))


def test_resized_model_keeps_the_rank_of_its_predictors():
  """A new predictor for 65 tokens would have rank 10."""
  model = tiny.deit(vc.Plan(attention=vc.Sparsifiner()), depth=1)
  large, variables = convert.resized(model, tiny.init(model), image_size=64)
  assert large.plan.attention == vc.Sparsifiner(rank=2)
  shapes = jax.eval_shape(large.init, jax.random.key(0), tiny.images(large))
  assert trees.differences(variables, shapes) == []


def test_resizing_preserves_predictors_that_are_linear_over_the_grid():
  small = tiny.deit(vc.Plan(attention=vc.Sparsifiner(rank=2)), depth=1)
  variables = tiny.init(small)
  y, x = np.mgrid[:4, :4] + 0.5
  rows = np.concatenate([[[7., 8.]], np.stack([y, x - y], axis=-1).reshape(16, 2)])
  variables["params"]["blocks_0"]["links"] = {"down": jnp.asarray(rows), "up": jnp.asarray(rows)}
  _, resized = convert.resized(small, variables, image_size=64)
  links = resized["params"]["blocks_0"]["links"]
  assert links["up"].shape == (65, 2)
  np.testing.assert_array_equal(links["up"][0], [7, 8])
  inner = np.asarray(links["up"][1:]).reshape(8, 8, 2)[1:-1, 1:-1]     # edges are clamped
  y, x = (np.mgrid[1:7, 1:7] + 0.5) / 2
  np.testing.assert_allclose(inner, np.stack([y, x - y], axis=-1), atol=1e-5)
  # Sums over four times as many tokens keep their scale, prefix tokens included.
  np.testing.assert_allclose(links["down"], links["up"] / 4, rtol=1e-6)


@pytest.mark.parametrize("name,fields", [
    ("deit_tiny_distilled_patch16_224", {**tiny.SIZES, "plan": "block"}),
    ("lvvit_t", {"depth": 1, "patch_size": 8}), ("pvt_tiny", {"depths": (1, 1, 1, 1)}),
    ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    ("nextvit_small", {"depths": (1, 1, 1, 1), "periods": (0, 1, 1, 1)})])
def test_resized_variables_have_the_tree_of_the_target_model(name, fields):
  """For every family, in training form, with the rank of each stage."""
  fields = {"image_size": 64, **fields}
  spec = vc.Sparsifiner(granularity=fields.pop("plan", "token"), min_tokens=0)
  model = vc.create_model(name, plan=vc.Plan(attention=spec, ffn=vc.CFFN()),
                          **{**fields, "image_size": 64})
  old = tiny.init(model)
  other, variables = convert.resized(model, old, image_size=(96, 160))
  shapes = jax.eval_shape(other.init, jax.random.key(0), tiny.images(other, 1))
  assert trees.differences(old, shapes)
  assert trees.differences(variables, shapes) == []
