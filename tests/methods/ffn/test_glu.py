"""Gated FFNs: the equations, the published counts, cFFN inside, and what is rejected."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import vitcompact as vc
from tests import tiny
from tests.models import pyramids
from vitcompact import layers, trees
from vitcompact.block import make_ffn
from vitcompact.execution import Execution
from vitcompact.methods import protocol
from vitcompact.methods.ffn.cffn import hidden_rms

ACTS = {"sigmoid": scipy.special.expit, "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x * scipy.special.expit(x), "identity": lambda x: x,
        "gelu": lambda x: x * scipy.special.ndtr(x)}
# (parameters, MACs / 1e9): from the specification.
ROWS = {
    ("deit_tiny_patch16_224", vc.GLU()): (5_720_488, 1.2537),
    ("deit_tiny_patch16_224", vc.ConvGLU()): (5_781_928, 1.2645),
    ("deit_small_patch16_224", vc.GLU()): (22_056_808, 4.5989),
    ("deit_small_patch16_224", vc.ConvGLU()): (22_179_688, 4.6206),
    ("deit_base_patch16_224", vc.GLU()): (86_579_944, 17.5638),
    ("deit_base_patch16_224", vc.ConvGLU()): (86_825_704, 17.6072),
    ("pvt_v2_b0", vc.ConvGLU()): (3_650_192, 0.5571),
    ("pvt_v2_b1", vc.ConvGLU()): (13_977_472, 2.0908),
    ("pvt_v2_b2", vc.ConvGLU()): (25_299_736, 3.9953),
}
# Width 24 and 4 x 4 patches after a class token; m = 96, m' = 64.
SITE = tiny.site()


def by_definition(params, x, act, prefix=0, grid=None):
  """(act(DW(x W_g + b_g)) * (x W_v + b_v)) W_o + b_o in float64, by loops over places and taps."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  both = np.asarray(x, np.float64) @ params["fc1"]["kernel"] + params["fc1"]["bias"]
  m = both.shape[-1] // 2
  gate, value = both[..., :m].copy(), both[..., m:]
  if grid is not None:
    conv, (height, width) = params["mixer"]["conv"], grid
    seen = gate[:, prefix:].reshape(len(gate), height, width, m)
    out = np.zeros_like(seen) + conv["bias"]
    for row in range(height):
      for column in range(width):
        for i in (-1, 0, 1):
          for j in (-1, 0, 1):
            if 0 <= row + i < height and 0 <= column + j < width:
              out[:, row, column] += (seen[:, row + i, column + j]
                                      * conv["kernel"][i + 1, j + 1, 0])
    gate[:, prefix:] = out.reshape(len(gate), -1, m)
  return act(gate) * value @ params["fc2"]["kernel"] + params["fc2"]["bias"]


def ffn(method, site=SITE, seed=0):
  """Returns (module, random parameters, tokens) of one gated FFN."""
  module = make_ffn(site, method)
  x = tiny.normal(2, site.queries, site.ffn_width, seed=seed)
  return module, tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), x)), x


@pytest.mark.parametrize("act", ACTS)
def test_glu_output_is_the_gate_times_the_value(act):
  module, variables, x = ffn(vc.GLU(act))
  got = jax.jit(module.apply)(variables, x)
  np.testing.assert_allclose(got, by_definition(variables["params"], x, ACTS[act]), atol=1e-5)


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("prefix,grid", [(1, (4, 4)), (0, (2, 5)), (2, (3, 2))])
def test_convglu_convolves_the_gate_over_the_grid_and_skips_prefix_tokens(act, prefix, grid):
  site = tiny.site(prefix=prefix, query_grid=grid, tokens=prefix + grid[0] * grid[1])
  module, variables, x = ffn(vc.ConvGLU(act), site)
  expected = by_definition(variables["params"], x, ACTS[act], prefix, grid)
  np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, atol=1e-5)
  if prefix == 0:      # hybrid models pass maps
    map_bhwc = x.reshape(2, *grid, -1)
    of_map, of_tokens = jax.jit(lambda *inputs: [module.apply(variables, x) for x in inputs])(
        map_bhwc, x)
    np.testing.assert_array_equal(np.reshape(of_map, x.shape), of_tokens)


