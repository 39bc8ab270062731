"""compact with calibration images: its choices and closed forms against slow references."""
import dataclasses
import importlib
import itertools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import batches, calibration, regression
from vitcompact.batches import take_images
from vitcompact.calibration import (
  ROWS_PER_CHANNEL,
  Activations,
  Calibration,
  observe_jitted,
  run,
  run_teacher,
)
from vitcompact.methods.attention.token_predictor import cluster_means
from vitcompact.methods.heads import importance, refit
from vitcompact.token_state import Tokens


def test_moments_and_errors_are_those_of_least_squares():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((200, 5)) + 2, rng.standard_normal((200, 3))
  y += x @ rng.standard_normal((5, 3)) + 1
  data = regression.Regression.from_sums(jax.tree.map(np.float64, regression.sums_of(x, y)))
  matrix = rng.standard_normal((5, 3))
  bias = data.bias(matrix)
  miss = np.mean(np.sum((y - x @ matrix - bias) ** 2, axis=1))
  total = np.mean(np.sum((y - y.mean(0)) ** 2, axis=1))
  assert data.error(matrix) == pytest.approx(miss / total, rel=1e-4)
  other = bias + 0.5
  miss = np.mean(np.sum((y - x @ matrix - other) ** 2, axis=1))
  assert data.error(matrix, other) == pytest.approx(miss / total, rel=1e-4)


def test_closest_factors_are_optimal_in_the_metric_of_the_inputs():
  rng = np.random.default_rng(1)
  x = rng.standard_normal((500, 6)) * 3.0 ** -np.arange(6)
  y = x @ rng.standard_normal((6, 4)) + 0.1 * rng.standard_normal((500, 4))
  data = regression.Regression.from_sums(jax.tree.map(np.float64, regression.sums_of(x, y)))
  full = np.linalg.solve(data.cov, data.cross)
  a, b = regression.closest_factors(full, data.cross, 2)
  best = data.error(a @ b)
  for _ in range(200):     # perturbed factors
    da, db = 0.02 * rng.standard_normal(a.shape), 0.02 * rng.standard_normal(b.shape)
    assert data.error((a + da) @ (b + db)) >= best - 1e-9


@pytest.mark.parametrize("heads,real", [(4, 2), (5, 3), (6, 4), (5, 2), (3, 1)])
def test_the_arrangement_of_heads_is_the_cheapest_of_all(heads, real):
  cost = np.random.default_rng(heads).random((heads, heads))
  found = refit.arrange(cost, real)
  assert sorted(found.order) == list(range(heads))

  def total(order):
    return sum(cost[order[g % real], order[real + g]] for g in range(heads - real))

  assert found.cost == pytest.approx(total(found.order))
  assert found.cost == pytest.approx(min(map(total, itertools.permutations(range(heads)))))


def test_permuting_heads_keeps_the_function():
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model)
  params = dict(variables["params"])
  params["blocks_0"] = refit.reorder_heads(params["blocks_0"], (2, 0, 3, 1))
  run = jax.jit(model.apply)
  np.testing.assert_allclose(run({"params": params}, x), run(variables, x), atol=1e-5)


def test_costs_and_taps_match_replacing_maps_one_by_one():
  rng = np.random.default_rng(2)
  heads, width, d, tokens = 3, 12, 4, 6
  value, out = rng.standard_normal((width, heads, d)), rng.standard_normal((heads, d, width))
  bias = rng.standard_normal((heads, d))
  maps = rng.dirichlet(np.ones(tokens), (2, heads, tokens))
  keys = rng.standard_normal((2, tokens, width))
  seen = Activations(maps=jnp.asarray(maps, jnp.float32), keys=jnp.asarray(keys, jnp.float32))
  costs, count = refit.head_costs(seen, *(jnp.asarray(a, jnp.float32) for a in (value, bias, out)))
  assert count == 2 * tokens
  for i, j in itertools.product(range(heads), repeat=2):
    wrong = maps[:, i] - maps[:, j] if i != j else maps[:, j]
    error = wrong @ (keys @ value[:, j] + bias[j]) @ out[j]
    assert costs[i, j] == pytest.approx(np.sum(error ** 2), rel=1e-4)

  gram, cross = refit.tap_sums(seen, jnp.asarray(value, jnp.float32),
                               jnp.asarray(out[2:], jnp.float32), jnp.zeros(3))
  kernel = rng.standard_normal((3, 3))
  filtered = np.zeros((2, tokens, tokens))     # the filtered map of head 0, used for head 2
  around = np.pad(maps[:, 0], ((0, 0), (1, 1), (1, 1)))
  for s, t in itertools.product(range(3), repeat=2):
    filtered += kernel[s, t] * around[:, s:s + tokens, t:t + tokens]
  attended = filtered @ (keys @ value[:, 2]) @ out[2]
  expected = maps[:, 2] @ (keys @ value[:, 2]) @ out[2]
  k = kernel.reshape(-1)
  assert k @ np.asarray(gram[0]) @ k == pytest.approx(np.sum(attended ** 2), rel=1e-3)
  assert k @ np.asarray(cross[0]) == pytest.approx(np.sum(attended * expected), rel=1e-3)


