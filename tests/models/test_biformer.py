"""BiFormer, the backbone: the published counts, the authors' logits, folding, what it rejects."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity
from vitcompact import layers, trees
from vitcompact.models import biformer_blocks
from vitcompact.models.nextvit import Head

# (parameters, MACs / 1e9): from the specification.
ROWS = {"biformer_tiny": (13_142_760, 2.2159), "biformer_small": (25_536_232, 4.4636),
        "biformer_base": (56_804_968, 9.7590), "biformer_stl": (28_372_552, 4.5739)}
COMPACT = vc.Plan(heads=vc.HMHSA(layout="grid", rank=2), ffn=vc.CFFN(factor="both"))


def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0), tiny.images(model))


@functools.cache
def random_inputs(model):
  return tiny.init(model), tiny.images(model)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, variables, images):
  return tiny.apply(model, variables, images)


@pytest.mark.parametrize("name", tiny.named(ROWS, "biformer_tiny", "biformer_stl"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  params, gmacs = ROWS[name]
  count = vc.count(vc.create_model(name))
  assert count.params == params and abs(count.macs / 1e9 / gmacs - 1) < 1e-4
  assert count.ideal_macs == count.macs     # padding, or dense scores under a mask, would add MACs


@pytest.mark.parametrize("run", parity.runs("biformer"), ids=lambda run: run.name)
def test_logits_match_the_authors_code(run):
  assert parity.difference(run) < 1e-6 * max(1, 1.5 * np.abs(run.expected).max())


@pytest.mark.parametrize("place", [(layers, "BATCH_EPSILON", 1e-6),
                                   (biformer_blocks, "EPSILON", 1e-5)])
def test_probe_weights_reveal_a_wrong_epsilon(place, monkeypatch):
  module, name, value = place
  monkeypatch.setattr(module, name, value)
  if name == "BATCH_EPSILON":
    wrong = functools.partial(layers.BatchNorm, epsilon=value)
    monkeypatch.setattr(biformer_blocks, "BatchNorm", wrong)
    monkeypatch.setattr(layers, "BatchNorm", wrong)
  probed = next(run for run in parity.runs("biformer") if run.name.endswith("probed"))
  assert parity.difference(probed, retrace=True) > 1e-3


def test_weights_round_trip_through_pytorch_bit_for_bit():
  for run in parity.runs("biformer")[::4]:
    variables = vc.from_torch(run.model, run.state)
    state = vc.to_torch(run.model, variables)
    assert state.keys() == {name for name in run.state if "num_batches" not in name}
    for name, array in state.items():
      np.testing.assert_array_equal(array, run.state[name])


def test_compact_model_is_restored_from_its_file(tmp_path):
  model = tiny.biformer(COMPACT)
  variables, _ = random_inputs(model)
  vc.save(tmp_path / "a.safetensors", model, variables)
  loaded, restored = vc.load(tmp_path / "a.safetensors")
  assert loaded == model and trees.digest(restored) == trees.digest(variables)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
def test_folding_keeps_the_function_and_leaves_no_batch_norm(name):
  model = tiny.biformer(COMPACT, name)
  variables, images = random_inputs(model)
  deploy, folded = model.clone(deploy=True), jax.jit(lambda v: vc.fold(model, v)[1])(variables)
  assert folded.keys() == {"params"} and trees.differences(folded, shapes_of(deploy)) == []
  left = {name.split("/")[-2] for name in trees.named_leaves(folded) if "norm" in name}
  assert left == {"norm1", "norm2"}
  proof = vc.verify(model, variables, deploy, folded, images, tolerance=3e-5)
  assert proof.ok and proof.first_difference is None, proof
  again, twice = vc.fold(deploy, folded)
  assert again == deploy and trees.digest(twice) == trees.digest(folded)


def test_without_a_classifier_the_norm_of_the_pooled_features_remains():
  model = tiny.biformer(num_classes=0)
  variables, images = random_inputs(model)
  deploy, folded = tiny.fold(model, variables)
  np.testing.assert_allclose(logits(deploy, folded, images), logits(model, variables, images),
                             rtol=1e-4, atol=1e-4)
  assert set(folded["batch_stats"]) == {"head"} and isinstance(deploy.submodules()["head"], Head)


def test_compacting_keeps_the_head_order_and_everything_the_plan_does_not_touch():
  """With or without images, because parts added channel by channel fix the order of heads."""
  dense = tiny.biformer()
  variables, images = random_inputs(dense)
  plan = vc.Plan(heads=vc.HMHSA(layout="grid"))
  (model, one), (_, other) = (vc.compact(dense, variables, plan, images=x) for x in (None, images))
  assert trees.digest(one) == trees.digest(other)
  assert trees.differences(one, shapes_of(model)) == []
  old, new = trees.named_leaves(variables), trees.named_leaves(one)
  for name in old:
    expected = old[name]
    if "/query/" in name or "/key/" in name:
      expected = expected[..., :2, :]
    np.testing.assert_array_equal(new[name], expected, err_msg=name)


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, variables, images):
  """Returns gradients of a training loss, and the statistics after the step."""
  def loss(params):
    out, state = tiny.apply(model, {**variables, "params": params}, images, train=True,
                            rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    return jnp.sum(out ** 2), state["batch_stats"]

  return jax.grad(loss, has_aux=True)(variables["params"])


def test_remat_changes_memory_not_results():
  model = tiny.biformer(drop_path_rate=0.5)
  variables, images = random_inputs(model)
  remat = model.clone(remat=True)
  assert "remat" in str(jax.make_jaxpr(lambda v: gradients(remat, v, images))(variables))
  for one, other in zip(*(jax.tree.leaves(gradients(m, variables, images)) for m in (model, remat)),
                        strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * max(1, np.abs(other).max()))
  before = variables["batch_stats"]
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).all()), before,
                                          gradients(model, variables, images)[1])))


def test_bfloat16_is_close_to_float32():
  model = tiny.biformer()
  variables, images = tiny.init(model, spread=0.1), tiny.images(model)
  expected, got = (logits(m, variables, images) for m in (model, model.clone(dtype="bfloat16")))
  assert got.dtype == jnp.float32
  got, expected = np.asarray(got), np.asarray(expected)
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


def test_stochastic_depth_grows_linearly():
  model, rates = vc.create_model("biformer_small"), {}

  def watch(next_fun, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      rates.setdefault(context.module.path[0], []).append(context.module.rate)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    shapes_of(model)
  for i, rate in enumerate(np.linspace(0, 0.15, 30)):
    np.testing.assert_allclose(rates[f"blocks_{i}"], [rate, rate])
  assert [vc.create_model(name).drop_path_rate for name in ROWS] == [0.1, 0.15, 0.4, 0.1]


def test_features_and_maps_of_a_rectangular_image():
  model = tiny.biformer(image_size=(32, 48), in_chans=1)
  out = jax.eval_shape(functools.partial(vc.features, model, maps=True), shapes_of(model),
                       tiny.images(model))
  assert {name: leaf.shape for name, leaf in out.features.items()} == {
      "stage_1": (3, 8, 12, 16), "stage_2": (3, 4, 6, 24)}
  assert {name: leaf.shape for name, leaf in out.maps.items()} == {
      "blocks_0": (3, 4, 96, 96), "blocks_1": (3, 4, 24, 24)}


def test_proposed_head_methods_filter_over_the_grid():
  model = tiny.biformer()
  report = vc.measure(model, *random_inputs(model), sensitivity="none")
  heads = [[option.method for option in row["options"] if option.axis == "heads"]
           for row in report.blocks]
  assert [{method.layout for method in options} for options in heads] == [{"grid"}, {"map"}]
  assert not [option for option in report.blocks[0]["options"] if option.axis == "attention"]


def test_maps_show_which_regions_are_attended_to():
  model = tiny.biformer()
  variables, images = random_inputs(model)
  maps = jax.device_get(tiny.features(model, variables, images, True).maps)
  assert ((maps["blocks_0"] > 0).sum(axis=-1) == 32).all()     # 2 of 4 regions of 16 tokens
  assert (maps["blocks_1"] > 0).all()
  regions = (maps["blocks_0"] > 0).any(axis=1).reshape(3, 2, 4, 2, 4, 2, 4, 2, 4)
  assert (regions.all(axis=(2, 4)) == regions.any(axis=(2, 4))).all()   # one choice per region


def test_initialisation_matches_the_published_one():
  model = tiny.biformer(widths=(32, 64), head_dim=8)
  params = jax.jit(model.init)(jax.random.key(0), tiny.images(model))["params"]
  for name, leaf in trees.named_leaves(jax.device_get(params)).items():
    if "/conv/" in name or "/position/" in name or "/lce/" in name:
      fans = {"stem/conv0": 27, "stem/conv1": 144, "downsample_1": 288, "position": 9, "lce": 25}
      bound = next(fan for part, fan in fans.items() if part in name) ** -0.5
      assert 0.8 * bound < np.abs(leaf).max() <= bound, name
    elif name.endswith("kernel"):
      assert 0.015 < leaf.std() < 0.025, name
    else:
      assert (leaf == (1 if name.endswith("scale") else 0)).all(), name


def test_every_leaf_has_one_rule_and_only_kernels_decay():
  for plan, name in ((vc.Plan(), "biformer_stl"), (COMPACT, "biformer_tiny")):
    for deploy in (False, True):
      model = tiny.biformer(plan, name, deploy=deploy)
      params = shapes_of(model)["params"]
      rules = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
      flat = jax.tree.leaves(rules, is_leaf=lambda x: isinstance(x, trees.Leaf))
      for (leaf_name, leaf), rule in zip(trees.named_leaves(params).items(), flat, strict=True):
        assert rule.decay == leaf_name.endswith("/kernel"), leaf_name
        assert len(rule.axes) in (0, len(leaf.shape)), leaf_name


def test_stage_with_dense_attention_accepts_methods_of_the_attention_axis():
  plan = vc.Plan(blocks={1: {"attention": vc.BiFormer(top_k=1, regions=2, lce=True, min_tokens=0)}})
  model = tiny.biformer(plan)
  variables, images = random_inputs(model)
  assert variables["params"]["blocks_1"]["bra"]["lce"]["kernel"].shape == (5, 5, 1, 24)
  maps = np.asarray(tiny.features(model, variables, images, True).maps["blocks_1"])
  assert ((maps > 0).sum(axis=-1) == 4).all()
  without = {**variables, "params": jax.tree.map(lambda leaf: leaf, variables["params"])}
  del without["params"]["blocks_1"]["bra"]
  plain = model.clone(plan=plan.map(lambda method: vc.BiFormer(top_k=1, regions=2, min_tokens=0)))
  assert np.abs(logits(model, variables, images) - logits(plain, without, images)).max() > 1e-3


@pytest.mark.parametrize("make,words", [
    (lambda: vc.create_model("biformer_tiny", image_size=256),
     "256 pixels make grids of [64, 32, 16, 8] in the stages, the first 3 of which must be "
     "multiples of regions=7; the nearest size that fits: 224"),
    (lambda: tiny.biformer(top_ks=(5,)), "none above regions ** 2 = 4"),
    (lambda: tiny.biformer(depths=(1,)), "each needs one entry for each stage"),
    (lambda: tiny.biformer(head_dim=5), "16 must be a multiple of head_dim=5"),
    (lambda: tiny.biformer(dense_heads=5), "24, of a dense stage, must be a multiple of dense_he"),
    (lambda: tiny.biformer(vc.Plan(attention=vc.Sparsifiner())),
     "Sparsifiner() in block 0 needs every token to attend to all, which biformer_tiny does not "
     "have; use attention=None there"),
    (lambda: tiny.biformer(vc.Plan(attention=vc.BiFormer(min_tokens=0))),
     "in block 0 needs every token to attend to all"),
    (lambda: tiny.biformer(vc.Plan(heads=vc.HMHSA())),
     "in block 0 needs keys in one sequence, which biformer_tiny does not have; use layout"),
    (lambda: tiny.biformer(vc.Plan(heads=vc.HMHSA(site="logits"))), "in block 0 needs "),
    (lambda: tiny.biformer(vc.Plan(tokens=vc.ToMe(r=3))), "needs tokens that may be dropped"),
    (lambda: tiny.biformer().init(jax.random.key(0), jnp.zeros((1, 48, 32, 3))), "(B, 32, 32, 3)"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_nearest_valid_image_size_is_named_and_works():
  with pytest.raises(ValueError, match="nearest size that fits: 224"):
    vc.create_model("biformer_stl", image_size=(224, 215))
  model = vc.create_model("biformer_tiny", image_size=112, depths=(1, 1, 1, 1))
  assert jax.eval_shape(model.apply, shapes_of(model), tiny.images(model)).shape == (3, 1000)
