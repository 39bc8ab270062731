"""MoH: the router's equations, exactness from dense weights, capacity, reaching fewer heads."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import attention
from vitcompact.attention import Core
from vitcompact.methods import protocol
from vitcompact.methods.heads import moh
from vitcompact.methods.protocol import Pass

HEADS, SHARED, ACTIVE, WIDTH, TOKENS = 5, 2, 4, 12, 7


# Under one jit: otherwise each operation is compiled separately.
weights_of = jax.jit(moh.weights, static_argnums=(2, 3))


def draw(*shape, seed=0):
  return tiny.normal(*shape, seed=(seed, *shape))


def routers(heads=HEADS, shared=SHARED):
  return {name: draw(*shape) for name, shape in moh.router_shapes(WIDTH, heads, shared).items()}


def reference(x_nw, routers, shared: int, active: int):
  """Returns (N, heads), computed token by token as in the paper."""
  def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

  rows = []
  for x in np.asarray(x_nw, np.float64):
    routed = softmax(x @ routers["routed_router"])
    best_scores = np.zeros_like(routed)
    best = np.argsort(-routed, kind="stable")[:active - shared]
    best_scores[best] = routed[best]
    of_shared = (shared * softmax(x @ routers["shared_router"]) if shared > 1 else np.ones(1))
    first, second = 2 * softmax(x @ routers["between_router"])
    rows.append(np.concatenate([first * of_shared,
                                second * (active - shared) * best_scores / best_scores.sum()]))
  return np.stack(rows)


@pytest.mark.parametrize("shared", [1, 2])
def test_weights_match_the_paper(shared):
  x_bnw, params = draw(2, TOKENS, WIDTH), routers(shared=shared)
  got, _, chosen = map(np.asarray, weights_of(x_bnw, params, shared, ACTIVE))
  for image, rows in zip(x_bnw, got, strict=True):
    np.testing.assert_allclose(rows, reference(image, params, shared, ACTIVE), rtol=1e-5, atol=1e-6)
  used = got[..., shared:] != 0
  assert (used.sum(axis=-1) == ACTIVE - shared).all()
  np.testing.assert_array_equal(used, chosen == 1)


def test_weights_sum_to_the_active_heads_with_equally_many_shared_and_routed():
  got, _, _ = weights_of(draw(2, TOKENS, WIDTH), routers(), SHARED, 2 * SHARED)
  np.testing.assert_allclose(np.sum(got, axis=-1), 2 * SHARED, rtol=1e-5)


def test_ties_choose_the_first_heads():
  choose = jax.jit(moh.top_k_choice, static_argnums=1)
  np.testing.assert_array_equal(choose(np.float32([[[1, 2, 2, 1, 2]]]), 2), [[[0, 1, 1, 0, 0]]])


def test_minimum_of_the_balance_loss_is_the_number_of_routed_heads():
  """All heads equal: k. All tokens on one head: more. Tokens get gradients through their choice."""
  balance = jax.jit(moh.balance)
  even = np.full((2, 6, 3), 1 / 3, np.float32)
  chosen = np.eye(3, dtype=np.float32)[np.arange(12) % 3].reshape(2, 6, 3)
  assert float(balance(even, chosen)) == pytest.approx(1)
  assert float(balance(even, np.ones_like(chosen))) == pytest.approx(3)
  one = np.zeros_like(even)
  one[..., 0] = 1
  assert float(balance(one, one)) == pytest.approx(3)


def test_model_loss_is_the_mean_over_blocks():
  model = tiny.deit(vc.Plan(heads=vc.MoH(), blocks={0: {"heads": vc.MoH(active=3, shared=1)}}))
  variables = tiny.init(model)
  _, sown = tiny.apply(model, variables, tiny.images(model), mutable=["mixtures"])
  values = [float(value) for value in jax.tree.leaves(sown)]
  assert len(values) == 2
  loss = protocol.losses(vc.MoH())["moh_balance"]
  got = loss(Pass(sown, None, None))
  assert float(got) == pytest.approx(sum(values) / 2)
  assert protocol.settings(vc.MoH())["loss.moh_balance"].default == 0.01


def test_unused_heads_get_no_gradient_and_routers_do():
  module = vc.MoH().make(tiny.site(), parent=None)
  query, key, value = (draw(1, 17, 4, 6, seed=seed) for seed in range(3))
  x = draw(1, 17, 24)
  params = tiny.randomised(jax.eval_shape(
      lambda: module.init(jax.random.key(0), query, key, value, attention.DENSE, x)), spread=1.0)

  @jax.jit
  def out(params, value):
    return module.apply(params, query, key, value, attention.DENSE, x)

  weights, _, _ = weights_of(x, params["params"], *vc.MoH().split(tiny.site()))
  got = np.asarray(out(params, value))
  np.testing.assert_array_equal((got != 0).any(axis=-1), np.asarray(weights) != 0)
  grads = jax.jit(jax.grad(lambda params: jnp.sum(out(params, value) ** 2)))(params)["params"]
  assert grads.keys() == {"routed_router", "between_router"}   # one shared head: no choice
  assert all(np.any(grad) for grad in grads.values())


@pytest.mark.parametrize("images", [None, 8])
@pytest.mark.parametrize("spec", [vc.MoH(active=4, shared=2), vc.MoH(active=1.0, capacity=1.0)])
def test_all_heads_active_is_the_dense_model(spec, images):
  dense = tiny.deit()
  variables = tiny.init(dense)
  data = None if images is None else np.asarray(tiny.images(dense, images))
  model, got = vc.compact(dense, variables, vc.Plan(heads=spec), images=data)
  x = tiny.images(dense)
  np.testing.assert_allclose(tiny.apply(model, got, x), tiny.apply(dense, variables, x), rtol=1e-5,
                             atol=1e-5)


def test_heads_with_parameters_of_their_own_keep_their_order():
  """TransNeXt's heads have parameters besides queries, keys and values."""
  dense = tiny.transnext()
  variables, x = tiny.init(dense), tiny.images(dense)
  model, got = vc.compact(dense, variables, vc.Plan(heads=vc.MoH(active=1.0)))
  np.testing.assert_allclose(tiny.apply(model, got, x), tiny.apply(dense, variables, x), rtol=1e-4,
                             atol=1e-4)