def test_constant_gate_of_one_gives_a_linear_layer():
  module, variables, x = ffn(vc.GLU("identity"))
  params = jax.tree.map(np.array, variables["params"])
  kernel, bias = params["fc1"]["kernel"], params["fc1"]["bias"]
  kernel[:, :64] = 0
  bias[:64] = 1
  got = jax.jit(module.apply)({"params": params}, x)
  product = kernel[:, 64:] @ params["fc2"]["kernel"]
  shift = bias[64:] @ params["fc2"]["kernel"] + params["fc2"]["bias"]
  np.testing.assert_allclose(got, x @ product + shift[None, None], atol=1e-5)


def test_convglu_with_only_a_centre_tap_is_a_geglu():
  module, variables, x = ffn(vc.ConvGLU())
  params = variables["params"]
  centre = np.zeros((3, 3, 1, 64), np.float32)
  centre[1, 1] = 1
  conv = {"kernel": centre, "bias": np.zeros(64, np.float32)}
  got = jax.jit(module.apply)({"params": {**params, "mixer": {"conv": conv}}}, x)
  geglu = jax.jit(make_ffn(SITE, vc.GLU("gelu")).apply)(
      {"params": {name: params[name] for name in ("fc1", "fc2")}}, x)
  np.testing.assert_allclose(got, geglu, atol=1e-6)


@pytest.mark.parametrize("name,method", ROWS)
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name, method):
  params, gmacs = ROWS[name, method]
  count = vc.count(vc.create_model(name, plan=vc.Plan(ffn=method), deploy=True))
  assert count.params == params and abs(count.macs / 1e9 / gmacs - 1) < 1e-3


@pytest.mark.parametrize("multiple,widths", [(1, [341, 682, 853, 1365]),
                                             (8, [344, 680, 856, 1368])])
def test_hidden_width_is_two_thirds_rounded_to_the_nearest_multiple(multiple, widths):
  method = vc.ConvGLU(multiple=multiple)
  model = vc.create_model("pvt_v2_b1", plan=vc.Plan(ffn=method))
  assert [method.hidden(site) for site in model.sites()][::2] == widths
  assert method.hidden(tiny.site(hidden=3)) == (2 if multiple == 1 else 8)


def test_initialisation_matches_the_published_one():
  site = tiny.site(ffn_width=64, hidden=384)
  x = np.zeros((1, 17, 64), np.float32)
  init = jax.jit(make_ffn(site, vc.ConvGLU()).init)
  params = jax.device_get(init(jax.random.key(0), x)["params"])
  for name, leaf in trees.named_leaves(params).items():
    if name.endswith("bias"):
      assert not leaf.any(), name
    else:
      expected = (2 / 9) ** 0.5 if "conv" in name else 0.02
      assert 0.95 * expected < leaf.std() < 1.05 * expected, name
      assert abs(leaf.mean()) < 0.1 * expected, name


@pytest.mark.parametrize("method", [vc.GLU("gelu"), vc.ConvGLU()])
def test_new_factorised_fc2_has_the_output_spread_of_the_dense_one(method):
  site = tiny.site(ffn_width=64, hidden=384, query_grid=(16, 16), tokens=257)
  x = tiny.normal(2, 257, 64)
  spread = []
  for inner in (None, vc.CFFN()):
    module = make_ffn(site, type(method)(act="gelu", ffn=inner))
    # In training mode: at inference, wrong initial statistics and a wrong scale would cancel.
    init = jax.jit(functools.partial(module.init_with_output, train=True))
    spread.append(float(np.std(np.asarray(init(jax.random.key(1), x)[0]))))
  assert 0.8 < spread[1] / spread[0] < 1.25, spread


def test_spread_of_a_gated_layer_includes_the_gain_of_the_mixer():
  rng = np.random.default_rng(0)
  gate, value = 0.02 * 96 ** 0.5 * rng.standard_normal((2, 200_000))
  expected = np.sqrt(np.mean((ACTS["silu"](2 ** 0.5 * gate) * value) ** 2))
  np.testing.assert_allclose(hidden_rms(layers.swiglu, 96, 2), expected, rtol=0.02)


