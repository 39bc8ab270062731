"""AdamW with DeiT's schedule and decay mask; Muon and SGD."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import vitcompact as vc
from vitcompact import trees
from vitcompact.train import optim

SECTION = ConfigDict({
    "name": "adamw", "schedule": "step", "epoch_steps": 1, "cooldown_steps": 0, "rates": (),
    "learning_rate": 0.1, "warmup_steps": 0, "warmup_learning_rate": 0.1,
    "final_learning_rate": 0.1, "weight_decay": 0.05, "b1": 0.9, "b2": 0.999, "eps": 1e-8,
    "clip_norm": 0.0, "adaptive_clip": 0.0})


def main_optimizer(section, params, mask):
  return optim.make_optimizers(section, 10, params, mask).main


@pytest.mark.parametrize("epoch, rate", [
    (0, 1e-6), (1, 2.008e-4), (4, 8.002e-4), (5, 9.99322e-4), (100, 7.525e-4), (150, 5.05e-4),
    (299, 1.002714e-5), (300, 1e-5), (310, 1e-5)])
def test_schedule_has_deits_values(epoch, rate):
  got = optim.warmup_cosine(epoch, peak=1e-3, warmup_steps=5, total_steps=300, start=1e-6,
                            final=1e-5)
  assert got == pytest.approx(rate, rel=1e-4)


def two_updates(optimizer, params, gradients):
  state = optimizer.init(params)
  seen = []
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen


def test_adamw_has_decoupled_decay_and_bias_correction():
  optimizer = main_optimizer(SECTION, {"w": jnp.ones(())}, {"w": True})
  seen = two_updates(optimizer, {"w": jnp.ones(())}, [{"w": jnp.array(g)} for g in (0.5, -0.25)])
  assert [float(p["w"]) for p in seen] == pytest.approx([0.89500004, 0.86389136], rel=2e-6)


def test_gradients_are_clipped_by_global_norm_before_adam():
  section = SECTION.copy_and_resolve_references()
  section.clip_norm = 1.0
  params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
  optimizer = main_optimizer(section, params, {"a": True, "b": True})
  _, state = optimizer.update({"a": jnp.array(3.0), "b": jnp.array(4.0)}, optimizer.init(params),
                              params)
  moments = optax.tree_utils.tree_get(state, "mu")
  assert moments["a"] == pytest.approx(0.1 * 0.6)
  assert moments["b"] == pytest.approx(0.1 * 0.8)


def tiny_model():
  return vc.create_model("deit_tiny_distilled_patch16_224", image_size=8, patch_size=4, width=8,
                         depth=1, heads=2, num_classes=3,
                         plan=vc.Plan(heads=vc.HMHSA(layout="grid"), ffn=vc.CFFN()))


def test_exactly_the_kernels_and_the_distillation_token_decay():
  model = tiny_model()
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  mask = trees.named_leaves(optim.decay_mask(params, model.parameter_rules()))
  assert {name for name, decays in mask.items() if decays} == {
      "dist_token", "patch_embed/proj/kernel", "head/kernel", "head_dist/kernel",
      *(f"blocks_0/attn/{part}/kernel" for part in ("query", "key", "value", "out")),
      "blocks_0/mlp/fc1/kernel",
      *(f"blocks_0/mlp/fc2/{factor}/kernel" for factor in ("a0", "a1", "b0", "b1"))}
  assert {name for name, decays in mask.items() if not decays} >= {
      "cls_token", "pos_embed", "head/bias", "norm/scale",
      "blocks_0/attn/query/bias", "blocks_0/attn/hallucinate/query_taps",
      "blocks_0/attn/hallucinate/key_gain", "blocks_0/mlp/fc2/a0_norm/scale",
      "blocks_0/mlp/fc2/alpha"}


def unit_norm(name, x):
  """In PyTorch's layout: the norm of each row of a weight, or of a whole other tensor."""
  if not name.endswith("kernel"):
    return np.linalg.norm(x)
  rows = x.reshape(len(x), -1) if "query" in name else x.reshape(-1, x.shape[-1])
  return np.linalg.norm(rows, axis=0).reshape(x.shape[1:] if "query" in name else x.shape[-1])


