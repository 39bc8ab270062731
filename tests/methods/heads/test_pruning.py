"""Head pruning: counts, which heads are pruned, and how the others compensate."""
import itertools

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact.methods.heads import importance

HALF = vc.Plan(heads=vc.HeadPruning())


@pytest.mark.parametrize("name,kept,params,macs", [
    ("small", 4, 19_686_760, 4.0149), ("small", 5, 20_868_712, 4.3069),
    ("base", 8, 77_121_256, 15.4663), ("base", 9, 79_482_856, 15.9907)])
def test_counts_match_the_specification(name, kept, params, macs):
  plan = vc.Plan(heads=vc.HeadPruning(kept_heads=kept))
  got = vc.count(vc.create_model(f"deit_{name}_patch16_224", plan=plan))
  assert got.params == params
  assert got.macs / 1e9 == pytest.approx(macs, abs=5e-5)
  assert got.ideal_macs == got.macs


def test_pruned_heads_are_the_cheapest_set():
  rng = np.random.default_rng(0)
  for _ in range(5):
    root = rng.standard_normal((6, 6))
    lost = root @ root.T
    order = importance.kept_first(lost, 4)
    assert sorted(order) == list(range(6))
    costs = {cut: lost[np.ix_(cut, cut)].sum() for cut in itertools.combinations(range(6), 2)}
    assert tuple(sorted(order[4:])) == min(costs, key=costs.get)


def test_heads_are_pruned_one_by_one_if_there_are_too_many_sets_to_try(monkeypatch):
  lost = np.diag([3.0, 1.0, 4.0, 2.0, 5.0])
  exact = importance.kept_first(lost, 3)
  monkeypatch.setattr(importance.refit, "MAX_SETS", 1)
  assert importance.kept_first(lost, 3) == exact == (0, 2, 4, 1, 3)


def test_without_images_heads_with_large_values_are_kept_unchanged():
  dense = tiny.deit()
  variables = jax.tree.map(np.array, tiny.init(dense))
  attn = variables["params"]["blocks_0"]["attn"]
  attn["out"]["kernel"][[0, 3]] *= 0.01
  model, got = vc.compact(dense, jax.device_put(variables), HALF)
  new = got["params"]["blocks_0"]["attn"]
  for name in ("query", "key", "value"):
    np.testing.assert_array_equal(new[name]["kernel"], attn[name]["kernel"][:, 1:3])
  np.testing.assert_array_equal(new["out"]["kernel"], attn["out"]["kernel"][1:3])
  # The constant that a pruned head's value bias adds to every token is kept.
  always = sum(attn["value"]["bias"][h] @ attn["out"]["kernel"][h] for h in (0, 3))
  np.testing.assert_allclose(new["out"]["bias"], attn["out"]["bias"] + always, rtol=1e-5, atol=1e-6)
  assert vc.count(model).params < vc.count(dense).params


@pytest.mark.parametrize("images", [None, 16])
def test_pruning_heads_with_a_constant_output_is_exact(images):
  dense = tiny.deit()
  variables = jax.tree.map(np.array, tiny.init(dense))
  for block, cut in (("blocks_0", [1, 2]), ("blocks_1", [0, 3])):
    value = variables["params"][block]["attn"]["value"]
    value["kernel"][:, cut] = 0
    value["bias"][cut] = 1
  variables = jax.device_put(variables)
  data = None if images is None else np.asarray(tiny.images(dense, images))
  model, got = vc.compact(dense, variables, HALF, images=data)
  x = tiny.images(dense, seed=5)
  np.testing.assert_allclose(tiny.apply(model, got, x), tiny.apply(dense, variables, x), rtol=1e-3,
                             atol=2e-4)


def error(model, variables, dense, dense_variables, x):
  got, expected = (np.asarray(tiny.apply(m, v, x)) for m, v in (
      (model, variables), (dense, dense_variables)))
  return np.mean((got - expected) ** 2)


def test_choosing_and_refitting_with_images_beats_weights_only():
  dense = tiny.deit(depth=1)
  variables = tiny.init(dense)
  x, fresh = (np.asarray(tiny.images(dense, 64, seed=seed)) for seed in (0, 7))
  by_weights, by_images = (vc.compact(dense, variables, HALF, images=images)
                           for images in (None, x))
  assert error(*by_images, dense, variables, fresh) < 0.7 * error(*by_weights, dense, variables,
                                                                  fresh)


def test_some_of_the_kept_heads_can_be_hallucinated():
  plan = vc.Plan(heads=vc.HeadPruning(kept_heads=3, heads=vc.HMHSA(real_heads=2)))
  dense = tiny.deit()
  variables = tiny.init(dense)
  for images in (None, np.asarray(tiny.images(dense, 16))):
    model, got = vc.compact(dense, variables, plan, images=images)
    attn = got["params"]["blocks_0"]["attn"]
    assert attn["query"]["kernel"].shape == (24, 2, 6)
    assert attn["value"]["kernel"].shape == (24, 3, 6)
    assert attn["hallucinate"]["key_taps"].shape == (1, 1, 3)
    assert np.isfinite(tiny.apply(model, got, tiny.images(model))).all()
  assert vc.Plan.from_json(plan.to_json()) == plan


def test_weights_round_trip_through_pytorch():
  model = tiny.deit(vc.Plan(heads=vc.HeadPruning(kept_heads=3)))
  variables = tiny.init(model)
  state = vc.to_torch(model, variables)
  assert state["blocks.0.attn.qkv.weight"].shape == (3 * 18, 24)
  assert state["blocks.0.attn.proj.weight"].shape == (24, 18)
  back = vc.from_torch(model, state)
  assert jax.tree.all(jax.tree.map(np.array_equal, variables, back))


def test_invalid_settings_are_rejected():
  with pytest.raises(ValueError, match="kept_heads=0"):
    vc.HeadPruning(kept_heads=0)
  with pytest.raises(ValueError, match="block 0 has 4 heads"):
    tiny.deit(vc.Plan(heads=vc.HeadPruning(kept_heads=5)))
  with pytest.raises(ValueError, match="is not a method of this axis"):
    vc.Plan(heads=vc.HeadPruning(heads=vc.CFFN()))
  with pytest.raises(ValueError, match="plan, heads, method"):
    vc.Plan.from_json('{"heads": {"method": "head_pruning", "heads": {"method": "hmsa"}}}')