# Every kind of block that contains an FFN: prefix tokens, another grid, maps between batch norms.
MODELS = {
    "deit, glu": lambda **fields: tiny.deit(vc.Plan(ffn=vc.GLU(ffn=vc.CFFN())), **fields),
    "deit, both": lambda **fields: tiny.deit(
        vc.Plan(ffn=vc.GLU("sigmoid", ffn=vc.CFFN(factor="both"))), **fields),
    "deit, convglu": lambda **fields: tiny.deit(
        vc.Plan(heads=vc.HMHSA(), ffn=vc.ConvGLU(ffn=vc.CFFN())), **fields),
    "pvt": lambda **fields: pyramids.pvt(
        "pvt_small", vc.Plan(ffn=vc.ConvGLU()), **pyramids.SHORT, **fields),
    "pvt_v2": lambda **fields: pyramids.pvt(
        "pvt_v2_b2", vc.Plan(ffn=vc.ConvGLU(ffn=vc.CFFN())), **pyramids.SHORT, **fields),
    "nextvit": lambda **fields: vc.create_model(
        "nextvit_small", plan=vc.Plan(ffn=vc.ConvGLU()), image_size=32, num_classes=5,
        stem_widths=(8, 4, 8, 8), widths=(8, 24, 24, 24), depths=(1, 1, 0, 0),
        periods=(0, 1, 0, 1), head_dim=8, **fields),
}


# "deit, convglu" has a class token beside the grid, as PVT v1 does, and PVT v2 has another grid.
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "pvt")) for name in MODELS])
def test_it_trains_folds_saves_and_converts_to_pytorch_in_every_family(name, tmp_path):
  model = MODELS[name](drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model)

  def loss(params):
    out, _ = tiny.apply(model, {**variables, "params": params}, x, train=True,
                        mutable=["batch_stats"])
    return jnp.sum(jnp.sin(out))

  # In PVT v1 only the class token leaves the last block, and it skips the convolution.
  dead = {"pvt": ["blocks_1/mlp/mixer"]}.get(name, []) + ["key/bias"]
  grads = jax.device_get(jax.jit(jax.grad(loss))(variables["params"]))
  for leaf, grad in trees.named_leaves(grads).items():
    assert np.isfinite(grad).all(), leaf
    assert np.any(grad) or any(word in leaf for word in dead), leaf
  rules = trees.first_match(model.parameter_rules(), variables["params"], may_be_idle=True)
  decay = trees.named_leaves(jax.tree.map(lambda rule: rule.decay, rules,
                                          is_leaf=lambda rule: isinstance(rule, trees.Leaf)))
  assert {leaf for leaf in decay if "/mlp/" in leaf and decay[leaf]} == {
      leaf for leaf in decay if "/mlp/" in leaf and leaf.endswith("kernel")}
  deploy, folded = tiny.fold(model, variables)
  proof = vc.verify(model, variables, deploy, folded, x, tolerance=3e-5)
  assert proof.ok and proof.first_difference is None, proof
  shapes = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, shapes) == []
  for some, values in ((model, variables), (deploy, folded)):
    vc.save(tmp_path / f"{some.deploy}.safetensors", some, values)
    loaded, again = vc.load(tmp_path / f"{some.deploy}.safetensors")
    assert loaded == some and trees.digest(again) == trees.digest(values)
  # Neither a cFFN's branches nor a Next-ViT without its norms has a PyTorch form.
  some, values = (model, variables) if name == "nextvit" else (deploy, folded)
  state = vc.to_torch(some, values)
  assert trees.digest(vc.from_torch(some, state)) == trees.digest(values)