CLIPPED = {"pos_embed": (1, 5, 4), "attn/query/kernel": (4, 2, 3), "attn/query/bias": (2, 3),
           "attn/out/kernel": (2, 3, 4), "conv/kernel": (3, 3, 1, 4), "fc/kernel": (4, 6),
           "norm/scale": (4,), "small/kernel": (4, 6)}


def test_adaptive_clipping_bounds_each_outputs_gradient_by_its_weights():
  """As timm's adaptive_clip_grad: max(norm of the weights, 1e-3) times the factor."""
  rng = np.random.default_rng(0)
  params, gradients = ({name: rng.standard_normal(shape).astype(np.float32)
                        for name, shape in CLIPPED.items()} for _ in range(2))
  params["norm/scale"] *= 0
  gradients["small/kernel"] *= 1e-3
  clip = optim.adaptive_clip(0.02)
  got, _ = clip.update(gradients, clip.init(params), params)
  for name, gradient in gradients.items():
    limit = 0.02 * np.maximum(unit_norm(name, params[name]), 1e-3)
    expected = gradient * np.minimum(1, limit / unit_norm(name, gradient))
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, err_msg=name)
    assert (name == "small/kernel") == np.array_equal(got[name], gradient)
  assert np.linalg.norm(got["norm/scale"]) == pytest.approx(2e-5)
  optax_clip = optax.adaptive_grad_clip(0.02)
  optax_clip, _ = optax_clip.update(gradients, optax_clip.init(params), params)
  for name in ("conv/kernel", "fc/kernel", "norm/scale", "small/kernel"):
    np.testing.assert_allclose(got[name], optax_clip[name], rtol=1e-5, err_msg=name)


def test_adaptive_clipping_happens_before_adam_and_is_off_by_default():
  params, states = {"fc/kernel": jnp.ones((4, 1))}, {}
  for factor in (0.0, 0.02):
    section = SECTION.copy_and_resolve_references()
    section.adaptive_clip = factor
    optimizer = main_optimizer(section, params, {"fc/kernel": True})
    _, states[factor] = optimizer.update({"fc/kernel": jnp.full((4, 1), 3.0)},
                                         optimizer.init(params), params)
  moment = {factor: optax.tree_utils.tree_get(state, "mu")["fc/kernel"][0, 0]
            for factor, state in states.items()}
  assert moment == {0.0: pytest.approx(0.1 * 3), 0.02: pytest.approx(0.1 * 0.02)}
  # A run begun before clipping existed has no place for it in its state.
  assert hasattr(states[0.0], "inner_states") and not hasattr(states[0.02], "inner_states")


def test_undecayed_leaves_get_no_weight_decay():
  params = {"kernel": jnp.full(3, 2.0), "taps": jnp.full(3, 2.0)}
  updated = {}
  for decay in (0.0, 0.5):
    section = SECTION.copy_and_resolve_references()
    section.weight_decay = decay
    optimizer = main_optimizer(section, params, {"kernel": True, "taps": False})
    updated[decay] = two_updates(optimizer, params, [jax.tree.map(jnp.ones_like, params)])[0]
  np.testing.assert_array_equal(updated[0.0]["taps"], updated[0.5]["taps"])
  np.testing.assert_allclose(updated[0.0]["kernel"] - updated[0.5]["kernel"], 0.1 * 0.5 * 2.0,
                             rtol=1e-5)


def test_ema_decay_is_scaled_to_the_length_of_the_run():
  assert optim.ema_decay(0.0461729, 375_300) == pytest.approx(0.99996, abs=1e-8)
  assert optim.ema_decay(0.05, 400) ** 20 == pytest.approx(0.5)


@pytest.mark.parametrize("name, values", [
    ("step", {10: 0.5, 20: 0.9045085, 50: 0.5, 99: 2.467e-4}),
    ("epoch", {9: 0.0, 19: 0.5, 59: 0.5, 60: 0.3454915}),
    ("late_epoch", {15: 0.0, 25: 0.5, 69: 0.5, 70: 0.3454915}),
    ("after_warmup", {10: 10 / 19, 19: 1.0, 20: 1.0, 60: 0.5})])