def test_most_important_heads_become_shared():
  dense = tiny.deit()
  variables = jax.tree.map(np.array, tiny.init(dense))
  variables["params"]["blocks_1"]["attn"]["out"]["kernel"][2] *= 10
  variables = jax.device_put(variables)
  kernel = np.asarray(variables["params"]["blocks_1"]["attn"]["out"]["kernel"])
  for images in (None, np.asarray(tiny.images(dense, 8))):
    _, got = vc.compact(dense, variables, vc.Plan(heads=vc.MoH(active=2, shared=1)), images=images)
    new = np.asarray(got["params"]["blocks_1"]["attn"]["out"]["kernel"])
    np.testing.assert_array_equal(new[0], kernel[2])


@pytest.mark.parametrize("core", [
    Core(), Core(size=np.where(np.arange(17) == 3, 2, 1).astype(np.float32)[None]),
    Core(mask=(np.random.default_rng(0).random((1, 4, 17, 17)) < 0.7) | (np.arange(17) == 0))])
@pytest.mark.parametrize("capacity", [0.5, 1.0, 4.0])
def test_capacity_keeps_the_tokens_that_weigh_a_head_most(core, capacity):
  """Gathering rows, and computing all and dropping some where that is impossible, agree."""
  spec = vc.MoH(active=2, shared=1, capacity=capacity)
  site = tiny.site()
  query, key, value = (draw(1, 17, 4, 6, seed=seed) for seed in range(3))
  x = draw(1, 17, 24)
  module, free = (method.make(site, parent=None)
                  for method in (spec, dataclasses.replace(spec, capacity=None)))
  params = tiny.randomised(jax.eval_shape(
      lambda: module.init(jax.random.key(0), query, key, value, attention.DENSE, x)), spread=1.0)

  @jax.jit
  def run(params):
    return [m.apply(params, query, key, value, core, x) for m in (module, free)]

  got, expected = map(np.array, run(params))
  weights = np.asarray(weights_of(x, params["params"], 1, 2)[0])
  rows = min(int(np.ceil(capacity * 17 / 3)), 17)
  for head in range(1, 4):
    last = np.argsort(-weights[0, :, head], kind="stable")[rows:]
    expected[0, last, head] = 0
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  served = (got[0, :, 1:] != 0).any(axis=-1).sum(axis=0)
  assert (served <= rows).all()
  if capacity == 0.5:
    assert served.sum() < 17