def redundant(model, seed=0):
  """Returns random variables in which heads, out of order, form pairs with nearly equal maps."""
  variables = tiny.init(model, seed, spread=0.5)
  rng, params = np.random.default_rng(seed), dict(variables["params"])
  for name in model.submodules():
    attn = dict(params[name]["attn"])
    for part in ("query", "key"):
      kernel, bias = (np.array(attn[part][leaf]) for leaf in ("kernel", "bias"))
      kernel[:, [1, 2]], bias[[1, 2]] = kernel[:, [0, 3]], bias[[0, 3]]
      attn[part] = {"kernel": jnp.asarray(kernel + 0.02 * rng.standard_normal(kernel.shape),
                                          jnp.float32), "bias": jnp.asarray(bias)}
    params[name] = {**params[name], "attn": attn}
  return {"params": params}


@pytest.fixture(scope="module")
def fits():
  """{name: (relative error of the logits, notes, variables)}, with half of each block's heads."""
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = redundant(model), tiny.images(model, batch=96)
  new = tiny.images(model, batch=64, seed=9)
  expected = tiny.apply(model, variables, new)
  plan, out = vc.Plan(heads=vc.HMHSA()), {}
  for name, images in {"weights": None, "data": x}.items():
    notes = {}
    small, got = vc.compact(model, variables, plan, images=images, progress=notes.__setitem__)
    error = jnp.linalg.norm(tiny.apply(small, got, new) - expected) / jnp.linalg.norm(expected)
    out[name] = float(error), notes, got
  return out


def test_calibration_finds_the_heads_that_are_alike(fits):
  for notes in fits["data"][1].values():
    first, second, *copies = notes["heads"]["order"]
    assert {frozenset((first, copies[0])), frozenset((second, copies[1]))} == {
        frozenset((0, 1)), frozenset((2, 3))}


def test_calibrated_heads_are_much_closer_on_other_images(fits):
  assert fits["data"][0] < fits["weights"][0] / 4


def test_a_refit_is_no_worse_than_a_copy_on_held_out_images(fits):
  for notes in fits["data"][1].values():
    assert notes["heads"]["held_out"] <= notes["heads"]["copied"]


def test_images_sorted_by_class_do_no_harm():
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model, batch=16)
  seen = []
  vc.compact(model, variables, vc.Plan(ffn=vc.CFFN()), images=x,
             progress=lambda name, notes: seen.append(name))
  assert seen == ["blocks_0", "blocks_1"]


def test_too_few_calibration_images_cause_one_warning():
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=16)
  with pytest.warns(UserWarning, match="16 calibration images are few: in blocks_") as caught:
    vc.compact(model, variables, vc.Plan(attention=vc.Sparsifiner(keep=0.3), ffn=vc.CFFN()),
               images=x)
  assert len([warning for warning in caught if "are few" in str(warning.message)]) == 1


@pytest.mark.parametrize("tokens", [vc.MCTF(r=2), vc.DynamicViT(blocks=(1,), keep=0.5)])
def test_reducers_that_act_before_the_ffn_are_compacted_together_with_it(tokens):
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=16)
  small, got = vc.compact(model, variables, vc.Plan(tokens=tokens, ffn=vc.CFFN()), images=x)
  assert np.isfinite(tiny.apply(small, got, x)).all()


