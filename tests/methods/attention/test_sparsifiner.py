"""Sparsifiner at token granularity: masked dense attention, the reference for the method."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import attention, trees
from vitcompact.attention import Core, reference
from vitcompact.methods.attention.sparsifiner import attention_reconstruction
from vitcompact.methods.attention.token_predictor import TokenMaskPredictor, gather_rows, top_k_mask
from vitcompact.methods.heads.hmhsa import Hallucinate

TOKENS, HEADS, WIDTH, PREFIX = 13, 2, 6, 1


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def query_key(seed=0, batch=2, tokens=TOKENS):
  return [*tiny.normal(2, batch, tokens, HEADS, WIDTH, seed=seed)]


def predictor(spec, **fields):
  module = TokenMaskPredictor(spec, TOKENS, PREFIX, **fields)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), Core(), *query_key()))
  return module, tiny.randomised(shapes, spread=0.5)


def mask_of(module, variables, *args):
  return np.asarray(jax.jit(lambda variables: module.apply(variables, Core(), *args).mask)(
      variables))


def masks_by_loops(spec, params, query, key):
  """The definition, image by image, head by head and row by row, in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
  batch, tokens, heads, width = query.shape
  scale = width ** -0.5
  if spec.variant == "code":
    scale = heads ** -0.5
    query = query @ p["reduce_query"]["kernel"] + p["reduce_query"]["bias"]
    key = key @ p["reduce_key"]["kernel"] + p["reduce_key"]["bias"]
  signed = spec.basis == "signed" or (spec.basis is None and spec.variant == "paper")
  up = np.where(np.abs(p["up"]) > spec.basis_threshold, p["up"] if signed else np.abs(p["up"]), 0)
  mask = np.zeros((batch, heads, tokens, tokens), bool)
  mask[:, :, :PREFIX] = True
  for b, h, n in itertools.product(range(batch), range(heads), range(PREFIX, tokens)):
    row = softmax(scale * query[b, n, h] @ (p["down"].T @ key[b, :, h]).T)
    if isinstance(spec.coefficients, float):
      row = np.where(row > spec.coefficients, row, 0)
    else:
      row[np.argsort(-row, kind="stable")[spec.coefficients:]] = 0
    best = np.argsort(-(up @ row), kind="stable")[:int(np.ceil(spec.keep * tokens - 1e-9))]
    mask[b, h, n, best] = True
  return mask


@pytest.mark.parametrize("spec", [
    vc.Sparsifiner(keep=0.4, reduce_n=3, coefficients=2),
    vc.Sparsifiner(keep=0.25, reduce_n=2, coefficients=0.15, basis="magnitude"),
    vc.Sparsifiner(keep=0.4, reduce_n=3, coefficients=2, basis_threshold=0.3, variant="code"),
    vc.Sparsifiner(keep=0.7, rank=5, variant="code", basis="signed")])
def test_kept_pairs_match_the_definition_with_exactly_k_per_row(spec):
  module, variables = predictor(spec)
  query, key = query_key()
  shares = []

  @jax.jit
  def run(variables, query, key):
    core = module.apply(variables, Core(), query, key)
    shares.append(core.scored)
    return core.mask, reference.masked_scores(core, query, key)

  mask, scores = run(variables, query, key)
  expected = masks_by_loops(spec, variables["params"], query, key)
  np.testing.assert_array_equal(mask, expected)
  finite = np.isfinite(scores).sum(axis=-1)
  assert (finite[:, :, PREFIX:] == spec.budget(TOKENS)).all() and (finite[:, :, 0] == TOKENS).all()
  assert float(shares[0]) == pytest.approx(expected.mean())


def test_ties_keep_the_lowest_index_and_exactly_k():
  x = np.array([[1, 3, 3, 3, 0], [np.inf, 0, 0, np.inf, 0]], np.float32)
  two, three = jax.jit(lambda x: (top_k_mask(x, 2), top_k_mask(x, 3)))(x)
  np.testing.assert_array_equal(two, [[0, 1, 1, 0, 0], [1, 0, 0, 1, 0]])
  np.testing.assert_array_equal(three, [[0, 1, 1, 1, 0], [1, 1, 0, 1, 0]])


@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 5, 33)])
def test_largest_entries_match_a_stable_sort(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32).round(1)
  x[..., :4] = [np.inf, -np.inf, -0.0, 0.0]
  rank = np.argsort(np.argsort(-x, axis=-1, kind="stable"), axis=-1)
  counts = (1, 8, 32, 33)
  masks = jax.jit(lambda x: [top_k_mask(x, k) for k in counts])(x)
  for k, mask in zip(counts, masks, strict=True):
    np.testing.assert_array_equal(mask, rank < k)