def test_pytorch_files_have_the_expected_names_and_layouts():
  model = tiny.deit(vc.Plan(ffn=vc.ConvGLU(ffn=vc.CFFN())), deploy=True)
  variables = tiny.init(model)
  state, mlp = vc.to_torch(model, variables), variables["params"]["blocks_1"]["mlp"]
  assert {name.removeprefix("blocks.1.mlp."): array.shape for name, array in state.items()
          if name.startswith("blocks.1.mlp.")} == {
      "fc1.weight": (128, 24), "fc1.bias": (128,), "dwconv.weight": (64, 1, 3, 3),
      "dwconv.bias": (64,), "fc2.a.weight": (12, 64), "fc2.b.weight": (24, 12), "fc2.b.bias": (24,)}
  np.testing.assert_array_equal(state["blocks.1.mlp.dwconv.weight"][:, 0],
                                np.moveaxis(np.asarray(mlp["mixer"]["conv"]["kernel"])[:, :, 0],
                                            -1, 0))


def test_factors_can_be_deployed_as_one_matrix():
  model = tiny.deit(vc.Plan(ffn=vc.GLU(ffn=vc.CFFN())),
                    execution=Execution(merged=("blocks_1/mlp/fc2",)))
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = tiny.fold(model, variables)
  assert folded["params"]["blocks_1"]["mlp"]["fc2"]["kernel"].shape == (64, 24)
  assert vc.verify(model, variables, deploy, folded, x, tolerance=3e-5).ok
  with pytest.raises(ValueError, match="does not factorise this layer"):
    tiny.deit(vc.Plan(ffn=vc.GLU(ffn=vc.CFFN())), execution=Execution(merged=("blocks_1/mlp/fc1",)))


def test_bfloat16_is_close_to_float32():
  model, low = (tiny.deit(vc.Plan(ffn=vc.ConvGLU()), dtype=dtype)
                for dtype in ("float32", "bfloat16"))
  variables, x = tiny.init(model), tiny.images(model)
  expected, got = (tiny.apply(some, variables, x) for some in (model, low))
  assert got.dtype == jnp.float32
  expected, got = np.asarray(expected), np.asarray(got)
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05
  conv = jax.eval_shape(functools.partial(
      low.apply, mutable=["intermediates"],
      capture_intermediates=lambda module, _: module.name == "conv"), variables, x)[1]
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(conv)} == {"bfloat16"}


def test_plan_with_an_inner_method_round_trips_through_json():
  plan = vc.Plan(ffn=vc.ConvGLU(multiple=8, ffn=vc.CFFN(rank_ratio=0.25)),
                 blocks={1: {"ffn": vc.GLU("relu")}})
  assert vc.Plan.from_json(plan.to_json()) == plan
  assert vc.CFFN(rank_ratio=0.25) in plan.methods()
  assert '"ffn": {"method": "cffn"' in plan.to_json()


def test_glu_remains_in_blocks_where_its_inner_method_does_not_act():
  plan = vc.Plan(ffn=vc.GLU(ffn=vc.CFFN(apply_to="attention_blocks")))
  model = vc.create_model("nextvit_small", plan=plan, image_size=64)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tiny.images(model, 1))["params"]
  hybrid = {site.block for site in model.sites() if "attention" in site.provides}
  for site in model.sites():
    mlp = shapes[f"blocks_{site.block}"]["mlp"]
    assert ("a0" in mlp["fc2"]) == (site.block in hybrid), site.block
    assert mlp["fc1"]["kernel"].shape[1] == 2 * int(2 * site.hidden / 3)


class Sized(vc.CFFN):
  """An inner method that records the sites it is asked about."""

  def needs(self, site):
    return {"class token": f"hidden is {site.hidden}"}

  def removes(self, site):
    return ("token order",)

  def at_size(self, site):
    return Sized(rank_ratio=site.hidden / 256)


def test_outer_method_forwards_questions_to_the_inner_one():
  method = vc.ConvGLU(ffn=Sized())
  assert protocol.needs(method, SITE) == {"grid": "use GLU() there", "class token": "hidden is 64"}
  assert protocol.removes(method, SITE) == ("token order",)
  assert protocol.mergeable(method, SITE) == ("fc2",)
  assert protocol.at_size(method, SITE).ffn == Sized(rank_ratio=0.25)
  plain = vc.GLU()
  assert [ask(plain, SITE) for ask in (protocol.needs, protocol.removes, protocol.mergeable)] == [
      {}, (), ()]
  assert protocol.at_size(plain, SITE) is plain


