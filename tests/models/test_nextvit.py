"""Next-ViT: the published counts, timm's logits, folding of every batch norm, errors."""
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
from vitcompact.count import macs_of
from vitcompact.models import nextvit_blocks

# Each kind of block once: with and without patch embedding, keys pooled and not. 48 pixels make
# 12, 6, 3 and 2 cells per side; pooling by 16 leaves a remainder of the 36 tokens.
SIZES = {"image_size": 48, "num_classes": 5, "stem_widths": (8, 4, 8, 8), "widths": (8, 24, 24, 24),
         "depths": (1, 1, 1, 1), "periods": (0, 1, 0, 1), "head_dim": 8}
HALF = {"depths": (1, 1, 0, 0)}
COMPACT = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
# (parameters, MACs / 1e9) dense, heads, ffn, both, then deployed parameters: specification.
ROWS = {
    "nextvit_small": [(31_763_368, 5.7944), (30_840_202, 5.7064), (28_446_632, 5.2292),
                      (27_523_466, 5.1412)],
    "nextvit_base": [(44_818_856, 8.2738), (43_600_082, 8.1462), (40_060_328, 7.4260),
                     (38_841_554, 7.2985)],
    "nextvit_large": [(57_874_344, 10.7532), (56_359_962, 10.5861), (51_674_024, 9.6228),
                      (50_159_642, 9.4557)],
}
# Deployed, without batch norms: dense, both.
DEPLOYED = {"nextvit_small": (31_731_720, 27_491_818), "nextvit_base": (44_771_592, 38_794_290),
            "nextvit_large": (57_811_464, 50_096_762)}
GMACS_384 = {"nextvit_small": 17.216, "nextvit_base": 24.586, "nextvit_large": 31.957}


def small(plan=None, **fields):
  return vc.create_model("nextvit_small", plan=plan or vc.Plan(), **{**SIZES, **fields})


def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0), tiny.images(model))


def fold_jitted(model, variables):
  # Under jit, so that tests compile once rather than once per operation.
  return model.clone(deploy=True), jax.jit(lambda tree: vc.fold(model, tree)[1])(variables)


