"""BiFormer: the choice of regions, attention within them, local enhancement, and its cost.
"""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees
from vitcompact.attention import Core, tuning
from vitcompact.attention.block_sparse import routing
from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.windows import Windows
from vitcompact.block import Attention
from vitcompact.draw import attention as drawing
from vitcompact.methods.attention.sparsifiner import attention_reconstruction

BATCH, HEADS, WIDTH = 2, 3, 4
ROUTED = functools.partial(vc.BiFormer, regions=2, min_tokens=0)


def region_of(grid, side):
  """Returns (n,): the region of each token, row by row."""
  rows, columns = (np.arange(n) // -(-n // side) for n in grid)
  return (rows[:, None] * (columns[-1] + 1) + columns).reshape(-1)


def routing_by_definition(query, key, value, grids, side, prefix, top_k, scale):
  """Bi-level routing attention from its equations, one query at a time."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  regions = [region_of(grid, side) for grid in grids]
  out = np.zeros((*query.shape[:3], value.shape[3]))
  for b in range(len(query)):
    means = [np.stack([x[b, prefix:][region == r].reshape(-1, x.shape[2] * x.shape[3]).mean(axis=0)
                       for r in range(region.max() + 1)])
             for x, region in zip((query, key), regions, strict=True)]
    best = np.argsort(-means[0] @ means[1].T, axis=1)[:, :top_k]
    for n, h in itertools.product(range(query.shape[1]), range(query.shape[2])):
      seen = np.ones(key.shape[1], bool)
      if n >= prefix:
        seen[prefix:] = np.isin(regions[1], best[regions[0][n - prefix]])
      scores = key[b, seen, h] @ query[b, n, h] * scale
      weights = np.exp(scores - scores.max())
      out[b, n, h] = weights / weights.sum() @ value[b, seen, h]
  return out


@pytest.mark.parametrize("grids,side,prefix,top_k", [
    (((6, 6), (6, 6)), 3, 1, 2),         # 9 regions of 2 x 2
    (((6, 4), (6, 4)), 2, 0, 1),         # 4 regions of 3 x 2
    (((5, 7), (5, 7)), 3, 2, 4),         # padded: 2 x 3, the last regions have fewer tokens
    (((8, 8), (4, 4)), 4, 1, 5),         # keys on a coarser grid
    (((3, 4), (3, 4)), 7, 0, 6)])        # fewer tokens than regions per side
def test_query_sees_the_prefix_and_the_top_scoring_regions_of_its_own_region(grids, side, prefix,
                                                                          top_k):
  site = tiny.site(heads=HEADS, width=HEADS * WIDTH, prefix=prefix, query_grid=grids[0],
                   key_grid=grids[1])
  query, key, value = (tiny.normal(BATCH, prefix + np.prod(grid), HEADS, width, seed=seed)
                       for seed, (grid, width) in enumerate(zip((*grids, grids[1]), (4, 4, 5),
                                                                strict=True)))
  module = vc.BiFormer(top_k=top_k, regions=side).make(site)

  @jax.jit
  def run(query, key, value):
    core = module.apply({}, Core(), query, key)
    return core(query, key, value), core.layout.chosen

  out, chosen = run(query, key, value)
  assert chosen.shape[1:] == (HEADS, region_of(grids[0], side).max() + 1, top_k)
  np.testing.assert_allclose(
      out,
      routing_by_definition(query, key, value, grids, side, prefix, top_k, WIDTH ** -0.5),
      atol=2e-6)


def test_queries_see_64_patches_in_the_first_three_stages_of_the_paper():
  for side, top_k in ((56, 1), (28, 4), (14, 16)):
    windows = routing.regions((side, side), 7)
    chosen = np.broadcast_to(np.arange(top_k, dtype=np.int32), (1, 1, 49, top_k))
    mask = np.asarray(jax.jit(lambda chosen, windows=windows: BlockLayout(
        chosen, windows, windows, prefix=1).mask())(chosen))
    assert windows.blocks == 49 and (mask[0, 0, 1:].sum(axis=-1) == 65).all()
    assert mask[0, 0, 0].all() and mask[0, 0, :, 0].all()


def test_routing_to_all_regions_is_dense_attention():
  dense, x = tiny.deit(), tiny.images(tiny.deit())
  variables = tiny.init(dense)
  expected = tiny.apply(dense, variables, x)
  for method in (ROUTED(top_k=4), ROUTED(keep=1)):
    model = tiny.deit(vc.Plan(attention=method))
    np.testing.assert_array_equal(tiny.apply(model, variables, x), expected)
  assert vc.count(model) == vc.count(dense)
  query, key, value = (tiny.normal(BATCH, 17, HEADS, WIDTH, seed=seed) for seed in range(3))
  windows = routing.regions((4, 4), 2)

  @jax.jit
  def both(query, key, value):
    layout = routing.route(BlockLayout(None, windows, windows, prefix=1), query, key, 4)
    return Core(layout=layout)(query, key, value), Core()(query, key, value)

  np.testing.assert_allclose(*both(query, key, value), atol=1e-6)


def test_choice_of_regions_has_no_gradient():
  """The gradient is that of attention with the chosen regions fixed."""
  query, key, value = (tiny.normal(BATCH, 17, HEADS, WIDTH, seed=seed) for seed in range(3))
  module = ROUTED(top_k=2).make(tiny.site(heads=HEADS, width=HEADS * WIDTH))

  def loss(restrict, *qkv):
    return jnp.sum(jnp.sin(restrict(*qkv[:2])(*qkv)))

  @jax.jit
  def gradients(*qkv):
    chosen = module.apply({}, Core(), *qkv[:2])
    return [jax.grad(functools.partial(loss, restrict), (0, 1, 2))(*qkv) for restrict in (
        lambda q, k: module.apply({}, Core(), q, k), lambda q, k: chosen)]

  routed, fixed_choice = gradients(query, key, value)
  jax.tree.map(np.testing.assert_array_equal, routed, fixed_choice)
  assert all(np.abs(leaf).max() > 0.01 for leaf in routed)

  def score(q):
    layout = BlockLayout(None, *[routing.regions((4, 4), 2)] * 2, prefix=1)
    return jnp.sum(routing.route(layout, q, key, 2).chosen.astype(jnp.float32))
  assert not np.any(jax.jit(jax.grad(score))(query))


def test_permuting_the_regions_permutes_their_outputs():
  windows = routing.regions((6, 6), 3)
  query, key, value = (tiny.normal(BATCH, 36, HEADS, WIDTH, seed=seed) for seed in range(3))
  places = np.random.default_rng(0).permutation(9)

  def permute_regions(x):
    return windows.join(windows.cut(x)[:, :, places])

  def attend(*qkv):
    layout = BlockLayout(None, windows, windows)
    return Core(layout=routing.route(layout, *qkv[:2], 3))(*qkv)

  @jax.jit
  def both(*qkv):
    return attend(*map(permute_regions, qkv)), permute_regions(attend(*qkv))

  np.testing.assert_allclose(*both(query, key, value), atol=1e-6)


# Multiply-adds in 10^9 by top_k, without and with local enhancement, at 224 pixels, 7 x 7 regions.
ROWS = {("deit_small_patch16_224", 16): (4.3715, 4.3941),
        ("deit_small_patch16_224", 8): (4.3137, 4.3363),
        ("deit_small_patch16_224", 4): (4.2848, 4.3074),
        ("deit_tiny_patch16_224", 16): (1.1400, 1.1513),
        ("deit_base_patch16_224", 16): (17.1091, 17.1542)}


@pytest.mark.parametrize("name,top_k", [
    row if row == ("deit_small_patch16_224", 16) else pytest.param(*row, marks=pytest.mark.slow)
    for row in ROWS])
def test_multiply_adds_and_parameters_match_the_paper(name, top_k):
  for lce, expected in zip((False, True), ROWS[name, top_k], strict=True):
    method = vc.BiFormer(top_k=top_k, lce=lce, min_tokens=0)
    count = vc.count(vc.create_model(name, plan=vc.Plan(attention=method)))
    dense = vc.count(vc.create_model(name))
    width = vc.create_model(name).width
    assert round(count.macs / 1e9, 4) == expected and count.ideal_macs == count.macs
    assert count.params - dense.params == lce * 12 * 26 * width
    pairs = 196 * (4 * top_k + 1) + 197
    assert count.attention_macs == 12 * (2 * pairs + 49 ** 2) * width
    assert count.ideal_attention_macs == count.attention_macs
  if name == "deit_small_patch16_224":
    assert count.params == 22_170_472


@functools.cache
def enhanced_model():
  """Returns (model whose second block is dense, random variables, images)."""
  model = tiny.deit(vc.Plan(attention=ROUTED(top_k=2, lce=True), blocks={1: {"attention": None}}))
  return model, tiny.init(model), tiny.images(model)


def test_local_enhancement_convolves_the_values_and_skips_the_class_token():
  """In a single layer whose output projection is the identity."""
  model, variables, _ = enhanced_model()
  site, params = model.sites()[0], variables["params"]["blocks_0"]
  x = tiny.normal(BATCH, 17, 24)

  @jax.jit
  def run(params, x):
    attn = Attention(site).bind({"params": {**params["attn"], "out": {
        "kernel": np.eye(24, dtype=np.float32).reshape(4, 6, 24),
        "bias": np.zeros(24, np.float32)}}})
    query, key, value = attn.query(x), attn.key(x), attn.value(x)
    with_lce = ROUTED(top_k=2, lce=True).make(site).bind({"params": params["bra"]})
    without = ROUTED(top_k=2).make(site).bind({})
    return value, *(attn.attend(query, key, value, module(Core(), query, key), x)
                    for module in (with_lce, without))

  value, out, plain = map(np.asarray, run(params, x))
  np.testing.assert_array_equal(out[:, 0], plain[:, 0])
  kernel, bias = (np.asarray(params["bra"]["lce"][name]) for name in ("kernel", "bias"))
  padded = np.pad(value[:, 1:].reshape(BATCH, 4, 4, 24),
                  [(0, 0), (2, 2), (2, 2), (0, 0)])
  expected = np.zeros((BATCH, 4, 4, 24)) + bias
  for i, j in itertools.product(range(5), repeat=2):
    expected += padded[:, i:i + 4, j:j + 4] * kernel[i, j, 0]
  np.testing.assert_allclose((out - plain)[:, 1:].reshape(expected.shape), expected, atol=1e-5)


def test_compacting_a_dense_model_changes_only_the_routing():
  dense = tiny.deit()
  variables, x = tiny.init(dense), tiny.images(dense)
  plans = [vc.Plan(attention=ROUTED(top_k=2, lce=lce)) for lce in (False, True)]
  (routed, same), (model, params) = (vc.compact(dense, variables, plan, images=images)
                                     for plan, images in zip(plans, (None, x), strict=True))
  jax.tree.map(np.testing.assert_array_equal, same["params"], variables["params"])
  for i in range(2):
    enhancement = params["params"][f"blocks_{i}"].pop("bra")["lce"]
    assert enhancement["kernel"].shape == (5, 5, 1, 24)
    assert not any(map(np.any, enhancement.values()))
    jax.tree.map(np.testing.assert_array_equal, params["params"][f"blocks_{i}"],
                 variables["params"][f"blocks_{i}"])
    params["params"][f"blocks_{i}"]["bra"] = {"lce": enhancement}
  got = np.asarray(tiny.apply(model, params, x))
  np.testing.assert_array_equal(got, tiny.apply(routed, variables, x))
  assert np.abs(got - tiny.apply(dense, variables, x)).max() > 1e-3
  everything = tiny.deit(vc.Plan(attention=ROUTED(keep=1, lce=True)))
  np.testing.assert_array_equal(tiny.apply(everything, params, x),
                                tiny.apply(dense, variables, x))


def test_new_local_enhancement_is_initialised_has_gradients_and_has_rules():
  model, variables, x = enhanced_model()
  fresh = jax.jit(model.init)(jax.random.key(0), x)["params"]["blocks_0"]["bra"]["lce"]
  assert all(0.05 < np.abs(leaf).max() <= 0.2 for leaf in fresh.values())
  gradients = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply(
      {"params": params}, x)))))(variables["params"])
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["blocks_0"]["bra"]))
  rules = trees.first_match(model.parameter_rules(), variables["params"], may_be_idle=True)
  leaves = rules["blocks_0"]["bra"]["lce"]
  assert leaves["kernel"].decay and not leaves["bias"].decay
  assert leaves["kernel"].axes == (None, None, None, "embed")


def test_files_and_folding_keep_the_function(tmp_path):
  model, variables, x = enhanced_model()
  expected = tiny.apply(model, variables, x)
  state = vc.to_torch(model, variables)
  assert state["blocks.0.attn.lepe.weight"].shape == (24, 1, 5, 5)
  assert trees.differences(vc.from_torch(model, state), variables) == []
  jax.tree.map(np.testing.assert_array_equal, vc.from_torch(model, state), variables)
  deploy, folded = tiny.fold(model, variables)
  np.testing.assert_allclose(tiny.apply(deploy, folded, x), expected, atol=1e-5)
  vc.save(tmp_path / "a.safetensors", model, variables)
  loaded, restored = vc.load(tmp_path / "a.safetensors")
  assert loaded == model
  jax.tree.map(np.testing.assert_array_equal, restored, variables)


def test_heads_hallucinated_on_the_grid_have_the_filtered_map_of_the_routed_head():
  """Only the real heads route; the filtered map has entries outside the chosen regions."""
  plan = vc.Plan(attention=ROUTED(top_k=2), heads=vc.HMHSA(layout="grid", rank=2))
  model = tiny.deit(plan, depth=1)
  params = tiny.init(model)["params"]["blocks_0"]
  site = model.sites()[0]
  attn = Attention(site, plan.heads)
  x = tiny.normal(BATCH, 17, 24)

  @jax.jit
  def run(params, x):
    bound = attn.bind({"params": params}, mutable=["maps"])
    query, key, value = bound.query(x), bound.key(x), bound.value(x)
    core = ROUTED(top_k=2).make(site).apply({}, Core(), query, key)
    out = bound.attend(query, key, value, core, x)
    return query, value, out, bound.variables["maps"]["hallucinate"]["maps"][0]

  query, value, out, maps = map(np.asarray, run(params["attn"], x))
  assert query.shape[2] == 2
  assert maps.shape[1] == 4 and ((maps[:, :2] == 0) & (maps[:, 2:] != 0)).any()
  heads = np.einsum("bhnm,bmhd->bnhd", maps, value)
  expected = np.einsum("bnhd,hdw->bnw", heads, params["attn"]["out"]["kernel"])
  expected = expected + np.asarray(params["attn"]["out"]["bias"])
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_blocks_below_the_crossover_stay_dense_and_get_no_options():
  small, large = (vc.create_model("deit_small_patch16_224", image_size=size, depth=1,
                                  plan=vc.Plan(attention=vc.BiFormer())) for size in (224, 512))
  assert small.submodules()["blocks_0"].methods.attention is None
  assert large.submodules()["blocks_0"].methods.attention == vc.BiFormer()
  assert vc.BiFormer().token_threshold == tuning.REGION_MIN_TOKENS == 442
  assert vc.BiFormer(regions=None).token_threshold == tuning.BLOCK_MIN_TOKENS
  site, = large.sites()
  assert [method.keep for method in vc.BiFormer.options(site)] == [0.25, 0.5, 0.75]
  assert vc.BiFormer.options(site)[0].windows(site.key_grid) == Windows((32, 32), (8, 8))
  assert vc.BiFormer.options(tiny.site()) == []
  assert vc.BiFormer.options(site._replace(key_grid=None)) == []


def test_top_k_is_given_or_a_rounded_share_of_the_regions():
  windows = routing.regions((14, 14), 7)
  assert [vc.BiFormer(keep=keep).count(windows) for keep in (0.001, 0.25, 0.4, 1)] == [1, 12, 20,
                                                                                       49]
  assert vc.BiFormer().count(windows) == 12 and vc.BiFormer(top_k=16).count(windows) == 16
  assert vc.BiFormer(top_k=16).at_keep(0.5) == vc.BiFormer(keep=0.5)


def test_it_can_share_a_plan_with_sparsifiner_block_by_block():
  sparse = vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0)
  plan = vc.Plan(attention=ROUTED(top_k=1), blocks={1: {"attention": sparse}})
  model = tiny.deit(plan)
  variables, x = tiny.init(model), tiny.images(model)
  _, state = tiny.apply(model, variables, x, mutable=["attention"])
  assert attention_reconstruction(state["attention"]).shape == (3,)
  for method in plan.methods():
    assert method.facts(state) == {"attention_kept": pytest.approx((1 / 4 + 2 / 4) / 2)}
  pairs = drawing.pairs_of(model, variables, x[0])
  assert (pairs[0][:, 1:].sum(axis=-1) == 1 + 4).all() and pairs[0][:, 0].all()
  mass = drawing.mass_kept(model, variables, x[0], keeps=(0.5, 1.0))
  for shares in mass.values():
    assert shares[0][0] == 0.5 and 0.2 < shares[0][1] < 1
    assert shares[1] == pytest.approx((1, 1), abs=1e-5)


def test_keys_on_a_coarser_grid_have_the_same_number_of_regions():
  """A pyramid with reduced keys: the regions of both grids cover the same area."""
  model = vc.create_model("pvt_tiny", image_size=64, depths=(1, 1, 1, 1), widths=(8, 16, 20, 16),
                          heads=(1, 2, 5, 4), plan=vc.Plan(attention=ROUTED(top_k=1)))
  variables, x = tiny.init(model, spread=0.1), tiny.images(model, batch=1)
  layouts = []
  for site in model.sites():
    module = model.plan.attention.make(site)
    jax.eval_shape(lambda *args, module=module: layouts.append(module.apply(
        {}, Core(), *args).layout), *(tiny.normal(1, n, site.heads, 4) for n in (
            site.queries, site.tokens)))
  assert [layout.keys.blocks for layout in layouts] == [4, 4, 4, 4]
  assert [layout.queries.area // layout.keys.area for layout in layouts] == [64, 16, 4, 1]
  assert np.isfinite(tiny.apply(model, variables, x)).all()


def pyramid(**fields):
  return vc.create_model("pvt_tiny", image_size=64, plan=vc.Plan(attention=ROUTED(**fields)))


@pytest.mark.parametrize("make,words", [
    (lambda: vc.BiFormer(keep=0), "keep=0): must be a share of the regions in (0, 1]"),
    (lambda: vc.BiFormer(keep=True), "must be a share"),
    (lambda: vc.BiFormer(top_k=0), "top_k=0): must be a whole number of at least 1"),
    (lambda: vc.BiFormer(regions=7.0), "regions=7.0): must be a whole number"),
    (lambda: vc.BiFormer(keep=0.5, top_k=4), "both set the number of kept regions; give one"),
    (lambda: vc.BiFormer(lce=1), "lce=1): must be True or False"),
    (lambda: vc.BiFormer(min_tokens=-1), "min_tokens=-1): must be"),
    (lambda: tiny.deit(vc.Plan(attention=ROUTED(top_k=5))),
     "BiFormer(top_k=5): block 0 has only 4 regions of keys"),
    (lambda: pyramid(lce=True), "in block 0 the grid of values is (2, 2), that of queries "
     "(16, 16); use lce=False there"),
    (lambda: vc.create_model("nextvit_small", image_size=64,
                             plan=vc.Plan(attention=ROUTED())),
     "the keys of block 6 have no grid to cut into regions; use blocks="),
    (lambda: tiny.deit(vc.Plan(attention=ROUTED(), tokens=vc.ToMe(r=3))),
     "needs the whole grid of tokens, which ToMe(r=3) removes from block 0 onward; its regions"),
    (lambda: tiny.deit(vc.Plan(attention=ROUTED(), heads=vc.HMHSA())),
     "needs keys in one sequence, which BiFormer(regions=2, min_tokens=0) removes; use "
     "layout='grid' there"),
])
def test_incompatible_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)
