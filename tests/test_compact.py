"""compact from calibration images: choices and closed forms against slow references."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import calibration, regression
from vitcompact.calibration import (
  ROWS_PER_CHANNEL,
  Activations,
  Calibration,
  observe_jitted,
  run,
  run_teacher,
  take_images,
)
from vitcompact.methods.attention.token_predictor import cluster_means
from vitcompact.methods.heads import importance, refit
from vitcompact.token_state import Tokens


def test_moments_and_their_errors_are_those_of_least_squares():
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


def test_no_factors_of_a_rank_are_closer_than_those_in_the_metric_of_the_inputs():
  rng = np.random.default_rng(1)
  x = rng.standard_normal((500, 6)) * 3.0 ** -np.arange(6)
  y = x @ rng.standard_normal((6, 4)) + 0.1 * rng.standard_normal((500, 4))
  data = regression.Regression.from_sums(jax.tree.map(np.float64, regression.sums_of(x, y)))
  full = np.linalg.solve(data.cov, data.cross)
  a, b = regression.closest_factors(full, data.cross, 2)
  best = data.error(a @ b)
  for _ in range(200):     # neighbours
    da, db = 0.02 * rng.standard_normal(a.shape), 0.02 * rng.standard_normal(b.shape)
    assert data.error((a + da) @ (b + db)) >= best - 1e-9


@pytest.mark.parametrize("heads,real", [(4, 2), (5, 3), (6, 4), (5, 2), (3, 1)])
def test_the_arrangement_is_the_cheapest_of_all(heads, real):
  cost = np.random.default_rng(heads).random((heads, heads))
  found = refit.arrange(cost, real)
  assert sorted(found.order) == list(range(heads))

  def total(order):
    return sum(cost[order[g % real], order[real + g]] for g in range(heads - real))

  assert found.cost == pytest.approx(total(found.order))
  assert found.cost == pytest.approx(min(map(total, itertools.permutations(range(heads)))))


def test_heads_in_another_order_are_the_same_function():
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model)
  params = dict(variables["params"])
  params["blocks_0"] = refit.reorder_heads(params["blocks_0"], (2, 0, 3, 1))
  run = jax.jit(model.apply)
  np.testing.assert_allclose(run({"params": params}, x), run(variables, x), atol=1e-5)


def test_costs_and_taps_are_those_of_maps_replaced_one_by_one():
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
  made = np.zeros((2, tokens, tokens))     # the filtered map of head 0, as head 2's
  around = np.pad(maps[:, 0], ((0, 0), (1, 1), (1, 1)))
  for s, t in itertools.product(range(3), repeat=2):
    made += kernel[s, t] * around[:, s:s + tokens, t:t + tokens]
  behind = made @ (keys @ value[:, 2]) @ out[2]
  wanted = maps[:, 2] @ (keys @ value[:, 2]) @ out[2]
  k = kernel.reshape(-1)
  assert k @ np.asarray(gram[0]) @ k == pytest.approx(np.sum(behind ** 2), rel=1e-3)
  assert k @ np.asarray(cross[0]) == pytest.approx(np.sum(behind * wanted), rel=1e-3)


def redundant(model, seed=0):
  """Random variables in which the maps of each head are nearly those of another, out of order."""
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
  """{name: (relative error of the logits, notes, variables)}, half of the heads in each block."""
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = redundant(model), tiny.images(model, batch=96)
  new = tiny.images(model, batch=64, seed=9)
  wanted = tiny.apply(model, variables, new)
  plan, out = vc.Plan(heads=vc.HMHSA()), {}
  for name, images in {"weights": None, "data": x}.items():
    notes = {}
    small, got = vc.compact(model, variables, plan, images=images, progress=notes.__setitem__)
    error = jnp.linalg.norm(tiny.apply(small, got, new) - wanted) / jnp.linalg.norm(wanted)
    out[name] = float(error), notes, got
  return out


def test_images_find_the_heads_that_are_alike(fits):
  for notes in fits["data"][1].values():
    first, second, *copies = notes["heads"]["order"]
    assert {frozenset((first, copies[0])), frozenset((second, copies[1]))} == {
        frozenset((0, 1)), frozenset((2, 3))}


def test_images_bring_compact_heads_many_times_nearer_on_other_images(fits):
  assert fits["data"][0] < fits["weights"][0] / 4


def test_a_refit_is_no_worse_than_a_copy_on_the_images_held_out(fits):
  for notes in fits["data"][1].values():
    assert notes["heads"]["held_out"] <= notes["heads"]["copied"]


def test_images_in_the_order_of_their_classes_do_no_harm():
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model, batch=16)
  seen = []
  vc.compact(model, variables, vc.Plan(ffn=vc.CFFN()), images=x,
             progress=lambda name, notes: seen.append(name))
  assert seen == ["blocks_0", "blocks_1"]


def test_few_images_are_told_once():
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=16)
  with pytest.warns(UserWarning, match="16 calibration images are few: in blocks_") as caught:
    vc.compact(model, variables, vc.Plan(attention=vc.Sparsifiner(keep=0.3), ffn=vc.CFFN()),
               images=x)
  assert len([warning for warning in caught if "are few" in str(warning.message)]) == 1


@pytest.mark.parametrize("tokens", [vc.MCTF(r=2), vc.DynamicViT(blocks=(1,), keep=0.5)])
def test_reducers_that_act_before_the_ffn_are_compacted_with_it(tokens):
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=16)
  small, got = vc.compact(model, variables, vc.Plan(tokens=tokens, ffn=vc.CFFN()), images=x)
  assert np.isfinite(tiny.apply(small, got, x)).all()


def test_features_behind_a_filter_of_more_terms_have_all_of_them():
  """Against the filtered map itself, A^[n, m] = sum over r, s, t of q_rs A[n + s, m + t] k_rt."""
  rng = np.random.default_rng(4)
  maps, keys = rng.dirichlet(np.ones(5), (2, 2, 5)), rng.standard_normal((2, 5, 3))
  query, key = rng.standard_normal((2, 1, 2, 3))
  around, made = np.pad(maps[:, 0], ((0, 0), (1, 1), (1, 1))), 0
  for r, s, t in itertools.product(range(2), range(3), range(3)):
    made = made + query[0, r, s] * key[0, r, t] * around[:, s:s + 5, t:t + 5]
  features = np.concatenate([maps[:, 0] @ keys, made @ keys], axis=2).reshape(-1, 6)
  seen = Activations(maps=jnp.asarray(maps, jnp.float32), keys=jnp.asarray(keys, jnp.float32),
              target_attention=jnp.zeros((2, 5, 3)))
  sums = refit.filtered_sums(seen, *(jnp.asarray(taps, jnp.float32) for taps in (query, key)))
  np.testing.assert_allclose(sums.xx[1:, 1:], features.T @ features, rtol=1e-4, atol=1e-4)


def test_nothing_is_fitted_twice_where_nothing_is_held_out(monkeypatch):
  """And what comes out is what fitting again gives, to the bit."""
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
def test_images_too_few_for_a_fit_do_no_harm_on_others(images):
  """Rows are fewer than unknowns: a weak ridge fits these images and spoils all others."""
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), tiny.images(model, batch=images)
  new = tiny.images(model, batch=64, seed=9)
  wanted, plan = tiny.apply(model, variables, new), vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())

  def error(images):
    small, got = vc.compact(model, variables, plan, images=images)
    return jnp.linalg.norm(tiny.apply(small, got, new) - wanted)

  with pytest.warns(UserWarning, match="too few to hold any out"):
    fitted = error(x)
  assert fitted < error(None)


def test_balanced_factors_are_the_same_product_of_smaller_entries():
  rng = np.random.default_rng(3)
  a, b = 1e3 * rng.standard_normal((8, 3)), 1e-3 * rng.standard_normal((3, 5))
  c, d = regression.balance_factors(a, b)
  np.testing.assert_allclose(c @ d, a @ b, rtol=1e-9)
  assert np.linalg.norm(c) == pytest.approx(np.linalg.norm(d))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_a_fitted_mask_keeps_more_of_the_dense_attention_than_a_fresh_one(variant):
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


def test_keys_that_get_attention_from_the_same_queries_are_one_cluster():
  rows = np.repeat(np.eye(3)[[2, 0, 1]], [4, 2, 3], axis=0)
  down = cluster_means(rows + 0.01 * np.random.default_rng(0).standard_normal(rows.shape), 3)
  np.testing.assert_allclose(down.sum(axis=0), 1)
  assert {tuple(np.flatnonzero(column)) for column in down.T} == {
      (0, 1, 2, 3), (4, 5), (6, 7, 8)}


def block_outputs(seen):
  """Per image, what the stream is after each branch where the branch gives what is wanted."""
  return (seen.before_attention + seen.target_attention / 2,
          seen.before_ffn + seen.target_ffn / 2)


def rows(seen):
  return regression.sums_of(seen.hidden, seen.target_ffn, seen.step)


def test_regressions_of_wide_layers_pass_over_tokens_of_every_image(monkeypatch):
  """Eight rows a hidden channel are left, of all columns of the grid; and no image is missed."""
  block = tiny.deit(drop_path_rate=0.0, depth=1).submodules()["blocks_0"]
  x = Tokens(np.random.default_rng(5).standard_normal((150, 17, 24)).astype(np.float32))
  one = take_images(x, slice(1))
  variables = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), one))
  data = Calibration(block, variables["params"], {}, x, None, 50, {})
  counted = [part.xx[0, 0] for part in data.sums(rows)]
  assert counted == [100 * 17, 50 * 17]
  monkeypatch.setattr(regression, "WIDE", block.site.hidden)
  least = ROWS_PER_CHANNEL * block.site.hidden
  assert 3 * least < 150 * 17 < 4 * least
  counted = [part.xx[0, 0] for part in data.sums(rows)]
  assert counted == [100 * 6, 50 * 6]   # tokens 0, 3, ..., 15
  # Every sixth: they share columns of 4 x 4.
  monkeypatch.setattr(calibration, "ROWS_PER_CHANNEL", ROWS_PER_CHANNEL // 2)
  assert data.sums(rows)[1].xx[0, 0] == 50 * 4


def test_sums_of_few_numbers_use_every_third_image(monkeypatch):
  """Those over a smaller calibration, and those that share a pass with sums over all images."""
  block = tiny.deit(drop_path_rate=0.0, depth=1).submodules()["blocks_0"]
  x = Tokens(np.random.default_rng(5).standard_normal((60, 17, 24)).astype(np.float32))
  one = take_images(x, slice(1))
  variables = tiny.randomised(jax.eval_shape(block.init, jax.random.key(0), one))
  data = Calibration(block, variables["params"], {}, x, None, 20, {})
  function, arguments = vc.HMHSA.statistics(variables["params"])
  for step, tokens in ((1, 40 * 17), (3, 14 * 17)):
    monkeypatch.setattr(calibration, "SUM_TOKENS", 40 * 17 // step)
    few = data.with_fewer_images()
    np.testing.assert_array_equal(few.x.x, x.x[:40:step])
    costs, count = data.sums(function, *arguments)[0]
    assert count == tokens
    np.testing.assert_allclose(costs, few.sums(function, *arguments)[0][0], rtol=1e-4)
    assert data.sums(rows)[0].xx[0, 0] == 40 * 17
    assert importance_count(data, variables["params"]) == tokens


def importance_count(data, params):
  function, arguments = importance.statistics(params)
  return data.sums(function, *arguments)[0][2]


def test_what_a_branch_is_wanted_to_give_leads_to_the_dense_stream():
  """From another stream too: it makes good what earlier blocks lost, by the residual's factor."""
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
