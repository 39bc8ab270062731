"""TransNeXt: the published counts, the authors' logits, both forms of aggregated attention."""
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity
from vitcompact import attention, layers, trees
from vitcompact.count import macs_of
from vitcompact.models import pyramid, transnext_attention, transnext_blocks
from vitcompact.models.transnext_attention import Aggregation, Local
from vitcompact.tune import calls_with_forms

# (published GMACs, drop path): from the authors' tables and configs.
ROWS = {"transnext_micro": (2.7, 0.15), "transnext_tiny": (5.7, 0.25),
        "transnext_small": (10.3, 0.45), "transnext_base": (18.4, 0.6)}
GMACS_384 = {"transnext_small": 32.1, "transnext_base": 56.3}
RUNS = parity.runs("transnext")


@functools.cache
def random_inputs(model):
  return tiny.init(model), tiny.images(model)


def operations(module, x) -> tuple[int, int]:
  """Returns (multiply-adds, elements that layer norms see) for one image."""
  normed = []

  def watch(next_fun, args, kwargs, context):
    if isinstance(context.module, layers.LayerNorm):
      normed.append(math.prod(args[0].shape))
    return next_fun(*args, **kwargs)

  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  with nn.intercept_methods(watch):
    return macs_of(module.apply, variables, x).total, sum(normed)


def total_operations(name, image_size=224):
  """Returns those of a named model, whose blocks within a stage are equal."""
  depths = vc.create_model(name).depths
  short = vc.create_model(name, depths=(1, 1, 1, 1), image_size=image_size)
  total = np.array(operations(short, tiny.images(short, 1)))
  for (site, block), depth in zip(((site, short.submodules()[f"blocks_{site.block}"])
                                   for site in short.sites()), depths, strict=True):
    x = jax.ShapeDtypeStruct((1, site.queries, site.width), jnp.float32)
    total += (depth - 1) * np.array(operations(block, x))
  return total


@pytest.mark.parametrize("name", tiny.named(ROWS, "transnext_micro"))
def test_macs_match_the_published_ones_and_rates_the_authors(name):
  """Adds five operations per layer norm element, as common counters do. The published figures have
  one decimal, which for Micro is 2 %."""
  macs, normed = total_operations(name)
  published = ROWS[name][0]
  assert abs((macs + 5 * normed) / 1e9 / published - 1) < max(0.01, 0.05 / published)
  assert vc.create_model(name).drop_path_rate == ROWS[name][1]
  if name in GMACS_384:
    assert abs(total_operations(name, 384)[0] / 1e9 / GMACS_384[name] - 1) < 0.01


def test_macs_of_equal_blocks_add_up():
  model = vc.create_model("transnext_micro")
  assert vc.count(model).macs == total_operations("transnext_micro")[0]