def test_rounding_errors_do_not_increase_the_budget():
  assert vc.Sparsifiner(keep=0.55).budget(100) == 55 and vc.Sparsifiner(keep=0.25).budget(197) == 50


def test_permuting_a_batch_permutes_its_masks():
  module, variables = predictor(vc.Sparsifiner(keep=0.4, reduce_n=3))
  query, key = query_key(batch=3)
  order = np.array([2, 0, 1])
  np.testing.assert_array_equal(mask_of(module, variables, query[order], key[order]),
                                mask_of(module, variables, query, key)[order])


def test_predictions_follow_dropped_merged_and_fused_tokens():
  """13 sources: 0 is the class token, 2 and 3 are merged, 5 is dropped, 9 to 12 are fused, last."""
  source = np.array([[0, 1, 2, 2, 3, -1, 4, 5, 6, 7, 7, 7, 7]])
  rows = tiny.normal(TOKENS, 4, seed=3)
  sums, means = map(np.asarray, jax.jit(gather_rows, static_argnums=2)(rows, source, 8))
  np.testing.assert_allclose(sums[0, 2], rows[2] + rows[3], rtol=1e-6)
  np.testing.assert_allclose(means[0, 7], rows[9:].mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(sums.sum(axis=1)[0], rows.sum(axis=0) - rows[5], rtol=1e-5, atol=1e-5)
  spec = vc.Sparsifiner(keep=0.25, reduce_n=3)
  module, variables = predictor(spec)
  query, key = query_key(batch=1, tokens=8)
  mask = mask_of(module, variables, query, key, source, True)
  assert mask[..., 0].all() and mask[..., 7].all() and mask[:, :, 0].all()
  assert (mask[:, :, 1:].sum(axis=-1) == 4).all()      # ceil(13 / 4), not ceil(8 / 4)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_tokens_only_counted_as_dropped_are_masked_as_if_they_were_removed(variant):
  """DynamicViT in training, compared with gathering the same survivors at inference."""
  module, variables = predictor(vc.Sparsifiner(keep=0.4, reduce_n=3, variant=variant))
  query, key = query_key(batch=1)
  kept = np.array([0, 1, 3, 4, 7, 8, 9, 12])
  keep_mask = np.isin(np.arange(TOKENS), kept).astype(np.float32)[None]
  source = np.full((1, TOKENS), -1)
  source[:, kept] = np.arange(len(kept))

  @jax.jit
  def training(keep_mask):
    return module.apply(variables, Core(keep_mask=keep_mask), query, key).mask

  np.testing.assert_array_equal(
      np.asarray(training(keep_mask))[:, :, kept][..., kept],
      mask_of(module, variables, query[:, kept], key[:, kept], source, False))


def test_keeping_every_pair_is_dense_attention():
  dense = tiny.deit()
  for variant in ("paper", "code"):
    model = tiny.deit(vc.Plan(attention=vc.Sparsifiner(keep=1.0, variant=variant)))
    variables, x = tiny.init(model), tiny.images(model)
    np.testing.assert_allclose(tiny.apply(model, variables, x),
                               tiny.apply(dense, without_predictors(variables), x), atol=1e-6)


def without_predictors(variables):
  params = {name: {k: v for k, v in part.items() if k != "links"} if name.startswith("blocks")
            else part for name, part in variables["params"].items()}
  return {**variables, "params": params}


def test_phase_2_trains_everything_but_predictors_and_phase_1_only_predictors():
  sparse = tiny.deit(vc.Plan(attention=vc.Sparsifiner(keep=0.3)))
  dense = sparse.clone(plan=sparse.plan.map(vc.Sparsifiner.first_phase.method))
  variables, x = tiny.init(sparse), tiny.images(sparse)

  @jax.jit
  @jax.grad
  def phase_1(params):
    _, state = tiny.apply(dense, {"params": params}, x, mutable=["attention"])
    return attention_reconstruction(state["attention"]).sum()

  phase_2 = jax.jit(jax.grad(lambda p: jnp.sum(tiny.apply(sparse, {"params": p}, x) ** 2)))
  for name, leaf in trees.named_leaves(phase_2(variables["params"])).items():
    assert bool((np.asarray(leaf) == 0).all()) == ("/links/" in name), name
  for name, leaf in trees.named_leaves(phase_1(variables["params"])).items():
    assert bool((np.asarray(leaf) == 0).all()) == ("/links/" not in name), name
  logits, state = tiny.apply(dense, variables, x, mutable=["attention", "maps"])
  plain = tiny.deit()
  expected = tiny.apply(plain, without_predictors(variables), x)
  np.testing.assert_allclose(logits, expected, atol=1e-6)
  block = state["attention"]["blocks_1"]["links"]
  maps = np.asarray(state["maps"]["blocks_1"]["attn"]["maps"][0])
  np.testing.assert_allclose(block["target"][0], maps[:, :, 1:], atol=1e-6)
  assert block["score"][0].shape == (3, 4, 16, 17)


def test_reconstruction_can_train_the_values_that_choose_the_pairs():
  """With fit="used" the sparse score is reconstructed, and its gradient reaches all of W_up."""
  spec = vc.Sparsifiner(keep=0.3, reduce_n=3, coefficients=2, basis_threshold=0.4, fit="used")
  module, variables = predictor(spec)
  query, key = query_key()

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradients(params):
    score, = module.apply({"params": params}, Core(), query, key,
                          mutable=["attention"])[1]["attention"]["score"]
    return jnp.sum(score), score

  params = jax.device_get(variables["params"])
  small = np.abs(params["up"]) <= 0.4
  assert small.any()
  grads, score = gradients(params)
  _, score_of_cut = gradients({**params, "up": np.where(small, 0, params["up"])})
  np.testing.assert_allclose(score, score_of_cut, atol=1e-6)
  assert (np.asarray(grads["up"]) != 0)[small].all()


@pytest.mark.parametrize("site", ["probs", "logits"])
def test_hallucinated_heads_use_the_masked_maps_of_real_heads(site):
  module = Hallucinate(vc.HMHSA(site=site))
  query, key = query_key()
  value = tiny.normal(2, TOKENS, 3, WIDTH, seed=5)
  params = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), query, key, value))
  mask = np.random.default_rng(6).random((2, HEADS, TOKENS, TOKENS)) < 0.4
  mask = mask | np.eye(TOKENS, dtype=bool)
  out, state = jax.jit(lambda mask: module.apply(params, query, key, value, Core(mask=mask),
                                                 mutable=["maps"]))(mask)
  maps = np.asarray(state["maps"]["maps"][0])
  assert np.isfinite(out).all()
  np.testing.assert_allclose(out, jax.jit(attention.weigh)(maps, value), atol=1e-5)
  np.testing.assert_array_equal(maps[:, :2] > 0, mask)
  if site == "logits":       # masked after the filter, with the mask of the source head
    np.testing.assert_array_equal(maps[:, 2] > 0, mask[:, 0])