def test_schedule_has_the_given_rates_and_ends_with_its_cool_down(name, values):
  """20 warm-up steps, 100 steps before a cool-down of 10, epochs of 10 steps; from 0 to 1 to 0."""
  section = SECTION.copy_and_resolve_references()
  section.update(schedule=name, learning_rate=1.0, warmup_learning_rate=0.0, epoch_steps=10,
                 final_learning_rate=0.0, warmup_steps=20, cooldown_steps=10)
  rate = optim.schedule(section, 110)
  for step, expected in values.items():
    assert rate(step) == pytest.approx(expected, rel=1e-3, abs=1e-6), step
  lag = 10 * (name == "late_epoch")
  assert rate(99 + lag) > 0 and rate(100 + lag) == pytest.approx(0, abs=1e-6) == rate(109 + lag)


def test_sgd_has_nesterov_momentum_and_adds_the_decay_to_the_gradient():
  section = SECTION.copy_and_resolve_references()
  section.update(name="sgd", weight_decay=0.5)
  params = {"kernel": jnp.array(2.0), "taps": jnp.array(2.0)}
  optimizer = main_optimizer(section, params, {"kernel": True, "taps": False})
  [new] = two_updates(optimizer, params, [jax.tree.map(jnp.ones_like, params)])
  assert new["kernel"] == pytest.approx(2 - 0.1 * (1 + 0.5 * 2) * 1.9)
  assert new["taps"] == pytest.approx(2 - 0.1 * 1.9)


HIDDEN = {"blocks_0/attn/query/kernel": (6, 2, 3), "blocks_0/attn/out/kernel": (2, 3, 6),
          "blocks_0/mlp/fc1/kernel": (6, 12)}
OTHERS = {"head/kernel": (6, 4), "aux_head/kernel": (6, 4), "blocks_0/attn/query/bias": (2, 3),
          "patch_embed/proj/kernel": (2, 2, 3, 6), "pos_embed": (1, 5, 6), "norm/scale": (6,)}


def test_muon_orthogonalises_matrix_updates_and_leaves_the_rest_to_adamw():
  """A matrix update has nearly equal singular values, and a root mean square of 0.2 times AdamW's;
  matrices are reshaped to (inputs, outputs)."""
  section = SECTION.copy_and_resolve_references()
  section.update(name="muon", weight_decay=0.0)
  rng = np.random.default_rng(0)
  params, gradients = ({name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
                        for name, shape in (HIDDEN | OTHERS).items()} for _ in range(2))
  params, gradients = trees.nested(params), trees.nested(gradients)
  optimizer = main_optimizer(section, params, jax.tree.map(lambda _: True, params))
  [new] = two_updates(optimizer, params, [gradients])
  updates = trees.named_leaves(jax.tree.map(jnp.subtract, new, params))
  for name in HIDDEN:
    matrix = np.asarray(updates[name]).reshape((6, -1) if name.count("out") == 0 else (-1, 6))
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values.max() < 2 * values.min(), name    # the gradient's ratio is 15 or more
    assert np.sqrt(np.mean(matrix ** 2)) == pytest.approx(0.1 * 0.2, rel=0.25), name
    assert np.sum(matrix * np.asarray(trees.named_leaves(gradients)[name]).reshape(
        matrix.shape)) < 0, name
  for name in OTHERS:
    np.testing.assert_allclose(np.abs(updates[name]), 0.1, rtol=1e-4, err_msg=name)


def test_muon_applies_weight_decay_exactly_to_decayed_leaves():
  section = SECTION.copy_and_resolve_references()
  section.update(name="muon", weight_decay=0.5)
  params = trees.nested({name: jnp.full(shape, 2.0) for name, shape in (HIDDEN | OTHERS).items()})
  mask = jax.tree.map(lambda x: x.ndim > 1, params)
  [new] = two_updates(main_optimizer(section, params, mask), params,
                      [jax.tree.map(jnp.zeros_like, params)])
  for name, leaf in trees.named_leaves(new).items():
    np.testing.assert_allclose(leaf, 2.0 * (1 - 0.1 * 0.5 * (leaf.ndim > 1)), rtol=1e-6,
                               err_msg=name)