@pytest.mark.parametrize("form", [None, "einsum"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_logits_match_the_authors_code(run, form):
  with attention.using(form):
    assert parity.difference(run) < 1e-5 * np.abs(run.expected).max()


@pytest.mark.parametrize("epsilon,wrong", [("EPSILON", 1e-5), ("CONV_EPSILON", 1e-6)])
def test_probe_weights_reveal_a_wrong_epsilon(monkeypatch, epsilon, wrong):
  monkeypatch.setattr(pyramid, epsilon, wrong)
  probed = next(run for run in RUNS if run.name.endswith("probed"))
  assert parity.difference(probed, retrace=True) > 0.01


def test_weights_round_trip_through_pytorch_bit_for_bit_under_the_authors_names():
  run = RUNS[0]
  variables = vc.from_torch(run.model, run.state)
  back = vc.to_torch(run.model, variables)
  assert back.keys() == run.state.keys()
  assert all(np.array_equal(back[name], run.state[name]) for name in back)
  assert vc.to_torch(run.model, variables, names="authors").keys() == back.keys()
  assert {"block1.0.attn.kv.weight", "block1.0.attn.learnable_tokens", "block4.0.attn.qkv.bias",
          "block3.1.attn.cpb_fc2.weight", "block2.0.mlp.dwconv.dwconv.bias"} <= back.keys()
  # No positions are stored: the same weights serve every image size.
  large = run.model.clone(image_size=128)
  assert trees.digest(vc.from_torch(large, run.state)) == trees.digest(variables)


# Aggregated attention.

GRID, KEYS, HEADS, WIDTH = (4, 6), (2, 3), 2, 5
COUNT, POOLED = math.prod(GRID), math.prod(KEYS)


def call_of(local=True, grid=GRID, batch=2, seed=0, value_width=WIDTH):
  """Returns a random (Aggregation, query, key, value)."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  tokens, keys = math.prod(grid), POOLED + (math.prod(grid) if local else 0)
  near = Local(draw(HEADS, 9), draw(HEADS, WIDTH, 9), draw(HEADS, 1, 9)) if local else None
  call = Aggregation(grid, draw(HEADS, 1, 1), draw(HEADS, 1, WIDTH), draw(HEADS, tokens, POOLED),
                     near)
  return (call, draw(batch, tokens, HEADS, WIDTH), draw(batch, keys, HEADS, WIDTH),
          draw(batch, keys, HEADS, value_width))


def by_definition(call, query, key, value):
  """Returns (outputs, maps): query by query in float64, over lists of the keys that each sees."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  count = math.prod(call.grid) if call.local is not None else 0
  out = np.zeros((*query.shape[:3], value.shape[-1]))
  maps = np.zeros((query.shape[0], HEADS, query.shape[1], (9 if count else 0) + POOLED))
  unit = lambda x: x / np.linalg.norm(x)   # noqa: E731
  temperature = np.log1p(np.exp(np.asarray(call.temperature, np.float64)))[:, 0, 0]
  for b, i, h in np.ndindex(query.shape[:3]):
    row, column = divmod(i, call.grid[1])
    seen = []      # (index in the map, key, bias)
    for j, (down, right) in enumerate((r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)):
      y, x = row + down, column + right
      if count and 0 <= y < call.grid[0] and 0 <= x < call.grid[1]:
        seen.append((j, y * call.grid[1] + x, call.local.bias[h, j]))
    near = len(seen)
    seen += [((9 if count else 0) + p, count + p, call.bias[h, i, p]) for p in range(POOLED)]
    own = unit(query[b, i, h])
    scaled = (own + np.asarray(call.embedding[h, 0])) * temperature[h] * np.log(len(seen))
    scores = np.array([scaled @ unit(key[b, k, h]) + bias for _, k, bias in seen])
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    for at, ((place, k, _), weight) in enumerate(zip(seen, weights, strict=True)):
      maps[b, h, i, place] = weight
      if at < near:
        weight = (weight + own @ np.asarray(call.local.tokens[h, :, place])
                  + call.local.token_bias[h, 0, place])
      out[b, i, h] += weight * value[b, k, h]
  return out, maps


@pytest.mark.parametrize("local,value_width", [(True, WIDTH), (False, WIDTH), (True, 3)])
def test_both_forms_match_the_definition(local, value_width):
  call, *arrays = call_of(local, value_width=value_width)
  expected, maps = by_definition(call, *arrays)
  for form in (transnext_attention.reference, transnext_attention.shifted):
    np.testing.assert_allclose(jax.jit(functools.partial(form, call))(*arrays), expected, atol=2e-5)
  np.testing.assert_allclose(call.maps(attention.DENSE, *arrays[:2]), maps, atol=1e-5)
  np.testing.assert_allclose(call.maps(attention.DENSE, *arrays[:2]).sum(-1), 1, atol=1e-6)
  # As a core, image by image as on a CPU, and with sums as on accelerators.
  core = attention.DENSE._replace(operator=call)
  for device in ("cpu", "gpu"):
    with attention.on(attention.Device(device)):
      np.testing.assert_allclose(core(*arrays), expected, atol=2e-5)


def test_forms_have_equal_gradients_and_scores_of_any_size_do_not_overflow():
  call, *arrays = call_of()
  call = call._replace(temperature=call.temperature + 1)
  both = []
  for form in (transnext_attention.reference, transnext_attention.shifted):
    def loss(leaves, *arrays, form=form):
      local = Local(*leaves[3:])
      own = Aggregation(GRID, *leaves[:3], local)
      return jnp.sum(jnp.sin(form(own, *arrays)))

    leaves = (call.temperature, call.embedding, call.bias, *call.local)
    both.append(jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(leaves, *arrays)))
  assert len(both[0]) == 9 and all(np.any(leaf) for leaf in both[0])
  for one, other in zip(*both, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
  sharp = call._replace(temperature=call.temperature + 300, bias=call.bias * 100)
  assert np.isfinite(transnext_attention.shifted(sharp, *arrays)).all()
  assert np.isfinite(transnext_attention.shifted(call, 0 * arrays[0], *arrays[1:])).all()


def test_requested_form_is_traced():
  call, *arrays = call_of()
  core = attention.DENSE._replace(operator=call)

  def operations(form, device="cpu", batch=2):
    with attention.using(form), attention.on(attention.Device(device)):
      return str(jax.make_jaxpr(core.__call__)(*(x[:batch] for x in arrays)))

  assert "concatenate" in operations("plain") and "scan" not in operations("plain")
  assert operations("einsum") == operations("plain")
  assert "scan" in operations(None) and "scan" not in operations(None, batch=1)
  assert "scan" not in operations(None, "gpu")


def test_distances_are_log_spaced_and_biases_match_query_and_key_positions():
  grid, keys, reference = (4, 6), (2, 3), (5, 9)
  places = transnext_attention.distances(grid, keys, reference)
  assert places.shape == (6, 10, 2) and places.dtype == np.float32
  table = np.concatenate([places, places[..., :1] * 0 + 1], axis=-1)
  out = np.asarray(transnext_attention.bias(jnp.asarray(table), grid, keys))
  assert out.shape == (3, 24, 6) and (out[2] == 1).all()
  for i, p in np.ndindex(24, 6):
    for axis, (q, k) in enumerate(zip(divmod(i, 6), divmod(p, 3), strict=True)):
      x = 8 * (q - (2 * k + 0.5)) / (reference[axis] - 1)      # a key averages two cells
      expected = np.sign(x) * np.log2(abs(x) + 1) / 3
      np.testing.assert_allclose(out[axis, i, p], expected, atol=1e-6)


def test_pooled_keys_are_cell_means_taken_before_the_norm():
  module = transnext_blocks.Pool((4, 6), (2, 3))
  x = jax.random.normal(jax.random.key(0), (2, 24, 8))
  variables = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), x))
  proj = variables["params"]["proj"]
  hidden = layers.gelu(x @ proj["kernel"] + proj["bias"][None, None]).reshape(2, 2, 2, 3, 2, 8)
  norm = variables["params"]["norm"]
  expected = layers.layer_norm(hidden.mean(axis=(2, 4)).reshape(2, 6, 8), norm["scale"],
                               norm["bias"], 1e-5)
  np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)


