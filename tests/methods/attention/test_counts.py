"""The cost of a mask predictor and of the pairs it keeps, executed and ideal, compared with the
published columns."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from vitcompact.methods.attention.sparsifiner import Sparsifiner

# Published MHSA MFLOPs: score and value products, and the predictor.
DEIT_S = {1.0: 431.1, 0.9: 396.8, 0.8: 360.6, 0.7: 324.6, 0.6: 290.3, 0.5: 254.2, 0.4: 218.0,
          0.3: 183.6, 0.2: 147.5, 0.1: 111.4, 0.05: 93.3, 0.01: 78.9}
LVVIT_S = {0.5: 339.7, 0.25: 221.7, 0.1: 149.5}
# Shares of nonzero basis entries. Not published: implied by the columns.
DENSITY = {"deit_small_patch16_224": 0.6975, "lvvit_s": 0.7285}


def basis_of(density: float, name: str):
  """Variables where only the basis matters: a share `density` of it is above the threshold."""
  model = vc.create_model(name, plan=vc.Plan(attention=Sparsifiner()))
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
  variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape),
                           jax.eval_shape(model.init, jax.random.key(0), images))
  up = np.zeros(197 * 32)
  up[:round(density * up.size)] = 0.1
  for i in range(model.depth):
    variables["params"][f"blocks_{i}"]["links"]["up"] = jnp.asarray(up.reshape(197, 32))
  return variables


# LV-ViT's blocks are those of DeiT-S: the same formula, with four more blocks.
@pytest.mark.parametrize("name,depth,column", [
    ("deit_small_patch16_224", 12, DEIT_S),
    pytest.param("lvvit_s", 16, LVVIT_S, marks=pytest.mark.slow)])
def test_ideal_count_matches_the_published_column_within_a_tenth(name, depth, column):
  variables = basis_of(DENSITY[name], name)
  keeps = sorted(column) if depth == 16 else [0.5, 0.01]
  for keep in keeps:
    model = vc.create_model(name, plan=vc.Plan(attention=Sparsifiner(keep=keep)))
    count = vc.count(model, variables=variables)
    assert count.ideal_attention_macs / 1e6 == pytest.approx(column[keep], abs=0.1)


def test_count_follows_a_formula_that_gives_every_row_of_the_column():
  n, dh, h, layers, rank = 197, 64, 6, 12, 32

  def formula(keep, density):
    predictor = 2 * n * dh + (2 * n - 1) * dh * rank + 8 * density * n * (n - 1)
    return layers * h * (2 * (n - 1) * dh * Sparsifiner(keep=keep).budget(n) + predictor)

  model = vc.create_model("deit_small_patch16_224", plan=vc.Plan(attention=Sparsifiner(keep=0.25)))
  count = vc.count(model)
  assert count.ideal_attention_macs == formula(0.25, 1)
  for keep, published in DEIT_S.items():
    assert formula(keep, DENSITY["deit_small_patch16_224"]) / 1e6 == pytest.approx(published,
                                                                                   abs=0.1)
  # Masking skips nothing: all scores are executed, and so is the dense basis.
  predictor = (2 * n - 1) * dh * rank + rank * n * (n - 1)
  assert count.attention_macs == layers * h * (2 * n * n * dh + predictor)
  dense = vc.count(vc.create_model("deit_small_patch16_224"))
  assert count.macs - count.attention_macs == dense.macs - dense.attention_macs
  assert count.ideal_macs - count.ideal_attention_macs == dense.macs - dense.attention_macs


@pytest.mark.parametrize("name,variant,params", [
    ("deit_small_patch16_224", "code", 22_251_880), ("deit_small_patch16_224", "paper", 22_201_960),
    ("lvvit_s", "code", 268_288)])
def test_predictor_parameters_match_the_formula(name, variant, params):
  count = vc.count(vc.create_model(name, plan=vc.Plan(attention=Sparsifiner(variant=variant))))
  base = vc.count(vc.create_model(name)).params if name == "lvvit_s" else 0
  assert count.params - base == params