@functools.cache
def random_inputs(model):
  """Returns random variables, variances around one, and images; numpy, which compiles nothing."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = 0.3 * rng.standard_normal(leaf.shape, np.float32)
    return np.exp(noise) if "var" in str(path[-1]) else noise

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model)), tiny.images(model)


def norms_of(tree):
  return [name for name in trees.named_leaves(tree) if "norm" in name]


@pytest.mark.parametrize("name", tiny.named(ROWS, "nextvit_small"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  dense = vc.create_model(name)
  shapes = shapes_of(dense)
  assert trees.size(shapes["params"]) == ROWS[name][0][0]
  # Batch norms add the same under every plan: here, FFNs and heads contain none.
  norms = ROWS[name][0][0] - DEPLOYED[name][0]
  counts = [vc.count(vc.create_model(name, plan=vc.Plan(**axes), deploy=True))
            for axes in ({}, {"heads": vc.HMHSA()}, {"ffn": vc.CFFN()},
                         {"heads": vc.HMHSA(), "ffn": vc.CFFN()})]
  assert (counts[0].params, counts[3].params) == DEPLOYED[name]
  for count, (params, gmacs) in zip(counts, ROWS[name], strict=True):
    assert count.params + norms == params
    assert abs(count.macs / 1e9 / gmacs - 1) < 1e-3
  large = dense.clone(image_size=384)
  macs = macs_of(large.apply, shapes, tiny.images(large, batch=1)).total
  assert abs(macs / 1e9 / GMACS_384[name] - 1) < 1e-3


@pytest.mark.parametrize("run", parity.runs("nextvit"), ids=lambda run: run.name)
def test_logits_match_timm(run):
  assert parity.difference(run) < 1e-4


def test_probe_weights_reveal_a_wrong_epsilon(monkeypatch):
  wrong = functools.partial(layers.BatchNorm, epsilon=1e-6)
  monkeypatch.setattr(layers, "BatchNorm", wrong)
  monkeypatch.setattr(nextvit_blocks, "BatchNorm", wrong)
  probed = next(run for run in parity.runs("nextvit") if run.name.endswith("probed"))
  assert parity.difference(probed, retrace=True) > 1e-2


@pytest.mark.parametrize("names", ["timm", "authors"])
def test_weights_round_trip_through_pytorch_bit_for_bit(names):
  run = parity.runs("nextvit")[0]
  variables = vc.from_torch(run.model, run.state)
  state = vc.to_torch(run.model, variables, names=names)
  assert len(state) == len([name for name in run.state if "num_batches" not in name])
  again = vc.from_torch(run.model, state)
  assert trees.digest(again) == trees.digest(variables)
  for name, array in vc.to_torch(run.model, again).items():
    np.testing.assert_array_equal(array, run.state[name])


def test_authors_files_number_blocks_over_all_stages():
  model = vc.create_model("nextvit_small")
  renamed = {entry.torch: model.authors_name(entry.torch) for entry in model.torch_entries()}
  assert len(set(renamed.values())) == len(renamed) == 411      # 472 without the 61 counters
  assert renamed["stages.2.blocks.4.e_mhsa.q.weight"] == "features.11.e_mhsa.q.weight"
  assert renamed["stages.0.blocks.1.mlp.fc2.bias"] == "features.1.mlp.conv2.bias"
  assert renamed["head.fc.bias"] == "proj_head.0.bias"
  assert renamed["stem.3.norm.running_var"] == "stem.3.norm.running_var"


@pytest.mark.parametrize("plan", [
    COMPACT, vc.Plan(heads=vc.HMHSA(layout="grid", rank=2), ffn=vc.CFFN(factor="both")),
], ids=["compact", "grid-both"])
def test_folding_keeps_the_function_and_leaves_no_norm(plan):
  model = small(plan)
  variables, images = random_inputs(model)
  deploy, folded = fold_jitted(model, variables)
  assert trees.differences(folded, shapes_of(deploy)) == []
  assert folded.keys() == {"params"} and norms_of(folded) == []
  proof = vc.verify(model, variables, deploy, folded, images, tolerance=3e-5)
  assert proof.ok and proof.first_difference is None, proof
  again, twice = vc.fold(deploy, folded)
  assert again == deploy and trees.digest(twice) == trees.digest(folded)


def test_without_a_classifier_a_folded_model_keeps_the_norm_of_pooled_features():
  model = small(num_classes=0)
  variables, images = random_inputs(model)
  deploy, folded = fold_jitted(model, variables)
  assert trees.differences(folded, shapes_of(deploy)) == []
  assert {name.rsplit("/", 1)[0] for name in norms_of(folded)} == {"params/head/norm",
                                                                   "batch_stats/head/norm"}
  assert vc.verify(model, variables, deploy, folded, images, tolerance=3e-5).ok
  assert jax.eval_shape(model.apply, variables, images).shape == (3, 32)


@pytest.mark.filterwarnings("ignore:.*saves nothing")
def test_compacting_with_full_rank_and_all_heads_real_changes_nothing():
  dense = small(**HALF)
  variables, images = random_inputs(dense)
  # The rank of either FFN matrix is at most the block's width.
  plan = vc.Plan(heads=vc.HMHSA(real_heads=3), ffn=vc.CFFN(rank_ratio=1.0, factor="both"))
  full, full_variables = vc.compact(dense, variables, plan, images=images)
  assert trees.differences(full_variables, shapes_of(full)) == []
  assert vc.verify(dense, variables, full, full_variables, images, tolerance=1e-3).ok


def test_compacting_cuts_queries_and_keeps_everything_the_plan_does_not_touch():
  dense = small(**HALF)
  variables, _ = random_inputs(dense)
  compact, got = vc.compact(dense, variables, vc.Plan(heads=vc.HMHSA()))
  assert trees.differences(got, shapes_of(compact)) == []
  old, new = trees.named_leaves(variables), trees.named_leaves(got)
  cut = "params/blocks_1/attn/query/kernel"
  np.testing.assert_array_equal(new[cut], old[cut][:, :2])
  same_shape = [name for name in new if name in old and old[name].shape == new[name].shape]
  assert len(same_shape) == len(old) - 4      # kernels and biases of queries and keys
  for name in same_shape:
    np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def test_ffns_can_be_factorised_in_attention_blocks_only():
  model = small(vc.Plan(ffn=vc.CFFN(apply_to="attention_blocks")))
  factorised = {name.split("/")[0] for name in trees.named_leaves(shapes_of(model)["params"])
                if "fc2/a0" in name}
  assert factorised == {"blocks_1", "blocks_3"}


def test_initialisation_matches_the_published_one():
  model = small(depths=(0, 1, 0, 0))
  variables = jax.jit(model.init)(jax.random.key(0), tiny.images(model))
  for name, leaf in trees.named_leaves(jax.device_get(variables)).items():
    if name.endswith(("scale", "var")):
      assert (leaf == 1).all(), name
    elif name.endswith(("bias", "mean")):
      assert (leaf == 0).all(), name
    else:      # the smallest kernel has 64 entries
      assert 0.012 < leaf.std() < 0.028 and abs(leaf.mean()) < 0.008, name


def test_stochastic_depth_grows_linearly_and_is_split_like_the_channels():
  model = vc.create_model("nextvit_base", image_size=32)
  rates = {}

  def watch(next_fun, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      block, drop = context.module.path
      rates.setdefault(block, {})[drop] = context.module.rate
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    shapes_of(model)
  linear = np.linspace(0, 0.2, 30)
  assert len(rates) == 30
  for i, rate in enumerate(linear):
    split = (0.75, 0.25, 1) if i in (6, 11, 16, 21, 26, 29) else (1, 1)
    np.testing.assert_allclose(list(rates[f"blocks_{i}"].values()), np.multiply(split, rate))
  assert vc.create_model("nextvit_small").drop_path_rate == 0.1


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, variables, images):
  """Returns gradients of a training loss, and the statistics after the step."""
  def loss(params):
    out, state = tiny.apply(model, {**variables, "params": params}, images, train=True,
                            rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    return jnp.sum(out ** 2), state["batch_stats"]

  return jax.grad(loss, has_aux=True)(variables["params"])


def test_training_updates_every_statistic_and_every_parameter():
  model = small(COMPACT, **HALF)
  variables, images = random_inputs(model)
  grads, stats = gradients(model, variables, images)
  for name, leaf in trees.named_leaves(grads).items():
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name
  before = trees.named_leaves(variables["batch_stats"])
  for name, leaf in trees.named_leaves(stats).items():
    assert np.isfinite(leaf).all() and (leaf != before[name]).all(), name


def test_remat_changes_memory_not_results():
  model = small(depths=(0, 1, 0, 0))
  variables, images = random_inputs(model)
  remat = model.clone(remat=True)
  assert "remat" in str(jax.make_jaxpr(lambda v: gradients(remat, v, images))(variables))
  expected = jax.tree.leaves(gradients(model, variables, images))
  got = jax.tree.leaves(gradients(remat, variables, images))
  # A key bias does not change a softmax: its gradient is the others' rounding error.
  rounding = 3e-6 * max(np.abs(leaf).max() for leaf in expected)
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=max(1e-3 * np.abs(other).max(),
                                                               rounding))


def test_bfloat16_is_close_to_float32():
  model = small(COMPACT, **HALF)
  variables, images = random_inputs(model)
  expected = tiny.apply(model, variables, images)
  got = jax.jit(model.clone(dtype="bfloat16").apply)(variables, images)
  assert got.dtype == jnp.float32
  got, expected = np.asarray(got), np.asarray(expected)
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


def test_features_of_every_stage_and_maps_over_pooled_keys_on_request():
  model = small(COMPACT, image_size=(40, 60), in_chans=1)
  out = jax.eval_shape(functools.partial(vc.features, model, maps=True), shapes_of(model),
                       tiny.images(model))
  assert {name: leaf.shape for name, leaf in out.features.items()} == {
      "stage_1": (3, 10, 15, 8), "stage_2": (3, 5, 8, 32), "stage_3": (3, 3, 4, 24),
      "stage_4": (3, 2, 2, 32)}
  assert {name: leaf.shape for name, leaf in out.maps.items()} == {
      "blocks_1": (3, 3, 40, 2), "blocks_3": (3, 3, 4, 4)}


def test_every_leaf_has_one_rule_and_only_kernels_decay():
  for plan in (vc.Plan(), vc.Plan(heads=vc.HMHSA(layout="grid"), ffn=vc.CFFN(factor="both"))):
    for deploy in (False, True):
      model = small(plan, deploy=deploy)
      params = shapes_of(model)["params"]
      rules = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
      flat = jax.tree.leaves(rules, is_leaf=lambda x: isinstance(x, trees.Leaf))
      for (name, leaf), rule in zip(trees.named_leaves(params).items(), flat, strict=True):
        assert rule.decay == name.endswith("/kernel"), name
        assert len(rule.axes) in (0, len(leaf.shape)), name


@pytest.mark.parametrize("make,words", [
    (lambda: vc.create_model("nextvit_small", image_size=24), "stage 2 has 3 x 3 tokens, and a key "
     "there averages 16; the smallest side of a square image that fits is 25"),
    (lambda: vc.create_model("nextvit_small", widths=(96, 192, 400, 768)),
     "400, of stage 3, must be a multiple of 96"),
    (lambda: vc.create_model("nextvit_small", depths=(3, 4, 10)), "must have 4 entries"),
    (lambda: vc.create_model("nextvit_small", plan=vc.Plan(blocks={5: {"heads": vc.HMHSA()}})),
     "blocks with attention: [6, 11, 16, 19]"),
    (lambda: small(plan=vc.Plan(blocks={0: {"attention": vc.Sparsifiner()}})),
     "block 0 a method of attention, but it has no attention"),
    (lambda: vc.create_model("nextvit_small", plan=vc.Plan(blocks={20: {"ffn": None}})),
     "blocks 0 to 19"),
    (lambda: vc.create_model("nextvit_smal"), "did you mean nextvit_small"),
    (lambda: small().init(jax.random.key(0), jnp.zeros((1, 48, 32, 3))), "(B, 48, 48, 3)"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_smallest_valid_image_works():
  model = vc.create_model("nextvit_small", image_size=25)
  assert jax.eval_shape(model.apply, shapes_of(model), tiny.images(model)).shape == (3, 1000)