# The model.


def test_its_ffns_equal_a_plain_site_with_the_convglu_method():
  site = tiny.transnext(widths=(64, 64), mlp_ratios=(8, 4)).sites()[0]
  plain = tiny.site(width=64, ffn_width=64, hidden=512, query_grid=(6, 10), prefix=0)
  method = vc.ConvGLU().inner_site(plain)
  fields = ("hidden", "act", "mixer_gain", "fc1_width")
  assert all(getattr(site, name) == getattr(method, name) for name in fields)
  assert site.mixer(parent=None) == method.mixer(parent=None)


def test_initialisation_matches_the_published_one():
  model = tiny.transnext(widths=(64, 80), heads=(2, 4))
  params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), tiny.images(model, 1))["params"]
  for name, leaf in trees.named_leaves(jax.device_get(params)).items():
    if name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif name.endswith("temperature"):
      np.testing.assert_allclose(np.log1p(np.exp(leaf)), 1 / 0.24, rtol=1e-5)
    elif name.endswith(("/bias", "token_bias")):
      assert (leaf == 0).all(), name
    else:
      # Convolutions: 2 / (kernel area * output channels per group).
      expected = 4e-4 if "local_bias" in name else 0.02
      if leaf.ndim == 4:
        area = leaf.shape[0] * leaf.shape[1]
        expected = (2 / (area * (1 if "mixer" in name else leaf.shape[-1]))) ** 0.5
      elif name.endswith("pool/proj/kernel"):
        expected = (2 / 64) ** 0.5
      slack = 0.15 if leaf.size > 300 else 0.6
      assert 1 - slack < leaf.std() / expected < 1 + slack, name


def test_images_of_any_valid_size_run_without_another_model():
  model = tiny.transnext()
  variables, _ = random_inputs(model)
  for size in ((24, 40), (64, 16), (8, 8)):
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape == (2, 5)
    assert trees.differences(jax.eval_shape(model.init, jax.random.key(0), images), variables) == []
  x = tiny.images(model.clone(image_size=(16, 32)))
  other = model.clone(image_size=(16, 32))
  np.testing.assert_array_equal(tiny.apply(model, variables, x), tiny.apply(other, variables, x))


PLANS = {"dense": vc.Plan(), "cffn": vc.Plan(ffn=vc.CFFN())}