def test_features_after_a_filter_of_several_terms_include_all_terms():
  """Against the filtered map itself, A^[n, m] = sum over r, s, t of q_rs A[n + s, m + t] k_rt."""
  rng = np.random.default_rng(4)
  maps, keys = rng.dirichlet(np.ones(5), (2, 2, 5)), rng.standard_normal((2, 5, 3))
  query, key = rng.standard_normal((2, 1, 2, 3))
  around, filtered = np.pad(maps[:, 0], ((0, 0), (1, 1), (1, 1))), 0
  for r, s, t in itertools.product(range(2), range(3), range(3)):
    filtered = filtered + query[0, r, s] * key[0, r, t] * around[:, s:s + 5, t:t + 5]
  features = np.concatenate([maps[:, 0] @ keys, filtered @ keys], axis=2).reshape(-1, 6)
  seen = Activations(maps=jnp.asarray(maps, jnp.float32), keys=jnp.asarray(keys, jnp.float32),
              target_attention=jnp.zeros((2, 5, 3)))
  sums = refit.filtered_sums(seen, *(jnp.asarray(taps, jnp.float32) for taps in (query, key)))
  np.testing.assert_allclose(sums.xx[1:, 1:], features.T @ features, rtol=1e-4, atol=1e-4)


def test_nothing_is_fitted_twice_without_held_out_images(monkeypatch):
  """The result is bit for bit that of a second fit."""
  rng = np.random.default_rng(0)
  x, old = rng.standard_normal((64, 8)), rng.standard_normal((8, 6))
  sums = jax.tree.map(np.float64, regression.sums_of(x, x @ old))
  called = []
  for module, name in ((regression, "_low_rank_factors"), (refit, "_descend")):
    fit = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, fit=fit, **sweeps: (
        called.append((fit, sweeps)) or fit(*given, **sweeps)))
  factors, both = regression.low_rank((sums, sums), old, 3)
  assert len(called) == 1
  again = called[0][0](both, old, 3, regression.RIDGES[-1])
  assert np.array_equal(factors.a, again[0]) and np.array_equal(factors.b, again[1])
  values, outputs = rng.standard_normal((2, 4, 2)), rng.standard_normal((2, 2, 6))
  refit.refit((sums, sums), [[0], [1]], values, outputs)
  assert sum(sweeps["sweeps"] for _, sweeps in called[1:]) == refit.SWEEPS


@pytest.mark.parametrize("images", [1, 4])
def test_a_fit_to_too_few_images_does_no_harm_on_others(images):
  """With fewer rows than unknowns, a weak ridge would fit these images and spoil all others."""
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=images)
  new = tiny.images(model, batch=64, seed=9)
  expected, plan = tiny.apply(model, variables, new), vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())

  def error(images):
    small, got = vc.compact(model, variables, plan, images=images)
    return jnp.linalg.norm(tiny.apply(small, got, new) - expected)

  with pytest.warns(UserWarning, match="too few to hold any out"):
    fitted = error(x)
  assert fitted < error(None)


def test_balanced_factors_have_the_same_product_and_smaller_entries():
  rng = np.random.default_rng(3)
  a, b = 1e3 * rng.standard_normal((8, 3)), 1e-3 * rng.standard_normal((3, 5))
  c, d = regression.balance_factors(a, b)
  np.testing.assert_allclose(c @ d, a @ b, rtol=1e-9)
  assert np.linalg.norm(c) == pytest.approx(np.linalg.norm(d))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_a_fitted_mask_keeps_more_dense_attention_than_an_untrained_one(variant):
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=32)
  new = tiny.images(model, batch=16, seed=9)
  maps = tiny.features(model, variables, new, True).maps
  plan, mass = vc.Plan(attention=vc.Sparsifiner(keep=0.25, variant=variant)), {}
  for name, images in {"fresh": None, "fitted": x}.items():
    small, got = vc.compact(model, variables, plan, images=images)
    _, state = tiny.apply(small, got, new, mutable=["attention"])
    kept = state["attention"]["blocks_0"]["links"]["kept"][0]
    mass[name] = float(jnp.mean(jnp.sum(jnp.where(kept, maps["blocks_0"][:, :, 1:], 0), axis=-1)))
  assert mass["fitted"] > 1.1 * mass["fresh"]


def test_keys_attended_by_the_same_queries_form_one_cluster():
  rows = np.repeat(np.eye(3)[[2, 0, 1]], [4, 2, 3], axis=0)
  down = cluster_means(rows + 0.01 * np.random.default_rng(0).standard_normal(rows.shape), 3)
  np.testing.assert_allclose(down.sum(axis=0), 1)
  assert {tuple(np.flatnonzero(column)) for column in down.T} == {
      (0, 1, 2, 3), (4, 5), (6, 7, 8)}


