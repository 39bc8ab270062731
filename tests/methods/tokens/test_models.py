"""Reducers inside models: with the other axes, in training, folded, and in LV-ViT."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees
from vitcompact.methods.tokens import evit
from vitcompact.models import lvvit

PLANS = [
    vc.Plan(tokens=vc.EViT(keep=0.5, blocks=(0, 1)), heads=vc.HMHSA(), ffn=vc.CFFN()),
    vc.Plan(tokens=vc.DynamicViT(keep=0.6, blocks=(1,)), heads=vc.HMHSA(rank=2), ffn=vc.CFFN()),
    vc.Plan(tokens=vc.ToMe(r=4), heads=vc.HMHSA(site="logits"), ffn=vc.CFFN(rep="scale")),
    vc.Plan(tokens=vc.MCTF(r=4, blocks=(0, 1)), heads=vc.HMHSA(), ffn=vc.CFFN())]
LEFT = [6 + 1, 9 + 1, 17 - 8, 10]     # of 17 tokens, after two blocks


def names(plans):
  return [type(plan.tokens).__name__ + plan.heads.site for plan in plans]


@pytest.mark.parametrize("plan,left", list(zip(PLANS, LEFT, strict=True)), ids=names(PLANS))
def test_plan_reports_how_many_tokens_are_left(plan, left):
  assert plan.tokens_left(2, 2, 17, 1) == left


# The others are also folded, with heads, FFNs and random leaves, in tests/test_combinations.py.
@pytest.mark.parametrize("plan", [
    pytest.param(plan, marks=[pytest.mark.slow] * (plan.heads.site != "logits"))
    for plan in PLANS], ids=names(PLANS))
def test_folding_with_every_leaf_random_keeps_the_function(plan):
  model = tiny.deit(plan)
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = tiny.fold(model, variables)
  shapes = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, shapes) == []
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 1e-5 and proof.first_difference is None


@pytest.mark.parametrize("plan", PLANS, ids=names(PLANS))
def test_gradients_are_finite_and_prefix_tokens_are_not_merged(plan):
  model = tiny.deit(plan, distilled=True, drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model)

  def loss(params):
    heads, sown = tiny.apply(model, {**variables, "params": params}, x, train=True,
                             mutable=["batch_stats", "tokens", "features"],
                             rngs={"dropout": jax.random.key(0)})
    return sum(jnp.mean(jnp.sin(logits)) for logits in heads), sown

  grads, sown = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  for name, leaf in trees.named_leaves(grads).items():
    assert np.isfinite(leaf).all(), name
    if "value/kernel" in name or "fc1" in name:
      assert np.abs(leaf).max() > 0, name
  for i in range(2):
    source, count = sown["tokens"][f"source_{i}"][0], sown["features"][f"block_{i}"][0].shape[1]
    assert source.shape == (3, 18)
    np.testing.assert_array_equal(source[:, :2], [[0, 1]] * 3)
    for row in np.asarray(source):
      assert set(row) - {-1} == set(range(count))       # each token holds original tokens
      assert (row == 0).sum() == (row == 1).sum() == 1  # a prefix token holds only itself
  keep_mask = sown["tokens"]["keep_mask"][0]
  assert sown["tokens"]["prefix"][0].shape == (3, 2, 24)
  assert sown["tokens"]["patches"][0].shape == (3, 16, 24) and keep_mask.shape == (3, 16)


@pytest.mark.parametrize("plan", PLANS, ids=names(PLANS))
def test_bfloat16_and_remat_in_training_and_inference(plan):
  model = tiny.deit(plan, dtype="bfloat16", remat=True)
  x = tiny.images(model)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)

  def run(variables, train):
    return tiny.apply(model, variables, x, train=train, rngs={"dropout": jax.random.key(0)},
                      mutable=["features", "tokens", "batch_stats"])

  for train in (False, True):
    out, sown = jax.eval_shape(functools.partial(run, train=train), variables)
    assert out.dtype == jnp.float32
    assert sown["features"]["block_1"][0].dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_bfloat16_gives_finite_logits():
  model = tiny.deit(vc.Plan(tokens=vc.MCTF(r=4, blocks=(0,))), dtype="bfloat16", depth=1)
  assert np.isfinite(tiny.apply(model, tiny.init(model), tiny.images(model))).all()


@pytest.mark.parametrize("tokens", [
    vc.EViT(keep=1.0, blocks=(0,)), vc.EViT(keep=1, blocks=(1,), fuse=False), vc.ToMe(r=0),
    vc.DynamicViT(keep=1.0, blocks=(0, 1)), vc.MCTF(r=0), vc.MCTF(r=0.0, one_step_ahead=0)])
def test_reducing_nothing_is_the_dense_program(tokens):
  """Bit for bit, because it is the same program."""
  dense, model = tiny.deit(), tiny.deit(vc.Plan(tokens=tokens))
  variables, x = tiny.init(dense), tiny.images(dense)
  programs = [str(jax.make_jaxpr(m.apply)(variables, x)) for m in (dense, model)]
  assert programs[0] == programs[1]


def test_block_too_small_to_reduce_leaves_its_tokens_unchanged():
  dense = tiny.deit(depth=1, image_size=24)      # 9 patches and the class token
  variables, x = tiny.init(dense), tiny.images(dense)
  expected = tiny.apply(dense, variables, x)
  for tokens in (vc.MCTF(r=4, blocks=(0,)), vc.EViT(keep=0.9, blocks=(0,))):
    model = tiny.deit(vc.Plan(tokens=tokens), depth=1, image_size=24)
    assert model.plan.tokens_left(1, 1, 10, 1) == 10
    np.testing.assert_array_equal(tiny.apply(model, variables, x), expected)


def test_maps_are_those_of_the_merged_tokens():
  model = tiny.deit(PLANS[3])
  seen = jax.eval_shape(lambda v, x: vc.features(model, v, x, maps=True), tiny.init(model),
                        tiny.images(model))
  assert seen.maps["blocks_0"].shape == (3, 4, 13, 13)
  assert seen.maps["blocks_1"].shape == (3, 4, 10, 10)


def lvvit_model(tokens, **fields):
  return tiny.deit(vc.Plan(tokens=tokens), name="lvvit_s", heads=3, stem_width=8, **fields)


def aux_by_hand(params, patches):
  head = params["aux_head"]
  return np.asarray(patches) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])


def test_lvvit_takes_the_maximum_over_surviving_patches():
  model = lvvit_model(vc.EViT(keep=0.5, blocks=(0, 1)))
  variables, x = tiny.init(model), tiny.images(model)
  logits, sown = tiny.apply(model, variables, x, mutable=["tokens"])
  seen, params = sown["tokens"], variables["params"]
  aux = aux_by_hand(params, seen["patches"][0])
  aux = np.where(np.asarray(seen["keep_mask"][0])[..., None] > 0, aux, -np.inf)
  head = params["head"]
  expected = np.asarray(seen["prefix"][0])[:, 0] @ np.asarray(head["kernel"]) + head["bias"][None]
  np.testing.assert_allclose(logits, expected + 0.5 * aux.max(axis=1), atol=1e-4)


@pytest.mark.parametrize("tokens,surviving", [
    (vc.EViT(keep=0.5, blocks=(0,)), (8, 8)), (vc.ToMe(r=4), (16, 16)),
    (vc.DynamicViT(keep=0.5, blocks=(0,)), (1, 15))])
def test_lvvit_token_logits_return_to_their_own_image_and_position(tokens, surviving, monkeypatch):
  """Inside the box, patches come from the reversed batch, and so do the survivors."""
  box = np.zeros((4, 4), bool)
  box[1:3, 1:4] = True
  monkeypatch.setattr(lvvit, "draw_box", lambda key, grid: jnp.asarray(box))
  model = lvvit_model(tokens, drop_path_rate=0.0, depth=1)
  variables, x = tiny.init(model), tiny.images(model, batch=4)
  out, sown = jax.jit(lambda v, x: model.apply(
      v, x, train=True, rngs={"dropout": jax.random.key(0)},
      mutable=["tokens", "batch_stats"]))(variables, x)
  mixed_mask = np.asarray(sown["tokens"]["keep_mask"][0])
  mixed = aux_by_hand(variables["params"], sown["tokens"]["patches"][0])
  for image in range(4):
    for patch in range(16):
      origin = 3 - image if box.ravel()[patch] else image
      assert out.keep_mask[image, patch] == mixed_mask[origin, patch]
      if mixed_mask[origin, patch]:
        np.testing.assert_allclose(out.token_logits[image, patch], mixed[origin, patch], atol=1e-4)
  assert out.share == 1 - 6 / 16
  counts = mixed_mask.sum(axis=1)
  assert surviving[0] <= counts.min() and counts.max() <= surviving[1]
  assert out.token_logits.shape == (4, 16, 5)


def test_evit_warm_up_uses_few_distinct_rates():
  spec = vc.EViT(keep=0.5, blocks=(0,))
  epochs = np.linspace(0, 130, 1301)
  rates = np.array([spec.at_epoch(epoch).keep for epoch in epochs])
  assert len(set(rates.tolist())) == evit.WARMUP_RATES == 8 and (np.diff(rates) <= 0).all()
  assert (rates[epochs <= 10] == 1).all() and (rates[epochs >= 110] == 0.5).all()
  done = np.clip((epochs - 10) / 100, 0, 1)
  exact = 0.5 + 0.5 * (1 + np.cos(np.pi * done)) / 2
  assert np.abs(rates - exact).max() <= 0.5 / 7 / 2 + 1e-9
  assert spec.at_epoch(60).blocks == (0,)


ALL = [vc.EViT(keep=0.5, blocks=(1, 4), fuse=False), vc.DynamicViT(keep=0.6), vc.MCTF(),
       vc.ToMe(r=8, schedule="decreasing", order="code"), vc.MCTF(r=0.35, blocks=(9, 3, 6))]


@pytest.mark.parametrize("tokens", ALL, ids=repr)
def test_plans_with_reducers_round_trip_through_json(tokens):
  plan = vc.Plan(tokens=tokens)
  assert vc.Plan.from_json(plan.to_json()) == plan
  assert hash(vc.Plan.from_json(plan.to_json())) == hash(plan)


@pytest.mark.parametrize("make,words", [
    (lambda: vc.EViT(keep=0), "(0, 1]"), (lambda: vc.EViT(keep="half"), "(0, 1]"),
    (lambda: vc.DynamicViT(keep=1.5), "(0, 1]"), (lambda: vc.EViT(blocks=()), "block numbers"),
    (lambda: vc.DynamicViT(blocks=(3, 3)), "different block numbers"),
    (lambda: vc.EViT(blocks=3), "such as (3, 6, 9)"), (lambda: vc.EViT(fuse="no"), "True or False"),
    (lambda: vc.ToMe(r=-1), "0 or more"), (lambda: vc.ToMe(order="id"), "one of"),
    (lambda: vc.ToMe(prop_attn=1), "True or False"), (lambda: vc.MCTF(r=1.5), "or a share below"),
    (lambda: vc.MCTF(r=-2), "whole number"), (lambda: vc.MCTF(tau_info=0), "above 0"),
    (lambda: vc.MCTF(pooling="sum"), "size_mean"), (lambda: vc.MCTF(blocks=("3",)), "(3, 6, 9)"),
    (lambda: vc.MCTF(one_step_ahead=3), "(0, 1, 2)"),
    (lambda: vc.MCTF(one_step_ahead=True), "(0, 1, 2)"),
    (lambda: tiny.deit(vc.Plan(tokens=vc.EViT())), "blocks 0 to 1"),
    (lambda: tiny.deit(vc.Plan(tokens=vc.MCTF(), heads=vc.HMHSA(layout="grid"))), "block 1 on"),
    (lambda: tiny.deit(vc.Plan(tokens=vc.ToMe(order="code"), heads=vc.HMHSA())), "'position'"),
    (lambda: vc.create_model("pvt_tiny", plan=vc.Plan(tokens=vc.MCTF())),
     "dropped or merged, which pvt_tiny does not have; token reducers are for isotropic"),
    (lambda: vc.create_model("pvt_v2_b1", plan=vc.Plan(tokens=vc.EViT(blocks=(1,)))),
     "dropped or merged, which pvt_v2_b1 does not have; token reducers are for isotropic"),
    (lambda: vc.create_model("nextvit_small", plan=vc.Plan(tokens=vc.ToMe())),
     "dropped or merged, which nextvit_small does not have; token reducers are for isotropic"),
    (lambda: vc.create_model("davit_tiny", plan=vc.Plan(tokens=vc.DynamicViT(blocks=(2,)))),
     "dropped or merged, which davit_tiny does not have; token reducers are for isotropic"),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "mctff"}}'), "did you mean 'mctf'")])
def test_invalid_reducers_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)