def test_counts_match_the_specification():
  """K and V of all heads are needed; queries, scores and outputs only of the heads a token uses."""
  dense = vc.count(vc.create_model("deit_small_patch16_224"))
  spec = vc.MoH(active=4, shared=2)
  got = vc.count(vc.create_model("deit_small_patch16_224", plan=vc.Plan(heads=spec)))
  assert got.params - dense.params == 36_864
  by_routers = 36_864 * 197
  assert got.macs == dense.macs + by_routers
  assert (got.ideal_macs - by_routers) / 1e9 == pytest.approx(4.2473, abs=5e-5)
  base = vc.count(vc.create_model("deit_base_patch16_224",
                                  plan=vc.Plan(heads=vc.MoH(active=8, shared=4))))
  by_routers = 12 * 768 * (8 + 4 + 2) * 197
  assert (base.ideal_macs - by_routers) / 1e9 == pytest.approx(16.3958, abs=5e-5)
  gathered = vc.count(vc.create_model("deit_small_patch16_224", plan=vc.Plan(
      heads=dataclasses.replace(spec, capacity=1.0))))
  assert gathered.macs < dense.macs
  assert gathered.ideal_macs == pytest.approx(got.ideal_macs, rel=1e-3)


@pytest.mark.parametrize("heads,depths,shared,routed,expected", [
    ((3, 6, 12, 24), (5, 5, 22, 5), (3, 6, 3, 8), (0, 0, 6, 12), 343 / 429),
    ((3, 6, 12, 24), (5, 5, 22, 5), (3, 6, 3, 4), (0, 0, 6, 12), 323 / 429),
    ((4, 8, 16, 32), (5, 5, 23, 5), (4, 8, 4, 5), (0, 0, 8, 16), 441 / 588),
    ((4, 8, 16, 32), (5, 5, 23, 5), (2, 2, 2, 4), (2, 4, 6, 8), 294 / 588)])
def test_published_models_have_the_stated_active_heads(heads, depths, shared, routed, expected):
  active = total = 0
  for count, depth, s, k in zip(heads, depths, shared, routed, strict=True):
    spec = vc.MoH(active=s + k, shared=s)
    active += depth * spec.active_heads(tiny.site(heads=count, width=24 * count))
    total += depth * count
  assert active / total == pytest.approx(expected)


def constant_routers(variables, active):
  """Makes every token choose the same heads: one channel after norm1 is constant."""
  variables = jax.tree.map(np.array, variables)
  for name in ("blocks_0", "blocks_1"):
    block = variables["params"][name]
    block["norm1"]["scale"][0] = 0
    block["norm1"]["bias"][0] = 1
    for router in block["attn"]["moh"].values():
      router[1:] = 0
  return jax.device_put(variables)


def test_constant_mixture_converts_exactly_to_dense_and_to_pruned_heads():
  model = tiny.deit(vc.Plan(heads=vc.MoH(active=3, shared=1)))
  variables = constant_routers(tiny.init(model), 3)
  images = np.asarray(tiny.images(model, 16))
  expected = tiny.apply(model, variables, images)
  dense, got = vc.compact(model, variables, vc.Plan(), images=images)
  assert dense.plan == vc.Plan()
  np.testing.assert_allclose(tiny.apply(dense, got, images), expected, rtol=1e-4, atol=1e-5)
  pruned, got = vc.compact(model, variables, vc.Plan(heads=vc.HeadPruning(kept_heads=3)),
                           images=images)
  np.testing.assert_allclose(tiny.apply(pruned, got, images), expected, rtol=1e-3, atol=1e-4)
  assert vc.count(pruned).params < vc.count(dense).params