@pytest.mark.parametrize("plan", [
    vc.Plan(attention=vc.Sparsifiner(keep=0.4), heads=vc.HMHSA(), ffn=vc.CFFN()),
    vc.Plan(attention=vc.Sparsifiner(keep=0.4, variant="code"), heads=vc.HMHSA(site="logits"),
            tokens=vc.EViT(keep=0.6, blocks=(0,))),
    vc.Plan(attention=vc.Sparsifiner(keep=0.4, coefficients=0.2), tokens=vc.ToMe(r=3),
            blocks={0: {"attention": None}})])
def test_fold_keeps_the_function_and_stores_the_thresholded_basis(plan):
  model = tiny.deit(plan)
  # With this spread the threshold removes part of the basis, and tokens differ by position.
  variables, x = tiny.init(model, spread=0.02), tiny.images(model)
  variables["params"]["pos_embed"] = tiny.init(model)["params"]["pos_embed"]
  deploy, folded = tiny.fold(model, variables)
  assert vc.verify(model, variables, deploy, folded, x).max_rel <= 1e-5
  assert trees.differences(folded, jax.eval_shape(deploy.init, jax.random.key(0), x)) == []
  before, after = (np.asarray(v["params"]["blocks_1"]["links"]["up"])
                   for v in (variables, folded))
  assert 0 < (after == 0).mean() < 1
  np.testing.assert_array_equal(after == 0, np.abs(before) <= 0.02)
  assert (after < 0).any() == (plan.attention.variant == "paper")
  assert ("links" in folded["params"]["blocks_0"]) == (0 not in plan.blocks)