@pytest.mark.parametrize("plan", PLANS)
def test_folding_keeps_the_function_and_removes_the_position_network(plan, tmp_path):
  model = tiny.transnext(PLANS[plan])
  variables, x = random_inputs(model)
  deploy, folded = tiny.fold(model, variables)
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.ok and proof.first_difference is None, proof
  shapes = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, shapes) == [] and "batch_stats" not in folded
  cosine = folded["params"]["blocks_0"]["cosine"]
  # 2 * 6 - 2 and 2 * 10 - 2 distances from a query to the mean of two cells.
  assert cosine["positions"].shape == (10, 18, 2) and "position_1" not in cosine
  again, twice = vc.fold(deploy, folded)
  assert again == deploy and trees.digest(twice) == trees.digest(folded)
  for some, values in ((model, variables), (deploy, folded)):
    vc.save(tmp_path / f"{some.deploy}.safetensors", some, values)
    loaded, values_again = vc.load(tmp_path / f"{some.deploy}.safetensors")
    assert loaded == some and trees.digest(values_again) == trees.digest(values)
  with pytest.raises(ValueError, match="stores position biases for 24 x 40 pixels; fold"):
    tiny.apply(deploy, folded, x[:, :, :24])


def test_folding_removes_only_the_position_network():
  model = tiny.transnext()
  unfolded, folded = vc.count(model), vc.count(model.clone(deploy=True))
  network = sum(rows * columns * 512 * (2 + heads)
                for rows, columns, heads in ((10, 18, 2), (5, 9, 4)))
  assert unfolded.macs - folded.macs == network
  assert unfolded.ideal_macs == folded.ideal_macs == folded.macs
  # Scores, values, learned tokens: per query 9 + 15 pooled keys of 8 channels, and 15 of 16.
  assert folded.attention_macs == 60 * 8 * (2 * (9 + 15) + 9) + 15 * 16 * 2 * 15


@pytest.mark.filterwarnings("ignore:blocks_:UserWarning")    # full rank saves nothing
def test_compacting_at_full_rank_is_the_dense_model_and_changes_only_wo():
  model = tiny.transnext()
  variables, x = random_inputs(model)
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=1))
  got, got_variables = vc.compact(model, variables, plan, images=jnp.concatenate([x, x, x]))
  shapes = jax.eval_shape(got.init, jax.random.key(0), x)
  assert trees.differences(got_variables, shapes) == []
  assert vc.verify(model, variables, got, got_variables, x, tolerance=1e-4).ok
  old, new = (trees.named_leaves(tree["params"]) for tree in (variables, got_variables))
  assert {name for name in old if old[name] is not new.get(name)} == {
      f"blocks_{i}/mlp/fc2/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")}


def test_measure_proposes_only_factors_of_wo():
  model = tiny.transnext(depths=(1, 0))
  variables, _ = random_inputs(model)
  report = vc.measure(model, variables, tiny.images(model, 16), sensitivity="none")
  row, = report.blocks
  assert {(option.axis, option.method.factor) for option in row["options"]} == {("ffn", "output")}
  assert {"attention_mass", "map_likeness", "token_similarity"} <= row["tables"].keys()


