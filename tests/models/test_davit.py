"""DaViT: the published counts, timm's logits, plans within windows, what channel blocks reject."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.methods.own.window_attention import Window
from tests.models import parity
from vitcompact import calibration, layers, trees
from vitcompact.models import davit

# 20 x 30 pixels make 5 x 8 and 3 x 4 tokens: 3 x 3 windows with and without padding.
SIZES = {"image_size": (20, 30), "num_classes": 5, "widths": (8, 16), "depths": (1, 1),
         "heads": (2, 4), "window_size": 3}
HALF = {"depths": (1, 0)}   # of the second stage, only the downsampling
COMPACT = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
FAR = vc.Plan(heads=vc.HMHSA(layout="grid", rank=2), ffn=vc.CFFN(factor="both", rep="scale"))
# Parameters; MACs of products and convolutions; the authors' figures, which add five operations per
# norm element.
ROWS = {
    "davit_tiny": (28_360_168, 4_521_801_216, 4_540_244_736),
    "davit_small": (49_745_896, 8_773_012_992, 8_800_488_192),
    "davit_base": (87_954_408, 15_473_797_120, 15_510_430_720),
    "davit_large": (196_811_752, 102_805_204_992, 102_966_676_992),
}


def small(plan=None, **fields):
  return vc.create_model("davit_tiny", plan=plan or vc.Plan(), **{**SIZES, **fields})


def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0), tiny.images(model))


@pytest.mark.parametrize("name", tiny.named(ROWS, "davit_tiny"))
def test_parameters_and_macs_match_to_the_last_digit(name):
  fields = {"image_size": 384, "window_size": 12} if name == "davit_large" else {}
  model, normed = vc.create_model(name, **fields), []

  def watch(next_fun, args, kwargs, context):
    if isinstance(context.module, layers.LayerNorm) and context.method_name == "__call__":
      normed.append(args[0].size)
    return next_fun(*args, **kwargs)

  count = vc.count(model)
  with nn.intercept_methods(watch):
    jax.eval_shape(model.init, jax.random.key(0), tiny.images(model, batch=1))
  assert (count.params, count.macs, count.macs + 5 * sum(normed)) == ROWS[name]
  assert count.ideal_macs == count.macs


@pytest.mark.parametrize("run", parity.runs("davit"), ids=lambda run: run.name)
def test_logits_match_timm(run):
  assert parity.difference(run) < 1e-5 * np.abs(run.expected).max()


def test_probe_weights_reveal_a_wrong_epsilon(monkeypatch):
  monkeypatch.setattr(davit, "EPSILON", 1e-6)
  probed = next(run for run in parity.runs("davit") if run.name.endswith("probed"))
  assert parity.difference(probed, retrace=True) > 1e-2


@pytest.mark.parametrize("names", ["timm", "authors"])
def test_weights_round_trip_through_pytorch_bit_for_bit(names):
  run = parity.runs("davit")[0]
  variables = vc.from_torch(run.model, run.state)
  state = vc.to_torch(run.model, variables, names=names)
  assert len(state) == len(run.state)
  again = vc.from_torch(run.model, state)
  assert trees.digest(again) == trees.digest(variables)
  back = vc.to_torch(run.model, again)
  assert back.keys() == run.state.keys()
  for name, array in back.items():
    np.testing.assert_array_equal(array, run.state[name])


def test_weights_are_named_as_in_the_authors_files():
  model = vc.create_model("davit_small")
  renamed = {entry.torch: model.authors_name(entry.torch) for entry in model.torch_entries()}
  assert len(set(renamed.values())) == len(renamed) == 404
  assert renamed["stem.norm.bias"] == "patch_embeds.0.norm.bias"
  assert renamed["stages.3.downsample.conv.weight"] == "patch_embeds.3.proj.weight"
  assert renamed["stages.2.blocks.8.1.cpe2.proj.bias"] == "main_blocks.2.8.1.cpe.1.proj.bias"
  assert renamed["stages.2.blocks.8.0.attn.qkv.weight"] == "main_blocks.2.8.0.attn.qkv.weight"
  assert (renamed["head.norm.weight"], renamed["head.fc.bias"]) == ("norms.weight", "head.bias")


def test_windows_hold_neighbours_row_by_row_padded_with_zeros():
  map_bhwc = np.arange(2 * 5 * 7 * 2, dtype=np.float32).reshape(2, 5, 7, 2)
  windows, joined = map(np.asarray, jax.jit(lambda x: (
      davit.to_windows(x, 3), davit.from_windows(davit.to_windows(x, 3), 3, 5, 7)))(map_bhwc))
  assert windows.shape == (2 * 2 * 3, 9, 2)
  np.testing.assert_array_equal(windows[6], map_bhwc[1, :3, :3].reshape(9, 2))
  np.testing.assert_array_equal(windows[10].reshape(3, 3, 2)[:2], map_bhwc[1, 3:, 3:6])
  corner = windows[11].reshape(3, 3, 2)      # of the bottom right tokens
  np.testing.assert_array_equal(corner[:2, :1], map_bhwc[1, 3:, 6:])
  assert corner.sum() == map_bhwc[1, 3:, 6:].sum()
  np.testing.assert_array_equal(joined, map_bhwc)


def test_blocks_alternate_window_attention_and_channel_attention():
  model = vc.create_model("davit_tiny", image_size=96)
  assert model.depth == 12 and model.grids == [(24, 24), (12, 12), (6, 6), (3, 3)]
  for i, site in enumerate(model.sites()):
    assert site.block == i and site.head_width == 32 and site.hidden == 4 * site.width
    assert ("attention" in site.provides) == ("softmax" in site.provides) == (i % 2 == 0)
    assert not site.provides & {"free tokens", "class token", "full attention"}
    grid = (7, 7) if i % 2 == 0 else model.grids[[0, 1, 2, 2, 2, 3][i // 2]]
    assert site.query_grid == grid and site.tokens == (49 if i % 2 == 0 else 0)


@pytest.mark.parametrize("spec", [COMPACT.heads, FAR.heads, vc.HMHSA(site="logits")])
def test_hallucinated_heads_apply_their_maps_within_each_window(spec):
  model = small(vc.Plan(heads=spec))
  block, params = model.submodules()["blocks_2"], tiny.init(model)["params"]["blocks_2"]
  if spec.layout == "grid":
    assert params["attn"]["hallucinate"]["key_taps"].shape == (2, 2, 3, 3)
  x = np.random.default_rng(0).standard_normal((2, 3, 4, 16), np.float32)
  seen = calibration.observe_jitted(block, {"params": params, "batch_stats": {}}, x)
  assert seen.maps.shape == (2 * 2, 4, 9, 9) and seen.before_attention.shape == (4, 9, 16)
  value, out = (jax.tree.map(np.asarray, params["attn"][name]) for name in ("value", "out"))
  values = np.einsum("bmw,whd->bmhd", seen.keys, value["kernel"]) + value["bias"]
  heads = np.einsum("bhnm,bmhd->bnhd", seen.maps, values)
  expected = np.einsum("bnhd,hdw->bnw", heads, out["kernel"]) + out["bias"]
  np.testing.assert_allclose(seen.attended, expected, atol=1e-5)


def test_attention_methods_are_rejected_because_windows_fix_who_attends(monkeypatch):
  monkeypatch.setitem(vc.METHODS["attention"], "window", Window)
  with pytest.raises(ValueError, match="needs every token to attend to all, which davit_tiny does"):
    small(vc.Plan(attention=Window(radius=1)))


def test_plan_defaults_act_only_where_they_can():
  model = small(dataclasses.replace(COMPACT, blocks={2: {"heads": None}}))
  blocks = shapes_of(model)["params"]
  assert [i for i in range(4) if "hallucinate" in blocks[f"blocks_{i}"]["attn"]] == [0]
  assert all("a0" in blocks[f"blocks_{i}"]["mlp"]["fc2"] for i in range(4))
  # Windows are below the crossover of block sparsity, so they have no predictors.
  sparse = small(vc.Plan(attention=vc.Sparsifiner(granularity="block")))
  assert trees.differences(shapes_of(sparse), shapes_of(small())) == []


@pytest.mark.parametrize("make,words", [
    (lambda: small(vc.Plan(blocks={3: {"heads": vc.HMHSA()}})),
     "gives block 3 a method of heads, but it has no attention between tokens; blocks with "
     "attention: [0, 2]"),
    (lambda: small(vc.Plan(blocks={1: {"attention": vc.Sparsifiner()}})),
     "block 1 a method of attention, but it has no attention between tokens"),
    (lambda: small(vc.Plan(attention=vc.Sparsifiner())),
     "Sparsifiner() in block 0 needs every token to attend to all, which davit_tiny does not have"),
    (lambda: small(vc.Plan(attention=vc.Sparsifiner(granularity="block", min_tokens=0))),
     "needs every token to attend to all, which davit_tiny does not have; use attention=None"),
    (lambda: small(vc.Plan(tokens=vc.ToMe())), "tokens that may be dropped or merged, which"),
    (lambda: small(vc.Plan(blocks={4: {"ffn": None}})), "blocks 0 to 3"),
    (lambda: small(heads=(2, 3)), "3 does not divide 16"),
    (lambda: small(depths=(1, 1, 1)), "each needs one entry for each stage"),
    (lambda: vc.create_model("davit_tiny", window_size=0), "window_size=0: must be a whole number"),
    (lambda: shapes_of(small().clone(in_chans=1)) and small().init(
        jax.random.key(0), jnp.zeros((1, 20, 30, 1))), "(B, height, width, 3)"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("plan", [COMPACT, FAR], ids=["compact", "grid-both"])
def test_folding_keeps_the_function_with_every_leaf_and_statistic_random(plan):
  model = small(plan)
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = model.clone(deploy=True), jax.jit(
      lambda tree: vc.fold(model, tree)[1])(variables)
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 1e-5 and proof.first_difference is None
  assert trees.differences(folded, shapes_of(deploy)) == []
  again, twice = vc.fold(deploy, folded)
  assert again == deploy and trees.digest(twice) == trees.digest(folded)


@pytest.mark.filterwarnings("ignore:.*(saves nothing|too few to hold)")
def test_compacting_with_full_rank_and_all_heads_real_changes_nothing():
  dense = small(**HALF)
  variables, images = tiny.init(dense), tiny.images(dense)
  plan = vc.Plan(heads=vc.HMHSA(real_heads=2), ffn=vc.CFFN(rank_ratio=1.0, factor="both"))
  full, full_variables = vc.compact(dense, variables, plan, images=images)
  assert trees.differences(full_variables, shapes_of(full)) == []
  assert vc.verify(dense, variables, full, full_variables, images, tolerance=1e-4).ok


@pytest.mark.filterwarnings("ignore:compact without calibration images", "ignore:.*are few")
def test_fitting_to_images_window_by_window_reduces_the_error():
  dense = small(**HALF)
  variables, images = tiny.init(dense), tiny.images(dense, batch=32)
  expected = np.asarray(tiny.apply(dense, variables, images))
  errors = [np.abs(tiny.apply(*vc.compact(dense, variables, COMPACT, images=x), images)
                   - expected).max() for x in (None, images)]
  assert errors[1] < 0.5 * errors[0]


def test_report_on_padded_windows_is_finite_and_proposes_a_plan(monkeypatch):
  tiny.few_options(monkeypatch)
  model = small(**HALF)
  report = vc.measure(model, tiny.init(model), tiny.images(model, batch=12))
  tables = [block["tables"] for block in report.blocks]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tables))
  assert 0 < abs(tables[0]["token_similarity"]) < 1 and "attention_mass" not in tables[1]
  plan = report.plan(macs=0.9)
  assert set(plan.blocks) <= {0, 1} and plan.methods()


def test_features_of_every_stage_and_maps_of_every_window():
  model = small(COMPACT, in_chans=1)
  out = jax.eval_shape(functools.partial(vc.features, model, maps=True), shapes_of(model),
                       tiny.images(model))
  assert {name: leaf.shape for name, leaf in out.features.items()} == {
      "stage_1": (3, 5, 8, 8), "stage_2": (3, 3, 4, 16)}
  assert {name: leaf.shape for name, leaf in out.maps.items()} == {
      "blocks_0": (3 * 2 * 3, 2, 9, 9), "blocks_2": (3 * 1 * 2, 4, 9, 9)}


def test_images_of_another_size_give_what_a_model_of_that_size_gives():
  model, other = small(), small(image_size=(9, 33))
  variables, x = tiny.init(model), tiny.images(other)
  assert trees.differences(variables, shapes_of(other)) == []
  got, expected = (tiny.apply(m, variables, x) for m in (model, other))
  np.testing.assert_array_equal(got, expected)
  assert vc.count(model, (9, 33)).macs == vc.count(other).macs


def test_without_a_classifier_the_output_is_the_normalised_mean():
  model = small(num_classes=0)
  variables, x = tiny.init(model), tiny.images(model)
  out = tiny.features(model, variables, x)
  norm = variables["params"]["norm"]
  mean = np.mean(np.asarray(out.features["stage_2"]), axis=(1, 2))
  expected = jax.jit(layers.layer_norm, static_argnums=3)(mean, norm["scale"], norm["bias"], 1e-5)
  assert out.logits.shape == (3, 16)
  np.testing.assert_allclose(out.logits, expected, atol=1e-6)


def test_initialisation_matches_the_published_one():
  model = small(widths=(24, 32), heads=(2, 2))
  variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), tiny.images(model)))
  for name, leaf in trees.named_leaves(variables).items():
    if "cpe" in name or "/conv/" in name:      # torch's default, uniform in +-1/sqrt(fan in)
      fan = 9 if "cpe" in name else 147 if "stem" in name else 4 * 24
      bound = fan ** -0.5
      assert 0.6 * bound < np.abs(leaf).max() <= bound, name
    elif name.endswith(("scale", "bias")):
      assert (leaf == name.endswith("scale")).all(), name
    else:
      assert 0.015 < leaf.std() < 0.025 and abs(leaf.mean()) < 0.008, name


def test_stochastic_depth_grows_linearly_on_both_branches_of_each_block():
  model, rates = vc.create_model("davit_tiny", image_size=32, drop_path_rate=0.2), {}

  def watch(next_fun, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      rates.setdefault(context.module.path[0], []).append(context.module.rate)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    shapes_of(model)
  for i, rate in enumerate(np.linspace(0, 0.2, 12)):
    np.testing.assert_allclose(rates[f"blocks_{i}"], [rate, rate])
  assert vc.create_model("davit_base").drop_path_rate == 0.1


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, variables, x):
  def loss(params):
    logits, new = tiny.apply(model, {**variables, "params": params}, x, train=True,
                             rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    return jnp.sum(logits ** 2), new.get("batch_stats", {})
  return jax.grad(loss, has_aux=True)(variables["params"])


def test_training_gives_every_leaf_a_gradient_and_remat_changes_only_memory():
  model = small(COMPACT, drop_path_rate=0.3, **HALF)
  remat = model.clone(remat=True)
  variables, x = tiny.init(model), tiny.images(model)
  (grads, stats), (again, _) = jax.device_get([gradient(m, variables, x)
                                               for m in (model, remat)])
  assert "remat" in str(jax.make_jaxpr(lambda v: gradient(remat, v, x))(variables))
  moved = jax.tree.map(lambda new, old: (new != np.asarray(old)).any(), stats,
                       variables["batch_stats"])
  assert all(jax.tree.leaves(moved))
  for (name, grad), other in zip(trees.named_leaves(grads).items(), jax.tree.leaves(again),
                                 strict=True):
    # A key's bias adds the same to every score of a row, which changes no attention map of tokens.
    flat = "attn/key/bias" in name and name.startswith("blocks_0")
    assert np.isfinite(grad).all() and (flat or np.any(grad != 0)), name
    np.testing.assert_allclose(other, grad, atol=1e-3 * np.abs(grad).max() + 1e-4, err_msg=name)


def test_bfloat16_is_close_to_float32_with_float32_outputs():
  model, low = (small(COMPACT, dtype=dtype) for dtype in ("float32", "bfloat16"))
  variables, x = tiny.init(model), tiny.images(model)
  expected, got = (np.asarray(tiny.apply(m, variables, x)) for m in (model, low))
  assert got.dtype == jnp.float32
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05
  assert trees.differences(tiny.init(low), variables) == []
  seen = jax.eval_shape(functools.partial(vc.features, low), variables, x).features
  assert {leaf.dtype for leaf in seen.values()} == {jnp.dtype("bfloat16")}


def test_every_leaf_has_one_rule_and_only_kernels_decay():
  for plan in (vc.Plan(), FAR, vc.Plan(heads=vc.HMHSA(site="logits"), ffn=vc.CFFN())):
    for deploy in (False, True):
      model = small(plan, deploy=deploy)
      params = shapes_of(model)["params"]
      rules = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
      flat = jax.tree.leaves(rules, is_leaf=lambda x: isinstance(x, trees.Leaf))
      for (name, leaf), rule in zip(trees.named_leaves(params).items(), flat, strict=True):
        assert rule.decay == name.endswith("/kernel"), name
        assert len(rule.axes) in (0, len(leaf.shape)), name


def test_compact_model_is_restored_from_its_file(tmp_path):
  model = small(FAR)
  variables = tiny.init(model)
  vc.save(tmp_path / "a.safetensors", model, variables)
  again, loaded = vc.load(tmp_path / "a.safetensors")
  assert again == model and trees.digest(loaded) == trees.digest(variables)


def test_sums_over_fewer_images_keep_all_windows_of_an_image(monkeypatch):
  block = small(**HALF).submodules()["blocks_0"]
  x = np.random.default_rng(5).standard_normal((24, 5, 8, block.site.width)).astype(np.float32)
  variables = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), x[:1]))
  windows = len(calibration.observe_jitted(block, variables, x[:1]).maps)
  assert windows > 1
  # A step over windows would take the same one of every image.
  monkeypatch.setattr(calibration, "SUM_TOKENS", 24 * 5 * 8 // windows)
  data = calibration.Calibration(block, variables["params"], {}, x, None, 0, {})
  function, arguments = vc.HMHSA.statistics(variables["params"])
  (costs, tokens), _ = data.sums(function, *arguments)
  subset = data.with_fewer_images()
  np.testing.assert_array_equal(subset.x, x[::windows])
  (expected, count), _ = subset.sums(function, *arguments)
  assert tokens == count
  np.testing.assert_allclose(costs, expected, rtol=1e-4)


def target_streams(seen):
  return (seen.before_attention + seen.target_attention, seen.before_ffn + seen.target_ffn)


def test_branch_targets_over_windows_lead_to_the_dense_stream():
  """From another residual stream, in chunks of images."""
  block = small(**HALF).submodules()["blocks_0"]
  rng = np.random.default_rng(5)
  dense_x, x = rng.standard_normal((2, 4, 5, 8, block.site.width)).astype(np.float32)
  variables = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), x))
  _, teacher = calibration.run_teacher(block, variables, dense_x)
  data = calibration.Calibration(block, variables["params"], {}, x, teacher, 2, {})
  after_attention, after_ffn = map(np.concatenate, zip(*data.sums(target_streams), strict=True))
  seen = calibration.observe_jitted(block, variables, dense_x)
  assert len(seen.attended) > len(x)   # counts windows
  np.testing.assert_allclose(after_attention, seen.before_attention + seen.attended, atol=1e-4)
  np.testing.assert_allclose(after_ffn, seen.before_ffn + seen.ffn, atol=1e-4)
