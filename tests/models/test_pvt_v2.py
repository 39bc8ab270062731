"""PVT v2: the published counts, timm's logits, any image size, init, errors."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity, pyramids
from vitcompact import trees
from vitcompact.block import make_ffn
from vitcompact.models import pyramid

# (parameters, MACs / 1e9) dense, heads, ffn, both: from the reconstruction's specification.
ROWS = {
    "pvt_v2_b0": [(3_666_760, 0.5661), (3_485_724, 0.5472), (3_357_512, 0.4964),
                  (3_176_476, 0.4776)],
    "pvt_v2_b1": [(14_009_000, 2.1084), (13_286_396, 2.0410), (12_772_008, 1.8298),
                  (12_049_404, 1.7624)],
    "pvt_v2_b2": [(25_362_856, 4.0267), (24_015_952, 3.8831), (22_989_224, 3.4736),
                  (21_642_320, 3.3299)],
    "pvt_v2_b3": [(45_238_696, 6.8973), (42_905_824, 6.6196), (41_021_864, 5.9829),
                  (38_688_992, 5.7052)],
    "pvt_v2_b4": [(62_556_072, 10.1011), (59_417_700, 9.6864), (56_727_464, 8.7359),
                  (53_589_092, 8.3212)],
    "pvt_v2_b5": [(81_956_008, 11.7173), (77_782_516, 11.1756), (74_466_472, 10.2818),
                  (70_292_980, 9.7401)],
    "pvt_v2_b2_li": [(22_553_512, 3.889)],
}
RUNS = parity.runs("pvt_v2")


@pytest.mark.parametrize("name", tiny.named(ROWS, "pvt_v2_b2", "pvt_v2_b2_li"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  pyramids.check_counts(name, ROWS[name])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_logits_match_timm(run):
  assert parity.difference(run) < 1e-4


@pytest.mark.parametrize("epsilon,wrong", [("EPSILON", 1e-5), ("CONV_EPSILON", 1e-6)])
def test_probe_weights_reveal_a_wrong_epsilon(monkeypatch, epsilon, wrong):
  monkeypatch.setattr(pyramid, epsilon, wrong)
  probed = next(run for run in RUNS if run.name.endswith("probed"))
  assert parity.difference(probed, retrace=True) > 0.1


@pytest.mark.parametrize("variant", ["pvt_v2_b2", "pvt_v2_b2_li"])
def test_weights_round_trip_through_pytorch_bit_for_bit(variant):
  run = next(run for run in RUNS if run.model.variant == variant)
  variables = vc.from_torch(run.model, run.state)
  back = vc.to_torch(run.model, variables)
  assert back.keys() == run.state.keys()
  assert all(np.array_equal(back[name], run.state[name]) for name in back)
  authors_state = vc.to_torch(run.model, variables, names="authors")
  assert trees.digest(vc.from_torch(run.model, authors_state)) == trees.digest(variables)
  assert {"patch_embed1.proj.weight", "patch_embed4.norm.bias", "block3.1.attn.sr.weight",
          "block1.0.mlp.dwconv.dwconv.weight", "norm2.weight", "head.bias"} <= authors_state.keys()
  assert len(authors_state) == len(back)


def test_images_of_any_valid_size_run_without_another_model():
  model = pyramids.pvt("pvt_v2_b2")
  variables = tiny.init(model)
  for size in ((64, 64), (29, 70), (130, 31)):
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape == (2, 5)
    assert trees.differences(jax.eval_shape(model.init, jax.random.key(0), images), variables) == []


def test_new_factorised_ffn_has_the_output_spread_of_the_dense_one():
  sizes = {"widths": (64, 64, 64, 64), "heads": (1, 1, 1, 1), "mlp_ratios": (4, 4, 4, 4)}
  tokens = jax.random.normal(jax.random.key(0), (2, 256, 64))
  for name in ("pvt_v2_b2", "pvt_v2_b2_li"):
    spread = {}
    for label, plan in (("dense", vc.Plan()), ("compact", vc.Plan(ffn=vc.CFFN()))):
      model = pyramids.pvt(name, plan, **sizes)
      mlp = make_ffn(model.sites()[0], plan.ffn)
      # In training mode: at inference, wrong initial statistics and a wrong scale would cancel.
      init = jax.jit(functools.partial(mlp.init_with_output, train=True))
      spread[label] = float(init(jax.random.key(1), tokens)[0].std())
    assert 0.8 < spread["compact"] / spread["dense"] < 1.25, (name, spread)


def test_initialisation_matches_the_published_one():
  model = pyramids.pvt("pvt_v2_b2", **{**pyramids.SHORT, "widths": (64, 80), "num_classes": 64})
  params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), tiny.images(model))["params"]
  for name, leaf in trees.named_leaves(jax.device_get(params)).items():
    if name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif name.endswith("bias"):
      assert (leaf == 0).all(), name
    else:
      # Convolutions: 2 / (kernel area * output channels per group); depthwise groups have one.
      area = leaf.shape[0] * leaf.shape[1]
      conv = (2 / (area * (1 if "mixer" in name else leaf.shape[-1]))) ** 0.5
      expected = conv if leaf.ndim == 4 else 0.02
      assert 0.85 * expected < leaf.std() < 1.15 * expected, name


def test_stochastic_depth_rates_match_the_authors():
  assert {name: vc.create_model(name).drop_path_rate for name in ROWS} == {
      "pvt_v2_b0": 0.1, "pvt_v2_b1": 0.1, "pvt_v2_b2": 0.1, "pvt_v2_b2_li": 0.1,
      "pvt_v2_b3": 0.3, "pvt_v2_b4": 0.3, "pvt_v2_b5": 0.3}


@pytest.mark.parametrize("make,words", [
    (lambda: vc.create_model("pvt_v2_b0", image_size=28), "sides of at least 29"),
    (lambda: vc.create_model("pvt_v2_b2_li", image_size=(0, 5)), "at least 1, or a pair"),
    (lambda: pyramids.pvt("pvt_v2_b2").init(jax.random.key(0), jnp.zeros((1, 64, 20, 3))),
     "images of shape (1, 64, 20, 3): 20 is too small"),
    (lambda: pyramids.pvt("pvt_v2_b2").init(jax.random.key(0), jnp.zeros((64, 64, 3))),
     "takes (B, height, width, 3)"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)
