"""Folding does not change the function, and verify would notice if it did."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees

PLANS = [
    vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()),
    vc.Plan(heads=vc.HMHSA(layout="grid", rank=2), ffn=vc.CFFN(rep="scale", branches=3)),
    vc.Plan(heads=vc.HMHSA(site="logits"), ffn=vc.CFFN(factor="both", rank_ratio=0.25)),
    vc.Plan(ffn=vc.CFFN(rep="none", avg_skip=False), blocks={1: {"ffn": None}}),
    vc.Plan(),
]


@pytest.mark.parametrize("plan", PLANS)
def test_fold_keeps_the_function_with_random_leaves_and_statistics(plan):
  model = tiny.deit(plan)
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = vc.fold(model, variables)
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 1e-5 and proof.ok and proof.first_difference is None
  assert proof.top1_agreement == 1 and proof.images == 3
  expected_shapes = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, expected_shapes) == []
  again, twice = vc.fold(deploy, folded)
  assert again == deploy and trees.digest(twice) == trees.digest(folded)


def test_fold_is_pure_and_can_be_traced():
  model = tiny.deit(PLANS[0])
  variables = tiny.init(model)
  before = trees.digest(variables)
  eager = vc.fold(model, variables)[1]
  traced = jax.jit(lambda v: vc.fold(model, v)[1])(variables)
  assert trees.digest(variables) == before
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), traced, eager)


@pytest.mark.parametrize("leaf", ["fc2/b/bias", "fc2/a/kernel", "fc2/b/kernel"])
def test_verify_names_the_first_block_with_a_difference(leaf):
  model = tiny.deit(PLANS[0])
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = vc.fold(model, variables)
  leaves, name = trees.named_leaves(folded), f"params/blocks_1/mlp/{leaf}"
  broken = trees.nested({**leaves, name: leaves[name].at[..., 0].add(0.01)})
  proof = vc.verify(model, variables, deploy, broken, x)
  assert proof.first_difference == "blocks_1" and not proof.ok and proof.max_abs > 1e-4
  broken = trees.nested({**leaves, name: leaves[name] * jnp.nan})
  proof = vc.verify(model, variables, deploy, broken, x)
  assert proof.first_difference == "blocks_1" and not proof.ok


def test_compact_accepts_only_a_dense_model():
  model = tiny.deit(PLANS[0])
  with pytest.raises(ValueError, match="starts from a dense, unfolded model"):
    vc.compact(model, tiny.init(model), vc.Plan())


@pytest.mark.parametrize("fields", [
    {"heads": vc.HMHSA()}, {"tokens": vc.EViT(keep=0.5, blocks=(1,))}, {"tokens": vc.ToMe(r=4)},
    {"attention": vc.Sparsifiner(keep=0.3)},
    {"heads": vc.HMHSA(), "attention": vc.Sparsifiner(keep=0.5), "ffn": vc.CFFN(factor="both"),
     "tokens": vc.EViT(keep=0.5, blocks=(1,))}], ids=lambda fields: "-".join(fields))
def test_batch_norms_start_at_the_statistics_of_the_compact_model(fields):
  """On the calibration images, the first training step computes the same as evaluation."""
  model = tiny.deit(drop_path_rate=0.0, remat=len(fields) > 1)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=16)
  small, got = vc.compact(model, variables, vc.Plan(**{"ffn": vc.CFFN(), **fields}), images=x)
  train, _ = tiny.apply(small, got, x, train=True, mutable=["batch_stats"])
  logits = tiny.apply(small, got, x)
  assert float(logits.std()) > 0.5
  np.testing.assert_allclose(train, logits, atol=1e-4)


def test_calibration_images_reduce_the_error_of_compacting():
  model = tiny.deit()
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=16)
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=0.4))
  expected = tiny.apply(model, variables, x)

  def error(images):
    small, got = vc.compact(model, variables, plan, images=images)
    return jnp.linalg.norm(tiny.apply(small, got, x) - expected), small, got

  with pytest.warns(UserWarning, match="without calibration images"):
    from_weights, _, _ = error(None)
  fitted, small, got = error(x)
  assert fitted < 0.9 * from_weights
  train, _ = small.clone(drop_path_rate=0.0).apply(got, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(train, tiny.apply(small, got, x), rtol=0.02, atol=0.02)