def test_fold_drops_predictors_that_the_plan_makes_absent():
  variables = tiny.init(tiny.deit(vc.Plan(attention=vc.Sparsifiner())))
  absent = tiny.deit(vc.Plan(attention=vc.Sparsifiner(min_tokens=18)))
  assert absent.submodules()["blocks_0"].methods.attention is None
  assert "links" not in vc.fold(absent, variables)[1]["params"]["blocks_0"]


def test_min_tokens_counts_the_tokens_that_enter_a_block():
  plan = vc.Plan(attention=vc.Sparsifiner(min_tokens=12), tokens=vc.EViT(keep=0.6, blocks=(0, 1)))
  blocks = tiny.deit(plan, depth=3).submodules().values()     # 17, 1 + 10 + 1, 1 + 7 + 1 tokens
  assert [block.methods.attention is not None for block in blocks] == [True, True, False]


def test_compact_initialises_predictors_reproducibly():
  model = tiny.deit()
  variables = tiny.init(model)
  plan = vc.Plan(attention=vc.Sparsifiner(keep=0.5, variant="code"),
                 blocks={1: {"heads": vc.HMHSA()}})
  small, first = vc.compact(model, variables, plan)
  assert trees.digest(first) == trees.digest(vc.compact(model, variables, plan)[1])
  expected = jax.eval_shape(small.init, jax.random.key(0), tiny.images(small))
  assert trees.differences(first, expected) == []
  assert first["params"]["blocks_0"]["attn"] is variables["params"]["blocks_0"]["attn"]
  assert 0.01 < np.std(first["params"]["blocks_0"]["links"]["up"]) < 0.03


def test_reconstruction_loss_is_the_sum_of_squares_over_the_number_of_blocks():
  ones = np.ones((2, 3, 4, 5), np.float32)
  seen = {f"blocks_{i}": {"links": {"score": (ones * scale,), "target": (-ones,)}}
          for i, scale in enumerate((0.0, 1.0))}
  np.testing.assert_allclose(jax.jit(attention_reconstruction)(seen), [(60 + 240) / 2] * 2)
  with pytest.raises(ValueError, match="no block of this model has a mask predictor"):
    attention_reconstruction({})


def test_predictors_are_exported_under_their_authors_names():
  model = tiny.deit(vc.Plan(attention=vc.Sparsifiner(variant="code")), deploy=True)
  variables = tiny.init(model)
  state = vc.to_torch(model, variables)
  name = "blocks.1.attn.mask_predictor"
  assert {key.removeprefix(name) for key in state if key.startswith(name)} == {
      ".proj_n", ".proj_back_n", ".proj_c_q.weight", ".proj_c_q.bias", ".proj_c_k.weight",
      ".proj_c_k.bias"}
  np.testing.assert_array_equal(np.transpose(state[f"{name}.proj_c_q.weight"]),
                                variables["params"]["blocks_1"]["links"]["reduce_query"]["kernel"])
  assert trees.digest(vc.from_torch(model, state)) == trees.digest(variables)


@pytest.mark.parametrize("name", ["lvvit_s", "pvt_tiny", "pvt_v2_b0", "nextvit_small"])
def test_every_backbone_with_softmax_attention_accepts_predictors(name):
  model = vc.create_model(name, plan=vc.Plan(attention=vc.Sparsifiner()), image_size=64)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
  assert trees.first_match(model.parameter_rules(), shapes, may_be_idle=True)
  blocks = {name: part for name, part in shapes.items() if name.startswith("blocks")}
  assert [name for name in blocks if "links" in blocks[name]] == \
      [name for name in blocks if "attn" in blocks[name]] != []


@pytest.mark.parametrize("fields,words", [
    ({"keep": 0}, "(0, 1]"), ({"keep": 1.5}, "(0, 1]"), ({"variant": "figure"}, "paper"),
    ({"granularity": "row"}, "token"), ({"coefficients": 0}, "threshold"),
    ({"coefficients": 1.0}, "threshold"), ({"reduce_n": 0}, "whole number"),
    ({"rank": 0}, "whole number"), ({"min_tokens": -1}, "0 or more"),
    ({"basis_threshold": -0.1}, "at least 0"), ({"basis_threshold": float("nan")}, "at least 0"),
    ({"basis": "abs"}, "signed"),
    ({"granularity": "block", "variant": "code"}, "no blocks")])
def test_invalid_options_raise_one_line_errors(fields, words):
  with pytest.raises(ValueError, match="Sparsifiner") as error:
    vc.Sparsifiner(**fields)
  assert words in str(error.value) and "\n" not in str(error.value)
