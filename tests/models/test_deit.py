"""DeiT: the published counts, the architecture against an independent implementation, errors."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees

HEADS, FFN = {"heads": vc.HMHSA()}, {"ffn": vc.CFFN()}
# (parameters, MACs / 1e9) dense, heads, ffn, both: from the reconstruction's specification.
ROWS = {
    "deit_tiny_patch16_224": [(5_717_416, 1.2537), (5_421_040, 1.1667), (5_053_864, 1.1230),
                              (4_757_488, 1.0360)],
    "deit_small_patch16_224": [(22_050_664, 4.5989), (20_276_800, 4.1636), (19_396_456, 4.0760),
                               (17_622_592, 3.6407)],
    "deit_base_patch16_224": [(86_567_656, 17.5638), (79_480_984, 15.9961), (75_950_824, 15.4723),
                              (68_864_152, 13.9046)],
    "deit_tiny_distilled_patch16_224": [(5_910_800, 1.2610), (5_614_424, 1.1734),
                                        (5_247_248, 1.1296), (4_950_872, 1.0420)],
    "deit_small_distilled_patch16_224": [(22_436_432, 4.6241), (20_662_568, 4.1862),
                                         (19_782_224, 4.0986), (18_008_360, 3.6607)],
    "deit_base_distilled_patch16_224": [(87_338_192, 17.6568), (80_251_520, 16.0802),
                                        (76_721_360, 15.5547), (69_634_688, 13.9781)],
    "deit_base_patch16_384": [(86_859_496, 55.484)],
    "deit_base_distilled_patch16_384": [(87_630_032, 55.591)],
}


@pytest.mark.parametrize("name", tiny.named(
    ROWS, "deit_small_patch16_224", "deit_tiny_distilled_patch16_224"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  for (params, gmacs), axes in zip(ROWS[name], ({}, HEADS, FFN, {**HEADS, **FFN}), strict=False):
    count = vc.count(vc.create_model(name, plan=vc.Plan(**axes), deploy=True))
    assert count.params == params
    assert abs(count.macs / 1e9 / gmacs - 1) < 1e-3
    assert count.ideal_macs == count.macs


def plain_vit(params, images, heads, patch, distilled):
  """A second implementation of a ViT, written from the paper, with the same parameter names."""
  def linear(p, x):
    return x @ p["kernel"] + p["bias"][None, None]

  def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * p["scale"][None, None] + \
        p["bias"][None, None]

  b, side, _, c = images.shape
  n = side // patch
  x = images.reshape(b, n, patch, n, patch, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, n * n, -1)
  proj = params["patch_embed"]["proj"]
  x = x @ proj["kernel"].reshape(-1, proj["kernel"].shape[-1]) + proj["bias"][None, None]
  first = [params["cls_token"]] + ([params["dist_token"]] if distilled else [])
  x = jnp.concatenate([jnp.tile(t, (b, 1, 1)) for t in first] + [x], 1) + params["pos_embed"]
  for i in range(2):
    p = params[f"blocks_{i}"]
    y = norm(p["norm1"], x)
    total = p["attn"]["out"]["bias"][None, None]
    for h in range(heads):
      q, k, v = (y @ p["attn"][m]["kernel"][:, h] + p["attn"][m]["bias"][h][None, None]
                 for m in ("query", "key", "value"))
      a = q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5
      a = jnp.exp(a - a.max(-1, keepdims=True))
      total = total + (a / a.sum(-1, keepdims=True)) @ v @ p["attn"]["out"]["kernel"][h]
    x = x + total
    y = linear(p["mlp"]["fc1"], norm(p["norm2"], x))
    x = x + linear(p["mlp"]["fc2"], y * jax.scipy.stats.norm.cdf(y))
  x = norm(params["norm"], x)
  logits = linear(params["head"], x[:, :1])[:, 0]
  if distilled:
    return (logits + linear(params["head_dist"], x[:, 1:2])[:, 0]) / 2
  return logits


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_logits_match_an_independent_implementation(name):
  model = tiny.deit(name=name)
  variables, x = tiny.init(model), tiny.images(model)
  expected = jax.jit(plain_vit, static_argnums=(2, 3, 4))(variables["params"], x, 4, 8,
                                                          "distilled" in name)
  np.testing.assert_allclose(tiny.apply(model, variables, x), expected, atol=1e-4)


def test_empty_plan_is_the_dense_model_bit_for_bit():
  dense, planned = tiny.deit(), tiny.deit(vc.Plan(blocks={0: {"heads": None}, 1: {"ffn": None}}))
  variables, x = tiny.init(dense), tiny.images(dense)
  np.testing.assert_array_equal(tiny.apply(dense, variables, x),
                                tiny.apply(planned, variables, x))
  all_real = tiny.deit(vc.Plan(heads=vc.HMHSA(real_heads=4)))
  np.testing.assert_array_equal(tiny.apply(dense, variables, x),
                                tiny.apply(all_real, variables, x))


def test_initialisation_matches_the_published_one():
  model = vc.create_model("deit_tiny_patch16_224", depth=1, distilled=True)
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
  for name, leaf in trees.named_leaves(jax.device_get(params)).items():
    if "patch_embed" in name:      # torch's default for convolutions: uniform in 1/sqrt(fan in)
      bound = (16 * 16 * 3) ** -0.5
      assert 0.9 * bound < np.abs(leaf).max() <= bound, name
    elif name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif name.endswith("bias"):
      assert (leaf == 0).all(), name
    else:
      assert 0.017 < leaf.std() < 0.023, name


def test_initial_positions_have_the_requested_deviation():
  model = tiny.deit(position_std=0.5)
  fresh = jax.jit(model.init)(jax.random.key(0), tiny.images(model))["params"]
  dense = jax.jit(tiny.deit().init)(jax.random.key(0), tiny.images(model))["params"]
  np.testing.assert_allclose(fresh["pos_embed"], 25 * dense["pos_embed"], rtol=1e-5)


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
  blocks = vc.create_model("deit_small_patch16_224").submodules().values()
  np.testing.assert_allclose([block.drop_path for block in blocks], np.linspace(0, 0.1, 12))
  model = tiny.deit(drop_path_rate=0.5)
  variables, x = tiny.init(model), tiny.images(model, batch=1)
  apply = jax.jit(jax.vmap(lambda key: tiny.apply(model, variables, x, train=True,
                                                  rngs={"dropout": key})[0]))
  draws = apply(jax.random.split(jax.random.key(0), 64))
  # The last block's two branches drop independently and block 0 never drops: four distinct outputs.
  assert len(np.unique(np.round(draws[:, 0], 4))) == 4
  np.testing.assert_array_equal(
      jax.jit(functools.partial(model.apply, train=True))(
          variables, x, rngs={"dropout": jax.random.key(3)}).shape, (1, 5))


def test_surviving_branches_are_scaled_to_keep_the_mean():
  from vitcompact.layers import DropPath
  x = jnp.ones((20_000, 1))
  y = DropPath(0.3).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
  assert abs(y.mean() - 1) < 0.02
  np.testing.assert_array_equal(DropPath(0.3).apply({}, x), x)


def test_training_a_distilled_model_returns_both_heads():
  model = tiny.deit(name="deit_tiny_distilled_patch16_224", drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model)
  both = tiny.apply(model, variables, x, train=True)
  np.testing.assert_allclose(tiny.apply(model, variables, x), (both[0] + both[1]) / 2, atol=1e-6)
  assert jnp.abs(both[0] - both[1]).max() > 0.1


@pytest.mark.parametrize("fields,shape", [
    ({"num_classes": 0}, (3, 24)), ({"num_classes": 0, "global_pool": "avg"}, (3, 24)),
    ({"num_classes": 0, "global_pool": ""}, (3, 17, 24)), ({"global_pool": "avg"}, (3, 5)),
    ({"image_size": (16, 40), "in_chans": 1}, (3, 5)), ({"dtype": "bfloat16"}, (3, 5))])
def test_input_and_output_options(fields, shape):
  model = tiny.deit(**fields)
  out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), tiny.images(model)))
  assert out[0].shape == shape and out[0].dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(out[1])} == {jnp.dtype("float32")}


def test_average_pooling_excludes_the_class_token_and_normalises_afterwards():
  model = tiny.deit(num_classes=0, global_pool="avg")
  tokens = tiny.deit(num_classes=0, global_pool="")
  variables, x = tiny.init(model), tiny.images(model)
  identity = {"scale": jnp.ones(24), "bias": jnp.zeros(24)}
  params = {**variables["params"], "fc_norm": identity}
  got = tiny.apply(model, {"params": params}, x)
  seen = tokens.apply({"params": {**variables["params"], "norm": identity}}, x,
                      mutable="intermediates", capture_intermediates=lambda m, _:
                      m.name == "blocks_1")[1]["intermediates"]["blocks_1"]["__call__"][0]
  pooled = seen.x[:, 1:].mean(1)
  np.testing.assert_allclose(got, nn.standardize(pooled, axis=-1, epsilon=1e-6), atol=1e-4)


def test_remat_changes_memory_not_results():
  plan = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
  model, remat = tiny.deit(plan), tiny.deit(plan, remat=True)
  variables, x = tiny.init(model), tiny.images(model)
  assert trees.differences(tiny.init(remat), variables) == []

  def grad(m):
    def loss(params):
      out, stats = tiny.apply(m, {**variables, "params": params}, x, train=True,
                           rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
      return jnp.sum(out ** 2), stats
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

  for got, expected in zip(jax.tree.leaves(grad(remat)), jax.tree.leaves(grad(model)), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_close_to_float32():
  plan = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
  model = tiny.deit(plan)
  variables, x = tiny.init(model), tiny.images(model)
  expected = tiny.apply(model, variables, x)
  got = jax.jit(tiny.deit(plan, dtype="bfloat16").apply)(variables, x)
  got, expected = np.asarray(got), np.asarray(expected)
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_every_leaf_has_one_rule_and_matrices_and_distillation_token_decay(name):
  for plan in (vc.Plan(), vc.Plan(heads=vc.HMHSA(layout="grid"), ffn=vc.CFFN(factor="both")),
               vc.Plan(heads=vc.HMHSA(site="logits"), ffn=vc.CFFN(rep="scale"))):
    model = tiny.deit(plan, name=name)
    params = tiny.init(model)["params"]
    leaves = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
    decayed = [n for n, leaf in trees.named_leaves(jax.tree.map(
        lambda leaf: leaf.decay, leaves, is_leaf=lambda x: isinstance(x, trees.Leaf))).items()
        if leaf]
    expected = [n for n in trees.named_leaves(params) if n.endswith("/kernel") or n == "dist_token"]
    assert decayed == expected


@pytest.mark.parametrize("make,words", [
    (lambda: vc.create_model("deit_smal_patch16_224"), "did you mean deit_small_patch16_224"),
    (lambda: vc.create_model("resnet50"), "unknown model 'resnet50'"),
    (lambda: vc.create_model("deit_tiny_patch16_224", image_size=225), "the nearest multiple: 224"),
    (lambda: vc.create_model("deit_tiny_patch16_224", heads=5), "does not divide width=192"),
    (lambda: vc.create_model("deit_tiny_patch16_224", heads=0), "heads=0: must be a whole number"),
    (lambda: vc.create_model("deit_tiny_patch16_224", image_size=(8, 8, 8)), "or a pair of them"),
    (lambda: vc.create_model("deit_tiny_patch16_224", image_size="224"), "image_size='224': must"),
    (lambda: vc.create_model("pvt_tiny", heads=(1, 0, 5, 8)), "heads=(1, 0, 5, 8): must be whole"),
    (lambda: vc.create_model("deit_tiny_patch16_224", drop_path_rate=1), "drop_path_rate=1: must"),
    (lambda: vc.create_model("deit_tiny_patch16_224", num_classes=-1), "num_classes=-1: must be"),
    (lambda: vc.create_model("deit_tiny_patch16_224", dtype="float33"), "dtype='float33': must"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan="{}"), "plan='{}': must be a Plan"),
    (lambda: vc.create_model("deit_tiny_patch16_224", widht=5), "did you mean 'width'"),
    (lambda: vc.create_model("deit_tiny_patch16_224", global_pool="max"), "'avg', 'map', ''"),
    (lambda: tiny.deit().init(jax.random.key(0), jnp.zeros((1, 16, 32, 3))), "(B, 32, 32, 3)"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_names_can_be_listed_by_pattern():
  assert vc.list_models("deit_*_384") == ["deit_base_distilled_patch16_384",
                                          "deit_base_patch16_384"]
  assert "vit_large_patch16_224" in vc.list_models()