def eva(plan):
  return vc.create_model("eva02_tiny_patch14_224", image_size=28, depth=1, width=24, heads=2,
                         plan=plan)


@pytest.mark.parametrize("make,words", [
    (lambda: vc.GLU(act="tanh"), "GLU(act='tanh'): must be one of sigmoid, gelu, silu, relu"),
    (lambda: vc.ConvGLU(act=None), "ConvGLU(act=None): must be one of"),
    (lambda: vc.GLU(multiple=0), "GLU(multiple=0): must be a whole number of at least 1"),
    (lambda: vc.GLU(multiple=True), "must be a whole number"),
    (lambda: vc.Plan(ffn=vc.GLU(ffn="cffn")), "Plan, GLU: ffn='cffn' is not a method of this axis"),
    (lambda: vc.Plan(ffn=vc.GLU(ffn=vc.HMHSA())), "is not a method of this axis; use CFFN"),
    (lambda: eva(vc.Plan(ffn=vc.GLU())), "GLU in block 0: the FFN is gated already; use ffn=None"),
    (lambda: tiny.deit(vc.Plan(ffn=vc.GLU(ffn=vc.GLU()))), "the FFN is gated already"),
    (lambda: pyramids.pvt("pvt_v2_b2", vc.Plan(ffn=vc.GLU())),
     "GLU in block 0: this FFN has a convolution, from which the model learns positions, and "
     "a GLU has none; use ConvGLU()"),
    (lambda: tiny.deit(vc.Plan(ffn=vc.ConvGLU(), tokens=vc.EViT(0.5, blocks=(0,)))),
     "ConvGLU() in block 0 needs the whole grid of tokens, which "
     "EViT(keep=0.5, blocks=(0,)) removes from block 0 onward; use GLU() there"),
    (lambda: tiny.deit(vc.Plan(ffn=vc.ConvGLU(), tokens=vc.ToMe(3))), "use GLU() there"),
    (lambda: tiny.deit(vc.Plan(ffn=vc.ConvGLU(ffn=vc.CFFN(factor="both")))),
     "ConvGLU in block 0: only fc2 may be factorised, since gate and value would share the rank"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", [vc.GLU(), vc.ConvGLU(ffn=vc.CFFN())])
@pytest.mark.parametrize("calibrated", [False, True])
def test_compacting_a_dense_model_to_it_is_rejected_with_the_reason(method, calibrated):
  dense = tiny.deit()
  variables, images = tiny.init(dense), tiny.images(dense)
  plan = vc.Plan(blocks={0: {"ffn": method}})
  with pytest.raises(ValueError) as error:
    vc.compact(dense, variables, plan, images=images if calibrated else None)
  assert str(error.value) == (
      f"{type(method).__name__} in block 0: a dense FFN cannot become a gated one, which is a "
      "product of two projections; train it from scratch: create_model(NAME, plan=plan)")


def test_it_is_never_proposed():
  assert protocol.options(vc.GLU, SITE) == protocol.options(vc.ConvGLU, SITE) == []


def test_inner_method_changes_only_its_own_matrix():
  """The gate is unchanged, so a GLU with a full-rank cFFN can equal the plain GLU."""
  site = tiny.site(ffn_width=24)
  plain, variables, x = ffn(vc.GLU(), site)
  inner = vc.CFFN(rank_ratio=1.0, rep="none", branches=1, avg_skip=False)
  params = variables["params"]
  factored = {"a0": {"kernel": params["fc2"]["kernel"]},
              "b0": {"kernel": np.eye(24, dtype=np.float32)}, "bias": params["fc2"]["bias"]}
  got = jax.jit(make_ffn(site, vc.GLU(ffn=inner)).apply)(
      {"params": {**params, "fc2": factored}}, x)
  np.testing.assert_allclose(got, tiny.apply(plain, variables, x), atol=1e-5)
