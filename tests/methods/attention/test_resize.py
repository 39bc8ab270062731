"""Predictors are tied to positions: another image size is refused, or they are resized."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees
from vitcompact.methods.attention.resize import resize_links


def test_a_predictor_for_another_token_count_is_refused_with_the_way_out():
  plan = vc.Plan(links=vc.Sparsifiner())
  small, large = tiny.deit(plan, depth=1), tiny.deit(plan, depth=1, image_size=64)
  variables = tiny.init(small)
  variables["params"]["pos_embed"] = tiny.init(large)["params"]["pos_embed"]
  with pytest.raises(ValueError, match=r"for 17 tokens at rank 2.*resize_links.*rank=2"):
    jax.eval_shape(large.apply, variables, tiny.images(large))
  with pytest.raises(ValueError, match="rank 2 cannot become rank 10"):
    resize_links(variables, small, large)


def test_resized_predictors_fit_and_keep_what_is_linear_over_the_grid():
  plan = vc.Plan(links=vc.Sparsifiner(rank=2))
  small, large = tiny.deit(plan, depth=1), tiny.deit(plan, depth=1, image_size=64)
  variables = tiny.init(small)
  y, x = np.mgrid[:4, :4] + 0.5
  rows = np.concatenate([[[7., 8.]], np.stack([y, x - y], axis=-1).reshape(16, 2)])
  variables["params"]["blocks_0"]["links"] = {"down": jnp.asarray(rows), "up": jnp.asarray(rows)}
  variables["params"]["pos_embed"] = jnp.tile(rows, (1, 12))[None]
  resized = resize_links(variables, small, large)
  links = resized["params"]["blocks_0"]["links"]
  assert links["up"].shape == (65, 2)
  np.testing.assert_array_equal(links["up"][0], [7, 8])
  inner = np.asarray(links["up"][1:]).reshape(8, 8, 2)[1:-1, 1:-1]     # edges are held
  y, x = (np.mgrid[1:7, 1:7] + 0.5) / 2
  np.testing.assert_allclose(inner, np.stack([y, x - y], axis=-1), atol=1e-5)
  np.testing.assert_allclose(links["down"][1:], links["up"][1:] / 4, rtol=1e-6)
  np.testing.assert_allclose(resized["params"]["pos_embed"][0], jnp.tile(links["up"], (1, 12)))


@pytest.mark.parametrize("name,fields", [
    ("deit_tiny_distilled_patch16_224", {**tiny.SIZES, "plan": "block"}),
    ("lvvit_t", {"depth": 1, "patch_size": 8}), ("pvt_tiny", {}), ("pvt_v2_b0", {}),
    ("nextvit_small", {"depths": (1, 1, 1, 1), "periods": (0, 1, 1, 1)})])
def test_what_comes_out_is_what_the_other_model_asks_for(name, fields):
  granularity = fields.pop("plan", "token")
  plan = vc.Plan(links=vc.Sparsifiner(rank=2, granularity=granularity, min_tokens=0))
  old, new = (vc.create_model(name, **{**fields, "plan": plan, "image_size": size})
              for size in (64, (96, 160)))
  shapes = [jax.eval_shape(model.init, jax.random.key(0), tiny.images(model, 1))
            for model in (old, new)]
  assert trees.differences(shapes[0], shapes[1])
  assert trees.differences(jax.eval_shape(lambda v: resize_links(v, old, new), shapes[0]),
                           shapes[1]) == []