def test_weights_apply_after_hallucination():
  """A head's weight is per query, and applies after the filter over queries."""
  model = tiny.deit(vc.Plan(heads=vc.MoH(active=3, shared=1, heads=vc.HMHSA())), depth=1)
  variables = tiny.init(model)
  plain = model.clone(plan=vc.Plan(heads=vc.HMHSA()))
  router_params = variables["params"]["blocks_0"]["attn"]["hallucinate"]
  assert router_params.keys() == {"query_taps", "key_taps", "routed_router", "between_router"}
  hallucinated = {**router_params}
  for router in ("routed_router", "between_router"):
    hallucinated.pop(router)
  attn = {**variables["params"]["blocks_0"]["attn"], "hallucinate": hallucinated}
  params = {**variables["params"], "blocks_0": {**variables["params"]["blocks_0"], "attn": attn}}

  @jax.jit
  def run(variables, params, images):
    heads = {}

    def watch(next_fun, args, kwargs, context):
      out = next_fun(*args, **kwargs)
      if context.module.name == "hallucinate" and context.method_name == "__call__":
        heads[type(context.module).__name__] = out, args[4]
      return out

    with nn.intercept_methods(watch):
      model.apply(variables, images)
      plain.apply({"params": params}, images)
    return heads

  heads = run(variables, params, tiny.images(model))
  mixed, x = heads["Mixture"]
  weights, _, _ = weights_of(x, router_params, 1, 3)
  np.testing.assert_allclose(mixed, np.asarray(heads["Hallucinate"][0]) * np.asarray(
      weights)[..., None], rtol=1e-5, atol=1e-6)


def test_weights_round_trip_through_pytorch_under_the_authors_names():
  model = tiny.deit(vc.Plan(heads=vc.MoH(active=3, shared=2)))
  variables = tiny.init(model)
  state = vc.to_torch(model, variables)
  assert state["blocks.0.attn.wg.weight"].shape == (2, 24)
  assert state["blocks.0.attn.wg_0.weight"].shape == (2, 24)
  assert state["blocks.0.attn.wg_1.weight"].shape == (2, 24)
  back = vc.from_torch(model, state)
  assert jax.tree.all(jax.tree.map(np.array_equal, variables, back))


@pytest.mark.parametrize("fields,message", [
    ({"active": 0}, "active=0"), ({"active": 1.5}, "active=1.5"), ({"shared": True}, "shared=True"),
    ({"capacity": 0}, "capacity=0"), ({"capacity": 1.0, "heads": vc.HMHSA()}, "use capacity=None")])
def test_invalid_settings_are_rejected(fields, message):
  with pytest.raises(ValueError, match=message):
    vc.MoH(**fields)


@pytest.mark.parametrize("spec,message", [
    (vc.MoH(active=5), "of the 4 heads of block 0, 5 would be active"),
    (vc.MoH(active=2, shared=3), "2 would be active and 3 shared"),
    (vc.MoH(heads=vc.HeadPruning(kept_heads=2)), "put the mixture inside the")])
def test_plans_that_do_not_fit_a_block_are_rejected(spec, message):
  with pytest.raises(ValueError, match=message):
    tiny.deit(vc.Plan(heads=spec))


def test_no_dense_conversion_without_images_or_with_hallucinated_heads():
  model = tiny.deit(vc.Plan(heads=vc.MoH()))
  with pytest.raises(ValueError, match="give images="):
    vc.compact(model, tiny.init(model), vc.Plan())
  model = tiny.deit(vc.Plan(heads=vc.MoH(heads=vc.HMHSA())))
  with pytest.raises(ValueError, match="starts from a dense"):
    vc.compact(model, tiny.init(model), vc.Plan(), images=np.asarray(tiny.images(model)))