def block_outputs(seen):
  """Returns, per image, the residual stream after each branch if the branch hits its target."""
  return (seen.before_attention + seen.target_attention / 2,
          seen.before_ffn + seen.target_ffn / 2)


def rows(seen):
  return regression.sums_of(seen.hidden, seen.target_ffn, seen.step)


def calibration_of_a_block(images, held_out):
  """Returns random inputs of a dense block, as its calibration without a teacher."""
  block = tiny.deit(drop_path_rate=0.0, depth=1).submodules()["blocks_0"]
  x = Tokens(np.random.default_rng(5).standard_normal((images, 17, 24)).astype(np.float32))
  one = take_images(x, slice(1))
  variables = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), one))
  return Calibration(block, variables["params"], {}, x, None, held_out, {})


def test_regressions_of_wide_layers_skip_tokens_but_no_image(monkeypatch):
  """At least eight rows per hidden channel remain, from all columns of the grid and every image."""
  data = calibration_of_a_block(150, 50)
  block = data.module
  counted = [part.xx[0, 0] for part in data.sums(rows)]
  assert counted == [100 * 17, 50 * 17]
  monkeypatch.setattr(regression, "WIDE", block.site.hidden)
  least = ROWS_PER_CHANNEL * block.site.hidden
  assert 3 * least < 150 * 17 < 4 * least
  counted = [part.xx[0, 0] for part in data.sums(rows)]
  assert counted == [100 * 6, 50 * 6]   # tokens 0, 3, ..., 15
  # A step of 6 would miss columns.
  monkeypatch.setattr(calibration, "ROWS_PER_CHANNEL", ROWS_PER_CHANNEL // 2)
  assert data.sums(rows)[1].xx[0, 0] == 50 * 4


def test_small_sums_use_every_third_image_and_regressions_all(monkeypatch):
  data = calibration_of_a_block(60, 20)
  function, arguments = vc.HMHSA.statistics(data.params)
  for step, tokens in ((1, 40 * 17), (3, 14 * 17)):
    monkeypatch.setattr(calibration, "SUM_TOKENS", 40 * 17 // step)
    subset = data.with_fewer_images()
    np.testing.assert_array_equal(subset.x.x, data.x.x[:40:step])
    costs, count = data.sums(function, *arguments)[0]
    assert count == tokens
    np.testing.assert_allclose(costs, subset.sums(function, *arguments)[0][0], rtol=1e-4)
    assert data.sums(rows)[0].xx[0, 0] == 40 * 17
    contributions, its_arguments = importance.statistics(data.params)
    assert data.sums(contributions, *its_arguments)[0][2] == tokens


def test_branch_targets_lead_to_the_dense_stream():
  """From another stream too: targets correct the error of earlier blocks, scaled by skip_lam."""
  block = tiny.deit(drop_path_rate=0.0, depth=1).submodules()["blocks_0"].clone(skip_lam=2.0)
  rng = np.random.default_rng(5)
  dense_x, x = (Tokens(rng.standard_normal((3, 17, 24)).astype(np.float32)) for _ in range(2))
  variables = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), dense_x))
  _, teacher = run_teacher(block, variables, dense_x)
  data = Calibration(block, variables["params"], {}, x, teacher, 0, {})
  after_attention, after_ffn = data.sums(block_outputs)[0]
  seen = observe_jitted(block, variables, dense_x)
  np.testing.assert_allclose(after_attention, seen.before_ffn, atol=1e-4)
  np.testing.assert_allclose(after_ffn, run(block, variables, dense_x).x, atol=1e-4)


PASSES = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(factor="both"))


def test_layers_that_are_kept_are_not_computed_again_and_change_nothing(monkeypatch):
  """After its fits, a block's output is computed from what the last pass kept of its layers."""
  model = tiny.deit(drop_path_rate=0.0, depth=2)
  variables, images = tiny.init(model), tiny.images(model, 48)
  computed = []

  def recorded(block, variables, x, maps, known=None, final=None):
    computed.append((maps, tuple(sorted(known or ()))))
    return observe(block, variables, x, maps, known, final)

  observe = calibration.observe
  monkeypatch.setattr(calibration, "observe", recorded)
  found = {}
  for most in (calibration.KEPT_VALUES, 0):
    computed.clear()
    for programs in (calibration._jitted_forward, calibration._jitted_sums):
      programs.cache_clear()
    monkeypatch.setattr(calibration, "KEPT_VALUES", most)
    found[most] = tiny.apply(*vc.compact(model, variables, PASSES, images), images)
    layers = ("attn/out", "mlp/fc1") if most else ()
    assert {(True, layers[:1]), (False, layers)} <= set(computed)
  np.testing.assert_allclose(*found.values(), rtol=1e-3, atol=1e-3)


