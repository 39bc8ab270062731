"""SHViT: the published counts, timm's logits, what folds and what does not, factorised FFNs."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity
from vitcompact import block as blocks
from vitcompact import calibration, layers, trees
from vitcompact.models import shvit_blocks
from vitcompact.plan import BlockMethods

# Parameters in training and deployed, MACs / 1e6 of the deployed form: from the specification.
ROWS = {"shvit_s1": (6_330_808, 6_308_660, 241.3), "shvit_s2": (11_483_072, 11_453_508, 365.4),
        "shvit_s3": (14_245_273, 14_210_010, 600.6), "shvit_s4": (16_588_484, 16_546_248, 986.2)}
FFN = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
BOTH = vc.Plan(ffn=vc.CFFN(factor="both", apply_to="attention_blocks"))
RUNS = parity.runs("shvit")


def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0), tiny.images(model))


@functools.partial(jax.jit, static_argnums=0)
def fold_jitted(model, variables):
  return vc.fold(model, variables)[1]


@functools.partial(jax.jit, static_argnums=0)
def logits(model, variables, images):
  return tiny.apply(model, variables, images)


@pytest.mark.parametrize("name", tiny.named(ROWS, "shvit_s1", "shvit_s4"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  train, deployed, mmacs = ROWS[name]
  model = vc.create_model(name)
  assert trees.size(shapes_of(model)["params"]) == train
  count = vc.count(model.clone(deploy=True))
  assert count.params == deployed
  assert abs(count.macs / 1e6 / mmacs - 1) < 1e-3


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_logits_match_timm_folded_and_unfolded(run):
  assert parity.difference(run) < 1e-5
  variables = vc.from_torch(run.model, run.state)
  got = logits(run.model.clone(deploy=True), fold_jitted(run.model, variables), run.images)
  assert np.abs(got - run.expected).max() < 1e-5


@pytest.mark.parametrize("module, name, wrong", [
    (layers, "BatchNorm", functools.partial(layers.BatchNorm, epsilon=1e-6)),
    (shvit_blocks, "GROUP_EPSILON", 1e-6)])
def test_probe_weights_reveal_a_wrong_epsilon(module, name, wrong, monkeypatch):
  monkeypatch.setattr(module, name, wrong)
  probed = next(run for run in RUNS if run.name.endswith("probed"))
  assert parity.difference(probed, retrace=True) > 1e-3


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("names", ["timm", "authors"])
def test_weights_round_trip_through_pytorch_bit_for_bit(names, deploy):
  model = RUNS[0].model.clone(deploy=deploy)
  variables = jax.tree.map(np.asarray, tiny.init(model))
  state = vc.to_torch(model, variables, names=names)
  assert trees.digest(vc.from_torch(model, state)) == trees.digest(variables)
  if not deploy:
    stored = {name: shape for name, shape in RUNS[0].state.items() if "num_batches" not in name}
    if names == "authors":
      stored = {model.authors_name(name): value for name, value in stored.items()}
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in stored.items()}


def test_authors_files_number_the_parts_of_a_downsampling_as_blocks():
  model = vc.create_model("shvit_s1")
  renamed = {entry.torch: model.authors_name(entry.torch) for entry in model.torch_entries()}
  assert len(set(renamed.values())) == len(renamed) == 397
  for timm, authors in {"stages.0.blocks.1.conv.m.c": "blocks1.1.conv.m.c",
                        "stages.1.downsample.0.m.c": "blocks2.0.0.m.c",
                        "stages.1.downsample.1.m.pw1.c": "blocks2.0.1.m.pw1.c",
                        "stages.1.downsample.2.conv1.c": "blocks2.1.conv1.c",
                        "stages.2.downsample.3.m.c": "blocks3.2.0.m.c",
                        "stages.2.downsample.4.m.pw2.c": "blocks3.2.1.m.pw2.c",
                        "stages.2.blocks.4.mixer.m.qkv.c": "blocks3.7.mixer.m.qkv.c",
                        "head.l": "head.l", "patch_embed.6.c": "patch_embed.6.c"}.items():
    assert renamed[f"{timm}.weight"] == f"{authors}.weight"


def test_deployed_form_has_the_names_of_timms_fused_model():
  names = {entry.torch for entry in vc.create_model("shvit_s1", deploy=True).torch_entries()}
  assert len(names) == 174
  assert names >= {f"{name}.{leaf}" for leaf in ("weight", "bias") for name in (
      "patch_embed.2", "stages.0.blocks.1.conv", "stages.1.blocks.0.mixer.m.pre_norm",
      "stages.1.blocks.0.mixer.m.qkv", "stages.1.blocks.0.mixer.m.proj.1", "head",
      "stages.1.blocks.0.ffn.m.pw2", "stages.2.downsample.0", "stages.2.downsample.1.m.pw1",
      "stages.2.downsample.2.conv2", "stages.2.downsample.2.se.fc1", "stages.2.downsample.3")}


@pytest.mark.parametrize("plan", [vc.Plan(), FFN, BOTH], ids=["dense", "ffn", "both"])
def test_folding_keeps_the_function_and_leaves_only_the_norm_of_attention(plan):
  model = tiny.shvit(plan)
  variables, images = tiny.init(model), tiny.images(model)
  deploy, new = model.clone(deploy=True), fold_jitted(model, variables)
  assert trees.differences(new, shapes_of(deploy)) == []
  assert new.keys() == {"params"}
  assert {name.rsplit("/", 1)[0] for name in trees.named_leaves(new["params"])
          if "norm" in name} == {"blocks_1/attn/norm", "blocks_2/attn/norm"}
  proof = vc.verify(model, variables, deploy, new, images)
  assert proof.ok and proof.first_difference is None, proof
  again, twice = vc.fold(deploy, new)
  assert again == deploy and trees.digest(twice) == trees.digest(new)


def test_without_a_classifier_features_are_unnormalised_and_published_files_load():
  run = RUNS[0]
  model = run.model.clone(num_classes=0)
  variables = vc.from_torch(model, run.state)
  assert "head" not in variables["params"]
  images = run.images
  features = jax.jit(functools.partial(vc.features, run.model))
  maps = features(vc.from_torch(run.model, run.state), images).features["stage_3"]
  np.testing.assert_allclose(logits(model, variables, images), maps.mean((1, 2)), rtol=1e-4,
                             atol=1e-5)
  deploy, new = model.clone(deploy=True), fold_jitted(model, variables)
  assert vc.verify(model, variables, deploy, new, images).ok
  reset = vc.from_torch(run.model.clone(num_classes=3), run.state, reset_head=True)["params"]
  np.testing.assert_array_equal(reset["head"]["norm"]["scale"], run.state["head.bn.weight"])
  assert reset["head"]["fc"]["kernel"].shape == (36, 3)


def test_new_block_is_the_identity_and_initialisation_matches_torch():
  model = tiny.shvit(widths=(16, 32, 64))
  variables = jax.jit(model.init)(jax.random.key(0), tiny.images(model))
  modules = model.submodules()
  for i, side in enumerate((6, 3, 2)):
    x = jax.random.normal(jax.random.key(i), (2, side, side, model.widths[i]))
    out = tiny.apply(modules[f"blocks_{i}"],
                     {kind: variables[kind][f"blocks_{i}"] for kind in variables}, x)
    np.testing.assert_array_equal(out, x)
  silent = (r"conv/norm", r"attn/proj/norm", r"mlp/fc2/norm", r"mlp1/fc2/norm", r"mlp2/fc2/norm")
  for name, leaf in trees.named_leaves(variables["params"]).items():
    fan_in = np.prod(leaf.shape[:-1])
    if name.endswith("scale"):
      begins = "blocks" in name or "/mlp" in name
      assert (leaf == (0 if begins and any(part in name for part in silent) else 1)).all(), name
    elif "/se/" in name:
      assert np.abs(leaf).max() > 0, name
    elif name.endswith("bias"):
      assert (leaf == 0).all(), name
    elif name == "head/fc/kernel":
      assert 0.015 < leaf.std() < 0.025
    else:     # uniform up to 1 / sqrt(fan in)
      assert 0.85 < np.abs(leaf).max() * fan_in ** 0.5 <= 1, name
      assert 0.4 < leaf.std() * fan_in ** 0.5 < 0.75, name


def attention(side=3, part=5, width=12):
  """Returns (module, variables, input) of attention over 5 of 12 channels."""
  site = tiny.shvit().sites()[1]
  module = shvit_blocks.SingleHeadAttention(site, 4)
  x = jax.random.normal(jax.random.key(0), (2, side, side, width))
  return module, tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), x)), x


def test_attention_matches_its_equations():
  module, variables, x = attention()
  params, stats = variables["params"], variables["batch_stats"]
  part = x[..., :5]
  mean, var = part.mean((1, 2, 3), keepdims=True), part.var((1, 2, 3), keepdims=True)
  normed = (part - mean) / np.sqrt(var + 1e-5)
  normed = normed * params["norm"]["scale"][None, None, None] + params["norm"]["bias"][
      None, None, None]

  def batch_normed(name, y):
    norm, seen = params[name]["norm"], stats[name]["norm"]
    scale = norm["scale"] / np.sqrt(seen["var"] + 1e-5)
    return y @ params[name]["kernel"] * scale[None] + (norm["bias"] - seen["mean"] * scale)[None]

  qkv = batch_normed("qkv", normed.reshape(-1, 5)).reshape(2, 9, 13)
  query, key, value = qkv[..., :4], qkv[..., 4:8], qkv[..., 8:]
  scores = np.einsum("bnd,bmd->bnm", query, key) / 2
  attended = np.einsum("bnm,bme->bne", jax.nn.softmax(scores, -1), value)
  joined = np.concatenate([attended, x[..., 5:].reshape(2, 9, 7)], axis=-1)
  expected = batch_normed("proj", np.maximum(joined, 0).reshape(18, 12)).reshape(x.shape)
  np.testing.assert_allclose(tiny.apply(module, variables, x), expected, rtol=1e-4, atol=1e-5)


def test_channels_without_attention_reach_the_projection_unchanged():
  module, variables, x = attention()
  seen = {}

  def watch(next_fun, args, kwargs, context):
    if context.module.name in ("norm", "proj") and len(context.module.path) == 1:
      seen[context.module.name] = args[0]
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    module.apply(variables, x)
  np.testing.assert_array_equal(seen["norm"], x[..., :5])
  np.testing.assert_array_equal(seen["proj"][..., 5:], np.maximum(x[..., 5:], 0))
  far = x.at[:, 0, 0, 5:].add(1.0)     # they do not mix positions
  out = tiny.apply(module, variables, x)
  changed = np.any(tiny.apply(module, variables, far) != out, axis=(0, 3))
  assert changed.sum() == 1 and changed[0, 0]
  far = x.at[:, 0, 0, 0].add(1.0)
  assert np.any(tiny.apply(module, variables, far) != out, axis=(0, 3)).all()


def test_squeezed_widths_are_rounded_as_in_timm():
  assert [shvit_blocks.squeezed_width(4 * width) for width in (128, 224, 308, 352, 20, 2)] == [
      128, 224, 312, 352, 24, 8]


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, variables, images):
  """Returns gradients of a training loss, and the statistics after the step."""
  def loss(params):
    out, state = tiny.apply(model, {**variables, "params": params}, images, train=True,
                            rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(out)), state["batch_stats"]

  return jax.grad(loss, has_aux=True)(variables["params"])


def test_training_updates_every_statistic_and_every_parameter():
  model = tiny.shvit(FFN, drop_path_rate=0.0)
  variables = tiny.init(model)
  grads, stats = gradients(model, variables, tiny.images(model, batch=4))
  for name, leaf in trees.named_leaves(grads).items():
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name
  before = trees.named_leaves(variables["batch_stats"])
  for name, leaf in trees.named_leaves(stats).items():
    assert np.isfinite(leaf).all() and (leaf != before[name]).all(), name


def test_remat_changes_memory_not_results():
  model = tiny.shvit(depths=(0, 1, 0), drop_path_rate=0.5)
  variables, images = tiny.init(model), tiny.images(model)
  remat = model.clone(remat=True)
  assert "remat" in str(jax.make_jaxpr(lambda v: gradients(remat, v, images))(variables))
  expected = trees.named_leaves(gradients(model, variables, images))
  rounding = 1e-5 * max(np.abs(leaf).max() for leaf in expected.values())
  for name, leaf in trees.named_leaves(gradients(remat, variables, images)).items():
    np.testing.assert_allclose(leaf, expected[name], rtol=1e-3, atol=rounding, err_msg=name)


def test_stochastic_depth_drops_branches_per_image_and_is_off_by_default():
  model = tiny.shvit(vc.Plan(), depths=(1, 1, 1), drop_path_rate=0.5)
  rates = {}

  def watch(next_fun, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      rates["/".join(context.module.path)] = context.module.rate
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    shapes_of(model)
  assert rates == {f"blocks_{i}/drop{j}": 0.25 * i for i in range(3) for j in (1, 2, 3)
                   if (i, j) != (0, 2)}
  assert {vc.create_model(name).drop_path_rate for name in ROWS} == {0.0}
  block = model.clone(drop_path_rate=0.999).submodules()["blocks_2"]
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 20))
  variables = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), x))
  out, _ = tiny.apply(block, variables, x, train=True, rngs={"dropout": jax.random.key(0)},
                      mutable=["batch_stats"])
  np.testing.assert_array_equal(out, x)


def test_bfloat16_is_close_to_float32():
  model = tiny.shvit(FFN)
  variables, images = tiny.init(model, spread=0.1), tiny.images(model)
  expected = logits(model, variables, images)
  got = logits(model.clone(dtype="bfloat16"), variables, images)
  assert got.dtype == jnp.float32
  got, expected = np.asarray(got), np.asarray(expected)
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


def test_any_image_size_gives_stage_features_and_maps_where_there_is_attention():
  def shapes(size):
    model = tiny.shvit(FFN, image_size=size, in_chans=1)
    out = jax.eval_shape(functools.partial(vc.features, model, maps=True), shapes_of(model),
                         tiny.images(model))
    assert out.logits.shape == (3, 5)
    return ([leaf.shape[1:] for leaf in out.features.values()],
            {name: leaf.shape for name, leaf in out.maps.items()})

  assert shapes((75, 110)) == ([(5, 7, 8), (3, 4, 12), (2, 2, 20)],
                               {"blocks_1": (3, 1, 12, 12), "blocks_2": (3, 1, 4, 4)})
  assert shapes(1) == ([(1, 1, 8), (1, 1, 12), (1, 1, 20)],
                       {"blocks_1": (3, 1, 1, 1), "blocks_2": (3, 1, 1, 1)})


def test_execution_sets_the_form_of_attention():
  seen = []
  model = tiny.shvit(execution=vc.Execution(attention={1: "tiled"}))

  def watch(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if isinstance(context.module, shvit_blocks.SingleHeadAttention):
      seen.append(context.module.site.form)
    return out

  with nn.intercept_methods(watch):
    shapes_of(model)
  assert seen == ["tiled", None]
  variables, images = tiny.init(model), tiny.images(model)
  plain = tiny.shvit()
  np.testing.assert_allclose(logits(model, variables, images), logits(plain, variables, images),
                             rtol=1e-4, atol=1e-5)
  programs = [str(jax.make_jaxpr(one.apply)(variables, images)) for one in (model, plain)]
  assert programs[0] != programs[1]


def test_every_leaf_has_one_rule_and_only_kernels_decay():
  for plan in (vc.Plan(), FFN, BOTH):
    for deploy in (False, True):
      model = tiny.shvit(plan, deploy=deploy)
      params = shapes_of(model)["params"]
      rules = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
      flat = jax.tree.leaves(rules, is_leaf=lambda x: isinstance(x, trees.Leaf))
      for (name, leaf), rule in zip(trees.named_leaves(params).items(), flat, strict=True):
        assert rule.decay == name.endswith("/kernel"), name
        assert len(rule.axes) in (0, len(leaf.shape)), name
  dense = tiny.shvit()
  own_leaves = {name: leaf for name, leaf in trees.named_leaves(shapes_of(dense)["params"]).items()
                if name.endswith("kernel") and ("/fc" not in name or "head" in name)}
  trees.first_match(dense.rules, own_leaves)   # each of its own rules matches something


@pytest.fixture(scope="module")
def dense():
  """A model of two blocks, for tests that run op by op."""
  model = tiny.shvit(depths=(0, 1, 1))
  return model, tiny.init(model), np.asarray(tiny.images(model, batch=16))


@pytest.mark.filterwarnings("ignore:.*saves nothing", "ignore:.*calibration images")
@pytest.mark.parametrize("given", [False, True], ids=["weights", "images"])
def test_compacting_to_full_rank_absorbs_the_norms_and_changes_nothing(given, dense):
  model, variables, images = dense
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=1.0, factor="both", rep="scale"),
                 blocks={1: {"ffn": vc.CFFN(rank_ratio=1.0)}})
  small, new = vc.compact(model, variables, plan, images=images if given else None)
  assert trees.differences(new, shapes_of(small)) == []
  assert vc.verify(model, variables, small, new, images, tolerance=1e-3).ok
  assert "mlp" not in new["batch_stats"]["blocks_0"]
  assert new["batch_stats"]["blocks_1"]["mlp"].keys() == {
      "fc1", "fc2"} == new["params"]["blocks_1"]["mlp"].keys()
  old, got = trees.named_leaves(variables), trees.named_leaves(new)
  for name in old:
    if "/mlp/" not in name or "blocks_1/mlp/fc1" in name:
      np.testing.assert_array_equal(got[name], old[name], err_msg=name)
  deploy, folds = small.clone(deploy=True), fold_jitted(small, new)
  assert vc.verify(small, new, deploy, folds, images, tolerance=3e-5).ok


def test_factors_are_fitted_to_the_output_of_the_normed_layers():
  """The error of the FFN's outputs equals the one that the fit reports."""
  block = tiny.shvit().submodules()["blocks_1"]
  x = np.random.default_rng(0).standard_normal((32, 3, 3, 12), np.float32)
  stats, params = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), x)).values()
  variables = {"params": params, "batch_stats": stats}
  expected = calibration.observe_jitted(block, variables, x)
  _, teacher = calibration.run_teacher(block, variables, x)
  data = calibration.Calibration(block, params, stats, x, teacher, 8, {})
  methods = BlockMethods(ffn=vc.CFFN(factor="both"))
  new, new_stats = blocks.from_dense(block.site, methods, params, stats, lambda *_: data)
  got = calibration.observe_jitted(block.clone(methods=methods),
                            {"params": new, "batch_stats": new_stats}, x)
  for told, one, other in (("ffn fc1", got.fc1, expected.fc1), ("ffn fc2", got.ffn, expected.ffn)):
    one, other = (np.asarray(y[:24]).reshape(-1, y.shape[-1]) for y in (one, other))
    error = np.sum((one - other) ** 2) / np.sum((other - other.mean(0)) ** 2)
    assert error == pytest.approx(data.notes[told]["fitted"], rel=0.02), told
    assert 0.01 < error < 0.5


