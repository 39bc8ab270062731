"""PVT v1: the published counts, the authors' logits, positions at any size, init, errors."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity, pyramids
from vitcompact import trees
from vitcompact.models import pyramid

# (parameters, MACs / 1e9) dense, heads, ffn, both: from the reconstruction's specification.
ROWS = {
    "pvt_tiny": [(13_229_288, 1.9329), (12_506_684, 1.8650), (11_992_296, 1.6535),
                 (11_269_692, 1.5856)],
    "pvt_small": [(24_485_864, 3.8157), (23_138_960, 3.6712), (22_112_232, 3.2614),
                  (20_765_328, 3.1169)],
    "pvt_medium": [(44_208_104, 6.6592), (41_875_232, 6.3806), (39_991_272, 5.7436),
                   (37_658_400, 5.4650)],
    "pvt_large": [(61_369_320, 9.8138), (58_230_948, 9.3982), (55_540_712, 8.4474),
                  (52_402_340, 8.0318)],
}
RUNS = parity.runs("pvt")


@pytest.mark.parametrize("name", tiny.named(ROWS, "pvt_small"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  pyramids.check_counts(name, ROWS[name])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_logits_match_the_authors_code(run):
  assert parity.difference(run) < 1e-4


@pytest.mark.parametrize("epsilon,wrong", [("EPSILON", 1e-5), ("CONV_EPSILON", 1e-6)])
def test_probe_weights_reveal_a_wrong_epsilon(monkeypatch, epsilon, wrong):
  monkeypatch.setattr(pyramid, epsilon, wrong)
  probed = next(run for run in RUNS if run.name.endswith("probed"))
  assert parity.difference(probed, retrace=True) > 0.1


def test_weights_round_trip_through_pytorch_bit_for_bit():
  run = RUNS[0]
  for names in ("timm", "authors"):
    back = vc.to_torch(run.model, vc.from_torch(run.model, run.state), names=names)
    assert back.keys() == run.state.keys()
    assert all(np.array_equal(back[name], run.state[name]) for name in back)


def test_positions_are_resized_at_run_time_as_they_are_at_loading():
  """A model given images of another size gives what a model made for that size gives."""
  native, other = RUNS[0], next(run for run in RUNS if run.images.shape[1] != 64)
  assert native.images.shape != other.images.shape
  variables = vc.from_torch(native.model, native.state)
  got = jax.jit(native.model.apply)(variables, other.images)
  np.testing.assert_allclose(got, other.expected, atol=1e-4)
  # At twice the size, stage 2 has as many patches as stage 1 has stored positions.
  images = jnp.tile(native.images, (1, 2, 2, 1))
  assert jax.eval_shape(native.model.apply, variables, images).shape == (2, 7)


def test_initialisation_matches_the_published_one():
  model = pyramids.pvt(**{**pyramids.SHORT, "widths": (64, 80), "num_classes": 64})
  params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), tiny.images(model))["params"]
  leaves = trees.named_leaves(jax.device_get(params))
  for name, leaf in leaves.items():
    if "/proj/" in name:      # torch's default for convolutions: uniform in 1/sqrt(fan in)
      owner = leaves[name.rsplit("/", 1)[0] + "/kernel"]
      bound = np.prod(owner.shape[:3]) ** -0.5
      assert 0.9 * bound < np.abs(leaf).max() <= bound, name
    elif name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif name.endswith("bias"):
      assert (leaf == 0).all(), name
    else:
      assert 0.85 * 0.02 < leaf.std() < 1.15 * 0.02, name


def test_without_a_classifier_the_normalised_class_token_is_returned():
  model = pyramids.pvt(**{**pyramids.SHORT, "num_classes": 0})
  variables, x = tiny.init(model), tiny.images(model)
  assert "head" not in variables["params"]
  variables["params"]["norm"] = {"scale": jnp.ones(20), "bias": jnp.zeros(20)}
  token = tiny.apply(model, variables, x)
  assert token.shape == (3, 20)
  np.testing.assert_allclose(token.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(token.std(-1), 1, atol=1e-3)


def test_stochastic_depth_rates_match_the_authors():
  assert {name: vc.create_model(name).drop_path_rate for name in ROWS} == {
      "pvt_tiny": 0.1, "pvt_small": 0.1, "pvt_medium": 0.3, "pvt_large": 0.3}


@pytest.mark.parametrize("make,words", [
    (lambda: vc.create_model("pvt_tiny", image_size=230),
     "image_size=230: 230 is not a multiple of 32"),
    (lambda: vc.create_model("pvt_tiny", image_size=(224, 16)), "nearest multiple: 32"),
    (lambda: vc.create_model("pvt_tiny", sr_ratios=(8, 4, 2, 2)), "must end in 1"),
    (lambda: pyramids.pvt().init(jax.random.key(0), jnp.zeros((1, 64, 60, 3))),
     "images of shape (1, 64, 60, 3): 60 is not a multiple of 32"),
    (lambda: pyramids.pvt().init(jax.random.key(0), jnp.zeros((1, 64, 64, 1))), "in_chans="),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)