def test_a_known_output_takes_the_place_of_its_layer():
  data = calibration_of_a_block(4, 0)
  variables = {"params": data.params, "batch_stats": {}}
  zeros = {"attn/out": np.zeros((4, 17 * 24), np.float32)}
  _, seen = calibration.observe(data.module, variables, data.x, maps=False, known=zeros)
  np.testing.assert_array_equal(seen.attended, 0)
  np.testing.assert_array_equal(seen.before_ffn, data.x.x)   # nothing was added to the stream


def test_the_second_block_is_fitted_to_the_dense_stream_on_the_compact_one(monkeypatch):
  """Its teacher runs on the output of the dense first block, and its own input is that of the
  compact first block. Layers before the first block run once."""
  model = tiny.deit(drop_path_rate=0.0, depth=2)
  variables, images = tiny.init(model), np.asarray(tiny.images(model, 16))
  taught, own = [], []

  def teacher(block, its_variables, x):
    taught.append((x.x, run_teacher(block, its_variables, x)[0].x))
    return run_teacher(block, its_variables, x)

  def fit(block, data):
    new, out = fit_block(block, data)
    own.append((data.x.x, out.x))
    return new, out

  module = importlib.import_module("vitcompact.compact")
  fit_block = module._fit_block
  monkeypatch.setattr(calibration, "run_teacher", teacher)
  monkeypatch.setattr(module, "_fit_block", fit)
  vc.compact(model, variables, vc.Plan(ffn=vc.CFFN(rank_ratio=0.1)), images)
  np.testing.assert_array_equal(taught[0][0], own[0][0])     # the same tokens, each image once
  assert len(own[0][0]) == 16
  np.testing.assert_array_equal(taught[1][0], taught[0][1])
  np.testing.assert_array_equal(own[1][0], own[0][1])
  assert np.abs(own[1][0] - taught[1][0]).max() > 1e-2


def test_a_layer_that_is_called_twice_is_not_kept():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(3, name="twice")
      return layer(layer(nn.Dense(3, name="once")(x)))

  x, final = jnp.ones((2, 3)), dict.fromkeys(("once", "twice", "absent"))
  calibration.observe(Twice(), Twice().init(jax.random.key(0), x), x, maps=False, final=final)
  assert final["once"].shape == (2, 3) and final["twice"] is final["absent"] is None


@pytest.mark.parametrize("images", [256, 1024])
def test_the_chunks_of_all_passes_have_one_length(images):
  """So that each program is compiled once. A quarter of the images is held out."""
  values = jax.local_device_count() * batches.CHUNK_VALUES // 50   # 50 images fit in memory
  x, fitted = np.broadcast_to(np.float32(0), (images, values)), images - images // 4
  slices = [*batches.chunks(x, 0, fitted), *batches.chunks(x, fitted, images)]
  assert slices == list(batches.all_chunks(x)) and slices[-1].stop == images
  assert len({at.stop - at.start for at in slices}) == 1 and len(slices) >= images // 64
  assert list(batches.chunks(x, 0, 48)) == [slice(0, 48)]   # few images are not split


class PerHead(nn.Module):
  """An attention mask predictor with a parameter for each head, which the protocol forbids."""

  @nn.compact
  def __call__(self, core, query, key, source=None, fused=False):
    self.param("scale", nn.initializers.ones, (query.shape[2],))
    return core


@dataclasses.dataclass(frozen=True)
class PerHeadMethod:
  axis: ClassVar = "attention"

  def make(self, site, **kwargs):
    return PerHead(**kwargs)


def test_parameters_of_the_wrong_number_of_heads_are_refused(monkeypatch):
  monkeypatch.setitem(vc.METHODS["attention"], "per_head", PerHeadMethod)
  model = tiny.deit()
  plan = vc.Plan(heads=vc.HMHSA(), attention=PerHeadMethod())
  with pytest.raises(ValueError, match="the compacted variables do not fit") as error:
    vc.compact(model, tiny.init(model), plan)
  assert "\n" not in str(error.value)