@pytest.mark.filterwarnings("ignore:.*of its .* classes", "ignore:.*calibration images")
def test_report_proposes_only_ffns_and_estimates_the_output_of_normed_layers(dense):
  model, variables, images = dense
  report = vc.measure(model, variables, images, sensitivity="none")
  assert {option.axis for block in report.blocks for option in block["options"]} == {"ffn"}
  assert [set(block["tables"]) >= {"attention_mass", "token_similarity"}
          for block in report.blocks] == [True, True]
  block_variables = {kind: variables[kind]["blocks_0"] for kind in variables}
  seen = calibration.observe_jitted(model.submodules()["blocks_0"], block_variables,
                             np.repeat(images[:2, :3, :3, :1], 12, axis=-1))
  assert seen.before_ffn.shape == seen.ffn.shape == seen.before_attention.shape == (2, 9, 12)
  np.testing.assert_allclose(seen.hidden, np.maximum(seen.fc1, 0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(seen.before_ffn - seen.before_attention, seen.attended, rtol=1e-4,
                             atol=1e-5)


def test_every_form_is_restored_from_its_file(tmp_path):
  for model in (tiny.shvit(FFN), tiny.shvit(BOTH, deploy=True)):
    variables = tiny.init(model)
    path = tmp_path / f"{model.deploy}.safetensors"
    vc.save(path, model, jax.tree.map(np.asarray, variables))
    got, again = vc.load(path)
    assert got == model and trees.digest(again) == trees.digest(variables)


HEADS = {"heads": vc.HMHSA()}


@pytest.mark.parametrize("make, words", [
    (lambda: tiny.shvit(vc.Plan(blocks={1: HEADS})),
     "HMHSA() in block 1: shvit_s1 has a single head there, with queries and keys of width 4 and "
     "values of width 5, which takes no method of the axis heads; use heads=None"),
    (lambda: tiny.shvit(vc.Plan(blocks={0: HEADS})), "blocks with attention: [1, 2]"),
    (lambda: vc.create_model("shvit_s3", plan=vc.Plan(attention=vc.Sparsifiner())),
     "Sparsifiner() in block 3: shvit_s3 has a single head there, with queries and keys of width "
     "16 and values of width 75, which takes no method of the axis attention; use attention=None"),
    (lambda: tiny.shvit(vc.Plan(tokens=vc.EViT(blocks=(1,)))),
     "tokens that may be dropped or merged, which shvit_s1 does not have"),
    (lambda: tiny.shvit(widths=(12, 12, 20)), "12, of stage 1, must be a multiple of 8, as the "
     "stem begins with an eighth of it; the nearest multiple: 16"),
    (lambda: tiny.shvit(partial_widths=(5, 21)),
     "attention in stage 3 would act on 21 channels, and there are only 20"),
    (lambda: tiny.shvit(partial_widths=(5, 8, 8)), "partial_widths=(5, 8, 8): must have 2 entries"),
    (lambda: tiny.shvit(depths=(1, 1)), "depths=(1, 1): must have 3 entries"),
    (lambda: tiny.shvit(vc.Plan(blocks={3: {"ffn": None}})), "blocks 0 to 2"),
    (lambda: tiny.shvit().init(jax.random.key(0), jnp.zeros((1, 96, 64, 3))), "(B, 96, 96, 3)"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_default_plan_with_hallucinated_heads_has_none_in_a_single_head_model():
  model = tiny.shvit(vc.Plan(heads=vc.HMHSA(), blocks={1: {"heads": None}}))
  assert shapes_of(model)["params"].keys() == shapes_of(tiny.shvit())["params"].keys()
  assert trees.differences(shapes_of(model), shapes_of(tiny.shvit())) == []