def test_features_and_maps_on_request():
  model = tiny.transnext()
  variables, x = random_inputs(model)
  out = jax.eval_shape(functools.partial(vc.features, model, maps=True), variables, x)
  assert {name: leaf.shape for name, leaf in out.features.items()} == {
      "stage_1": (3, 6, 10, 8), "stage_2": (3, 3, 5, 16)}
  # First the neighbours, then the pooled keys; in the last stage all tokens.
  assert [leaf.shape for leaf in jax.tree.leaves(out.maps)] == [(3, 2, 60, 24), (3, 4, 15, 15)]


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, variables, x):
  def loss(params):
    logits, _ = tiny.apply(model, {**variables, "params": params}, x, train=True,
                           rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    return jnp.sum(logits ** 2)
  return jax.grad(loss)(variables["params"])


def test_every_leaf_has_a_gradient_and_remat_changes_memory_not_results():
  model = tiny.transnext(drop_path_rate=0.0)
  remat = model.clone(remat=True)
  variables, x = random_inputs(model)
  grads, again = (trees.named_leaves(gradient(some, variables, x)) for some in (model, remat))
  for name, grad in grads.items():
    if name == "blocks_1/cosine/position_2/bias":   # adds the same to all keys of a softmax
      continue
    # Key biases matter here: they change the direction of the keys.
    assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, name
    np.testing.assert_allclose(again[name], grad, rtol=1e-3, atol=1e-3 * np.abs(grad).max())
  assert "remat" in str(jax.make_jaxpr(lambda v: gradient(remat, v, x))(variables))


def test_stochastic_depth_grows_linearly_over_all_stages():
  model = tiny.transnext(depths=(2, 3), drop_path_rate=0.4)
  blocks = model.submodules().values()
  np.testing.assert_allclose([block.drop_path for block in blocks], [0, 0.1, 0.2, 0.3, 0.4])


def test_bfloat16_is_close_to_float32_with_float32_outputs():
  model, low = tiny.transnext(), tiny.transnext(dtype="bfloat16")
  variables, x = random_inputs(model)
  expected, got = (tiny.apply(some, variables, x) for some in (model, low))
  assert got.dtype == jnp.float32
  got, expected = np.asarray(got), np.asarray(expected)
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


def test_every_leaf_has_one_rule_and_decays_as_in_the_authors_code():
  for model in (tiny.transnext(), tiny.transnext(PLANS["cffn"]), tiny.transnext(deploy=True)):
    params = tiny.init(model)["params"]
    rules = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
    decay = trees.named_leaves(jax.tree.map(lambda rule: rule.decay, rules,
                                            is_leaf=lambda rule: isinstance(rule, trees.Leaf)))
    # All except vectors, biases, and names containing one of the authors' listed words.
    words = r".*(query_embedding|local_bias|position_\d|positions|temperature).*"
    assert {name for name, yes in decay.items() if yes} == {
        name for name in decay
        if not re.fullmatch(words, name) and name.rsplit("/", 1)[-1] in (
            "kernel", "tokens", "token_bias")}


class Fewer(vc.HMHSA):
  """A method that does not need maps and scores fewer heads."""

  def needs(self, site):
    return {}

  def scored_heads(self, site):
    return site.heads // 2


@pytest.mark.parametrize("make,words", [
    (lambda: tiny.transnext(image_size=(24, 36)), "image_size=(24, 36): 36 is not a multiple of 8 "
     "(stages of [4, 8] pixels a token, keys pooled by (2, 1)); the nearest multiple: 32"),
    (lambda: vc.create_model("transnext_tiny", image_size=100), "the nearest multiple: 96"),
    (lambda: vc.create_model("transnext_tiny", pretrain_size=32), "needs two tokens on a side, "
     "which are 64 pixels"),
    (lambda: tiny.transnext(heads=(3, 4)), "3 does not divide 8"),
    (lambda: tiny.transnext(vc.Plan(heads=vc.HMHSA())), "needs attention maps over tokens, which "
     "transnext_tiny does not have; use heads=None"),
    (lambda: tiny.transnext(vc.Plan(attention=vc.Sparsifiner(min_tokens=0))),
     "needs every token to attend to all, which transnext_tiny does not have"),
    (lambda: tiny.transnext(vc.Plan(tokens=vc.ToMe(2))), "token reducers are for isotropic models"),
    (lambda: tiny.transnext(vc.Plan(ffn=vc.ConvGLU())), "the FFN is gated already"),
    (lambda: tiny.transnext(vc.Plan(ffn=vc.CFFN(factor="both"))),
     "block 0 of transnext_tiny has a gated FFN: only fc2 may be factorised"),
    (lambda: tiny.transnext().init(jax.random.key(0), jnp.zeros((1, 24, 30, 3))),
     "30 is not a multiple"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


class Masks(vc.Sparsifiner):
  """A method that states no needs but masks pairs of tokens."""

  def needs(self, site):
    return {}


def test_methods_that_drop_heads_or_change_who_attends_are_rejected(monkeypatch):
  monkeypatch.setitem(vc.METHODS["heads"], "fewer", Fewer)
  monkeypatch.setitem(vc.METHODS["attention"], "masks", Masks)
  with pytest.raises(ValueError, match="block 0 of transnext_tiny has its own parameters for each "
                                       "of its 2 heads"):
    tiny.transnext(vc.Plan(heads=Fewer()))
  with pytest.raises(ValueError, match="needs every token to attend to all, which transnext_tiny"):
    tiny.transnext(vc.Plan(attention=Masks(min_tokens=0)))


def test_method_that_gates_heads_works_in_every_stage(monkeypatch):
  from tests.methods.own.gate_heads import Gate
  monkeypatch.setitem(vc.METHODS["heads"], "gate", Gate)
  dense = tiny.transnext()
  variables, x = random_inputs(dense)
  gated, got = vc.compact(dense, variables, vc.Plan(heads=Gate()))    # initially all gates are 1
  np.testing.assert_allclose(tiny.apply(gated, got, x), tiny.apply(dense, variables, x), atol=1e-5)
  assert macs_of(gated.apply, got, x).total > macs_of(dense.apply, variables, x).total


def test_tune_finds_no_forms_for_attention_that_has_none():
  model = tiny.transnext(PLANS["cffn"], deploy=True)
  found = calls_with_forms(model, tiny.init(model), tiny.images(model))
  assert set(found) == {("blocks_0", "mlp", "fc2"), ("blocks_1", "mlp", "fc2")}
