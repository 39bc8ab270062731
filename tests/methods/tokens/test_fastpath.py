"""FastPath: which patches take the FFN and what the others get, in every kind of model."""
import functools
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.methods.tokens import reference
from tests.models import drawn
from tests.models.pyramids import pvt
from vitcompact import calibration, torch_names, trees
from vitcompact.block import Block, block_entries
from vitcompact.draw import tokens as drawing
from vitcompact.methods.protocol import CAPABILITIES, Site
from vitcompact.methods.tokens import fastpath, predictor
from vitcompact.plan import BlockMethods
from vitcompact.token_state import NOTHING, Paths, Tokens
from vitcompact.train import losses
from vitcompact.train.config import complete
from vitcompact.train.objective import make_objective

# Blocks 2, 3 and 4 are the third stage, with 4 x 4 patches; block 5 is the last, with 2 x 2.
STAGES = {"depths": (1, 1, 3, 1), "drop_path_rate": 0.0}
TOKENS = vc.FastPath(keep=(0.5, 0.75), blocks=(2, 3))
# One stage of 8 x 8 patches, for tests that compile gradients.
SHORT = {"image_size": 32, "widths": (20,), "depths": (3,), "heads": (5,), "mlp_ratios": (2,),
         "sr_ratios": (1,), "drop_path_rate": 0.0}
SHORT_TOKENS = vc.FastPath(keep=0.5, blocks=(0, 1))
# Blocks 1 and 2 are transformer blocks with 6 x 6 and 3 x 3 patches.
NEXTVIT = {"image_size": 48, "num_classes": 5, "stem_widths": (8, 4, 8, 8), "head_dim": 8,
           "widths": (8, 24, 24, 24), "depths": (1, 1, 1, 0), "periods": (0, 1, 1, 0),
           "drop_path_rate": 0.0}
HYBRID = vc.FastPath(keep=(0.5, 0.4), blocks=(1, 2))


def nextvit(**axes):
  return vc.create_model("nextvit_small", plan=vc.Plan(**{"tokens": HYBRID, **axes}), **NEXTVIT)


def apply(model, variables, x, **fields):
  return jax.jit(lambda v, x: model.apply(v, x, **fields))(variables, x)


def choose_most_likely(key, choice_bp2):
  """Replaces the straight-through Gumbel softmax: deterministic, with patches on both paths."""
  del key
  score = choice_bp2[..., 0] - choice_bp2[..., 1]
  return (score > score.mean(axis=1, keepdims=True)).astype(jnp.float32)


# Counts.


@pytest.mark.parametrize("keep,patches", [
    (0.7, (137, 98, 58)), ((0.7, 0.497, 0.3), (137, 97, 58)), (0.9, (176, 137, 98)),
    ((0.1, 1, 0.001), (19, 196, 1))])
def test_shares_are_of_all_patches_and_budgets_ignore_rounding_errors(keep, patches):
  shares = vc.FastPath(keep=keep).shares()
  assert tuple(predictor.budget(share, 196) for share in shares) == patches
  assert vc.FastPath(keep=0.7).shares() == (0.7, 0.5, 0.3)   # in floats, 0.7 - 0.2 is below a half
  assert predictor.budget(0.29, 100) == 29                   # and 0.29 * 100 is below 29


@pytest.mark.parametrize("name,blocks,giga", [
    ("pvt_small", (8, 9, 10), 3.4064),
    pytest.param("pvt_medium", (9, 11, 13), 5.2471, marks=pytest.mark.slow),
    ("pvt_v2_b2", (8, 9, 10), 3.6174)])
def test_macs_and_parameters_match_the_specification(name, blocks, giga):
  """The specified MACs exclude the predictors, which are counted as well."""
  model = vc.create_model(name, plan=vc.Plan(tokens=vc.FastPath(blocks=blocks)), deploy=True)
  first, stage = blocks[0], model.sites()[blocks[0]].first
  fast = [site for site in model.sites() if site.block >= first and site.first == stage]
  count, dense = vc.count(model), vc.count(model.clone(plan=vc.Plan()))
  scored = 196 * (320 * 320 + 320 * 160 + 160 * 80 + 80 * 2)
  assert round((count.macs - 3 * scored) / 1e9, 4) == giga and count.macs == count.ideal_macs
  assert count.params - dense.params == len(fast) * 103_360 + 3 * 167_762
  assert count.attention_macs == dense.attention_macs
  if name == "pvt_small":
    model = model.clone(plan=vc.Plan(tokens=vc.FastPath(keep=(0.7, 0.497, 0.3), blocks=blocks)))
    assert round((vc.count(model).macs - 3 * scored) / 1e9, 4) == 3.4057


# Values.


def float64(tree):
  return jax.tree.map(lambda a: np.asarray(a, float), tree)


def by_loops(params, x_nw, kept, grid):
  """What the two paths add to the tokens of one image, token by token, in float64."""
  def norm(p, x):
    x = x - x.mean()
    return x / np.sqrt((x ** 2).mean() + 1e-6) * p["scale"] + p["bias"]

  def linear(p, x):
    return x @ p["kernel"] + p["bias"]

  p, out = float64(params), np.zeros_like(x_nw)
  hidden = {i: linear(p["mlp"]["fc1"], norm(p["norm2"], x_nw[i])) for i in kept}
  for i in range(len(x_nw)):
    if i not in kept:
      out[i] = linear(p["fast_path"]["linear"], norm(p["fast_path"]["norm"], x_nw[i]))
      continue
    h = hidden[i]
    if "mixer" in p["mlp"]:
      taps = p["mlp"]["mixer"]["conv"]
      (row, column), h = divmod(i, grid[1]), taps["bias"]
      for a in range(3):
        for b in range(3):
          at = (row + a - 1, column + b - 1)
          inside = 0 <= at[0] < grid[0] and 0 <= at[1] < grid[1]
          if inside and at[0] * grid[1] + at[1] in hidden:
            h = h + taps["kernel"][a, b, 0] * hidden[at[0] * grid[1] + at[1]]
    out[i] = linear(p["mlp"]["fc2"], h * (1 + np.vectorize(math.erf)(h / 2 ** 0.5)) / 2)
  return out


@pytest.mark.parametrize("name", ["pvt_small", "pvt_v2_b2", "deit"])
def test_kept_patches_take_the_ffn_and_the_others_the_fast_path(name):
  if name == "deit":
    model = tiny.deit(vc.Plan(tokens=vc.FastPath(keep=(0.5,), blocks=(1,))), drop_path_rate=0.0)
    block = "blocks_1"
  else:
    model, block = pvt(name, vc.Plan(tokens=TOKENS), **STAGES), "blocks_3"
  module = model.submodules()[block]
  site = module.site
  x = Tokens(tiny.normal(2, site.queries, site.width))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  variables = tiny.randomised(shapes, spread=0.5)
  got = jax.device_get(jax.jit(module.apply)(variables, x))
  dense = module.clone(methods=BlockMethods())
  stream = np.asarray(calibration.observe_jitted(dense, variables, x).before_ffn, float)
  count = predictor.budget(module.methods.tokens.shares()[-1], site.queries - site.prefix)
  assert 1 < count < site.queries - site.prefix
  for image in range(2):
    score = reference.predict(variables["params"]["predict_tokens"],
                              x.x[image, site.prefix:].astype(float),
                              np.ones(site.queries - site.prefix))[:, 0]
    kept = [*range(site.prefix), *(site.prefix + np.argsort(-score)[:count]).tolist()]
    expected = stream[image] + by_loops(variables["params"], stream[image], set(kept),
                                        site.query_grid)
    np.testing.assert_allclose(got.x[image], expected, atol=3e-5)
    assert sorted(got.paths.full[image]) == sorted(kept)
    both = np.concatenate([got.paths.full[image], got.paths.short[image]])
    np.testing.assert_array_equal(both[got.paths.place[image]], np.arange(site.queries))


class Scores(nn.Module):
  """Captures the predictor's probabilities, of which inference uses only the order."""
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bpw, keep_bp):
    return predictor.log_choices(self, x_bpw, keep_bp)


def test_probabilities_are_as_published_where_the_epsilon_of_the_norm_matters():
  x = np.float32(3e-3) * tiny.normal(2, 6, 8)
  keep = np.float32([[1, 0, 1, 1, 0, 1]] * 2)
  params = tiny.randomised(jax.eval_shape(lambda: Scores().init(jax.random.key(0), x, keep)),
                           spread=0.5)["params"]
  got = jax.jit(Scores().apply)({"params": params}, x, keep)
  expected = [reference.predict(params, image.astype(float), row)
              for image, row in zip(x, keep, strict=True)]
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name,fields", [
    ("pvt_small", STAGES), ("pvt_v2_b2", STAGES), ("nextvit_small", NEXTVIT), ("deit", {})])
def test_keeping_all_patches_is_the_dense_program(name, fields):
  """Bit for bit, because it is the same program."""
  blocks = (1, 2) if name == "nextvit_small" else (0, 1)
  programs = []
  for tokens in (None, vc.FastPath(keep=1, blocks=blocks), vc.FastPath((1, 1.0), blocks=blocks)):
    plan = vc.Plan(tokens=tokens)
    model = tiny.deit(plan) if name == "deit" else vc.create_model(name, plan=plan, **{
        **({} if name == "nextvit_small" else {"image_size": 64, "widths": (8, 16, 20, 16),
                                               "heads": (1, 2, 5, 4)}), **fields})
    x = tiny.images(model)
    programs.append(str(jax.make_jaxpr(model.apply)(
        jax.eval_shape(model.init, jax.random.key(0), x), x)))
  assert programs[0] == programs[1] == programs[2]


def test_with_all_patches_kept_masking_and_gathering_equal_the_dense_block():
  model = pvt("pvt_v2_b2", vc.Plan(tokens=TOKENS), **STAGES)
  module = model.submodules()["blocks_4"]     # makes no decision itself
  x, ones = Tokens(tiny.normal(2, 16, 20)), np.ones((2, 16), np.float32)
  variables = tiny.randomised(jax.eval_shape(
      module.init, jax.random.key(0), x.replace(paths=Paths(mask=ones))))
  expected = jax.jit(module.clone(methods=BlockMethods()).apply)(variables, x)
  order = np.stack([np.random.default_rng(i).permutation(16) for i in range(2)]).astype(np.int32)
  run = jax.jit(module.apply)
  for paths in (Paths(mask=ones), Paths(order, order[:, :0], np.argsort(order, axis=1))):
    got = run(variables, x.replace(paths=paths))
    np.testing.assert_allclose(got.x, expected.x, atol=2e-6)


@pytest.mark.parametrize("name", ["pvt_small", "pvt_v2_b2"])
def test_decision_lasts_until_the_next_one_or_the_end_of_the_stage(name):
  model = pvt(name, vc.Plan(tokens=TOKENS), **STAGES)
  assert [site.block for site in model.sites() if model.plan.at(site).tokens] == [2, 3, 4]
  assert TOKENS.reduction(1, 6) == NOTHING and TOKENS.reduction(4, 6).predict is None
  variables, x = tiny.init(model), tiny.images(model, batch=2)
  params = variables["params"]
  assert {i for i in range(6) if "fast_path" in params[f"blocks_{i}"]} == {2, 3, 4}
  assert {i for i in range(6) if "predict_tokens" in params[f"blocks_{i}"]} == {2, 3}

  def is_captured(module, _):
    return module.path in (("blocks_2",), ("blocks_3",), ("blocks_4",))

  _, state = apply(model, variables, x, mutable=["tokens", "intermediates"],
                   capture_intermediates=is_captured)
  out = {i: state["intermediates"][f"blocks_{i}"]["__call__"][0].paths for i in (2, 3, 4)}
  assert out[2].full.shape == (2, 8) and out[3].full.shape == out[4].full.shape == (2, 12)
  np.testing.assert_array_equal(out[3].full, out[4].full)
  masks = [np.asarray(mask) for mask in predictor.stage_masks(state["tokens"])]
  assert [mask.sum(axis=1).tolist() for mask in masks] == [[8, 8], [12, 12]]
  assert (masks[0] > masks[1]).any()     # not nested: each decision is among all patches
  for mask, paths in zip(masks, (out[2], out[3]), strict=True):
    for image in range(2):
      assert np.flatnonzero(mask[image]).tolist() == sorted(paths.full[image].tolist())


@pytest.mark.parametrize("name", ["pvt_small", "pvt_v2_b2"])
def test_training_with_the_inference_masks_gives_the_inference_output(name, monkeypatch):
  def best_half(key, choice_bp2):
    del key
    order = jnp.argsort(jnp.argsort(-choice_bp2[..., 0], axis=1, stable=True), axis=1)
    return (order < 8).astype(jnp.float32)

  monkeypatch.setattr(predictor, "straight_through", best_half)
  model = pvt(name, vc.Plan(tokens=vc.FastPath(keep=(0.5, 0.5), blocks=(2, 3))), **STAGES)
  variables, x = tiny.init(model), tiny.images(model)
  trained = apply(model, variables, x, train=True, rngs={"dropout": jax.random.key(0)})
  np.testing.assert_allclose(trained, apply(model, variables, x), atol=1e-5)


def test_prefix_tokens_always_take_the_ffn():
  model = tiny.deit(vc.Plan(tokens=vc.FastPath(keep=(1e-3,), blocks=(0,))), depth=1)
  variables, x = tiny.init(model), tiny.images(model)
  _, state = apply(model, variables, x, mutable=["features"])
  dense = model.clone(plan=vc.Plan())
  _, dense_state = apply(dense, variables, x, mutable=["features"])
  got, expected = (np.asarray(s["features"]["block_0"][0]) for s in (state, dense_state))
  np.testing.assert_allclose(got[:, 0], expected[:, 0], atol=1e-5)
  unchanged = np.isclose(got, expected, atol=1e-4).all(axis=-1)
  assert unchanged.sum(axis=1).tolist() == [2, 2, 2]     # plus one patch


def test_one_stage_matches_the_authors_dynamic_swin(monkeypatch):
  """Outputs computed by PyTorch, see make_references.py."""
  monkeypatch.setattr(predictor, "straight_through", choose_most_likely)
  stored = json.loads((pathlib.Path(__file__).parent / "references.json").read_text())
  sizes, side = stored["sizes"], stored["sizes"]["side"]
  x = np.random.default_rng(1).standard_normal((3, side * side, sizes["dim"]), np.float32)
  site = Site(block=0, depth=sizes["depth"], width=sizes["dim"], ffn_width=sizes["dim"],
              hidden=4 * sizes["dim"], heads=sizes["num_heads"], tokens=side * side,
              query_grid=(side, side), key_grid=(side, side), provides=frozenset(CAPABILITIES))
  # Why 0.49: in the authors' arithmetic, 0.7 - 0.2 of 16 is 7.
  for run, shares in zip(stored["runs"], ((0.7, 0.49, 0.3), (0.55, 0.8, 0.3), (0.5,)), strict=True):
    weights = drawn.weights({name: tuple(shape) for name, shape in run["shapes"].items()})
    tokens, kept = vc.FastPath(keep=shares, blocks=tuple(run["blocks"])), []
    out = Tokens(jnp.asarray(x))
    for i in range(sizes["depth"]):
      acts = tokens.acts(site._replace(block=i))
      block = Block(site._replace(block=i), BlockMethods(tokens=tokens if acts else None),
                    epsilon=1e-5)
      shapes = jax.eval_shape(block.init, jax.random.key(0), out)["params"]
      shapes = {f"params/it/{name}": leaf.shape
                for name, leaf in trees.named_leaves(shapes).items()}
      entries = block_entries(block, f"blocks.{i}", "it")
      variables = trees.nested(torch_names.leaves_of(entries, weights, shapes))["params"]["it"]
      out = jax.jit(lambda v, t, block=block, train=run["train"]: block.apply(
          {"params": v}, t, train, rngs={"dropout": jax.random.key(0)}))(variables, out)
      if i in tokens.blocks:
        paths = out.paths
        kept.append((paths.mask if run["train"] else np.sort(paths.full, axis=1)).tolist())
    assert kept == run["kept"]
    np.testing.assert_allclose(out.x, run["wanted"], atol=2e-5)


# Training.


# Remat wraps the blocks of both networks in the same place, so one of them tests it.
@pytest.mark.parametrize("name,remat", [
    ("pvt_small", False), ("pvt_v2_b2", True),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("pvt_small", True), ("pvt_v2_b2", False)))])
def test_every_predictor_and_both_paths_get_gradients(name, remat):
  model = pvt(name, vc.Plan(tokens=SHORT_TOKENS, ffn=vc.CFFN()), **SHORT, remat=remat)
  variables, x = tiny.init(model), tiny.images(model)

  def losses_of(params):
    logits, new = model.apply(
        {**variables, "params": params}, x, train=True, rngs={"dropout": jax.random.key(1)},
        mutable=["tokens", "batch_stats"])
    ratio, = (fn(vc_pass(new, logits)).mean() for fn in SHORT_TOKENS.losses.values())
    return jnp.stack([jnp.sum(jnp.sin(logits)), ratio])

  jacobian = jax.jit(jax.jacrev(losses_of))(variables["params"])
  for leaf, grad in trees.named_leaves(jacobian).items():
    by_loss = np.abs(grad).reshape(2, -1).max(axis=1)
    assert np.isfinite(by_loss).all(), leaf
    if "predict_tokens" in leaf:
      assert by_loss.min() > 0, leaf
    # PVT v1 reads only the class token, so the last block's patches have no effect.
    read = name == "pvt_v2_b2" or not leaf.startswith("blocks_2")
    if ("fast_path" in leaf and read) or "mlp" in leaf:
      assert by_loss[0] > 0, leaf


def vc_pass(new, logits):
  from vitcompact.methods.protocol import Pass
  return Pass(new, logits, np.zeros(len(logits), np.int32))


def test_mask_gradient_is_that_of_choosing_between_the_paths():
  x = tiny.normal(1, 6, 4)
  module = fastpath.TwoPaths(None)
  variables = tiny.randomised(jax.eval_shape(lambda: module.init(
      jax.random.key(0), lambda x, *_: jnp.sin(x), x, Paths(mask=np.ones((1, 6), np.float32)))))
  mask = np.float32([[1, 0, 1, 0, 0, 1]])

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(mask):
    out = module.apply(variables, lambda x, *_: jnp.sin(x), x, Paths(mask=mask), True)
    return out.sum(), out

  got, out = run(mask)
  linear = jax.device_get(variables["params"]["linear"])
  short = x @ linear["kernel"] + linear["bias"]
  np.testing.assert_allclose(out, np.where(mask[..., None] > 0, np.sin(x), short), atol=1e-6)
  np.testing.assert_allclose(got, (np.sin(x) - short).sum(axis=-1), atol=1e-5)


def test_ratio_loss_covers_only_blocks_that_decide():
  tokens = vc.FastPath(keep=(1, 0.5, 0.25), blocks=(0, 1, 2))
  masks = np.float32([[1, 1, 0, 1]]), np.float32([[1, 0, 0, 0]])
  sown = {"tokens": {f"blocks_{i}": {"predict_tokens": {"keep_mask": (mask,)}}
                     for i, mask in zip((1, 2), masks, strict=True)}}
  got = jax.jit(lambda sown: tokens.losses["kept_ratio"](vc_pass(sown, np.zeros((1, 2)))))(sown)
  np.testing.assert_allclose(got, [(0.25 ** 2 + 0) / 2])


def test_config_weights_the_ratio_and_the_teachers_logits():
  model = pvt("pvt_small", vc.Plan(tokens=SHORT_TOKENS), **SHORT)
  config = complete({"model.name": "pvt_small", "model.image_size": 32, "batch_size": 2,
                     "plan": model.plan.to_json(), "loss.kept_ratio": 10.0, "loss.logits": 0.5})
  SHORT_TOKENS.check_training(config)
  with pytest.raises(ValueError, match="FastPath with keep < 1"):
    vc.FastPath(keep=1).check_training(config)
  variables, x = tiny.init(model), tiny.images(model, batch=2)
  teacher = model.clone(plan=vc.Plan())
  labels = np.array([0, 1])
  one_hot = np.eye(5, dtype=np.float32)[labels]
  total, (_, metrics) = jax.jit(make_objective(model, config.loss, teacher))(
      variables["params"], {}, variables, x, labels, one_hot, jax.random.key(0))
  logits, new = tiny.apply(model, variables, x, train=True, rngs={"dropout": jax.random.key(0)},
                           mutable=["tokens"])
  ratio = np.mean([(np.asarray(mask).mean(axis=1) - share) ** 2 for mask, share in zip(
      predictor.stage_masks(new["tokens"]), (0.5, 0.3), strict=True)])
  np.testing.assert_allclose(metrics["loss_kept_ratio"], ratio, rtol=1e-4)
  kl = np.mean(jax.jit(losses.divergence)(logits, tiny.apply(teacher, variables, x)))
  np.testing.assert_allclose(metrics["loss_logits"], kl, rtol=1e-3)
  np.testing.assert_allclose(total, float(metrics["loss_labels"]) + 10 * ratio + 0.5 * kl,
                             rtol=1e-4)


@pytest.mark.parametrize("name", ["pvt_v2_b2", "nextvit_small"])
def test_bfloat16_and_remat_keep_parameters_and_outputs_in_float32(name):
  fields = {"dtype": "bfloat16", "remat": True}
  model = nextvit().clone(**fields) if name == "nextvit_small" else pvt(
      name, vc.Plan(tokens=TOKENS), **{**STAGES, **fields})
  x = tiny.images(model)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  for train in (False, True):
    out, _ = jax.eval_shape(lambda v, train=train: model.apply(
        v, x, train=train, rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats", "tokens"]), variables)
    assert out.dtype == jnp.float32


# In Next-ViT; folded, converted, compacted.


@pytest.mark.parametrize("axes", [
    {}, {"heads": vc.HMHSA(), "ffn": vc.CFFN(), "attention": vc.Sparsifiner(keep=0.5, rank=2)}],
    ids=["alone", "all axes"])
def test_nextvit_folds_to_the_same_function(axes):
  model = nextvit(**axes)
  variables, x = tiny.init(model), tiny.images(model)
  assert variables["batch_stats"]["blocks_1"]["fast_path"]["norm"]["mean"].shape == (32,)
  deploy, folded = tiny.fold(model, variables)
  tree = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, tree) == [] and "batch_stats" not in folded
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 2e-5 and proof.first_difference is None


def test_nextvit_decides_before_attention_and_mixes_the_paths_over_all_channels():
  model = nextvit()
  variables, x = tiny.init(model), tiny.images(model)

  def is_captured(module, name):
    return name == "__call__" and module.path[-1:] in (("mlp",), ("fast_path",), ("norm2",))

  _, state = apply(model, variables, x, mutable=["tokens", "intermediates"],
                   capture_intermediates=is_captured)
  seen = state["intermediates"]["blocks_1"]
  assert seen["mlp"]["__call__"][0].shape == (3, 18, 32)
  got = np.asarray(seen["fast_path"]["__call__"][0])
  assert got.shape == (3, 36, 32)
  mask = np.asarray(state["tokens"]["blocks_1"]["predict_tokens"]["keep_mask"][0])
  assert mask.sum(axis=1).tolist() == [18] * 3
  kept = np.asarray(seen["mlp"]["__call__"][0])
  for image in range(3):
    rows = got[image][mask[image] > 0]
    for row in rows:
      assert np.abs(kept[image] - row).max(axis=1).min() == 0
    for row in got[image][mask[image] == 0]:
      assert np.abs(kept[image] - row).max(axis=1).min() > 0


# PVT v2 by default, whose FFN has a convolution. In v1 the class token takes the FFN as in DeiT,
# which is tested above.
@pytest.mark.parametrize("name", [pytest.param("pvt_small", marks=pytest.mark.slow), "pvt_v2_b2"])
def test_heads_attention_and_ffn_compose_and_fold(name):
  plan = vc.Plan(heads=vc.HMHSA(layout="grid"), attention=vc.Sparsifiner(keep=0.5, rank=2),
                 tokens=SHORT_TOKENS, ffn=vc.CFFN())
  model = pvt(name, plan, **SHORT)
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = tiny.fold(model, variables)
  assert trees.differences(folded, jax.eval_shape(deploy.init, jax.random.key(0), x)) == []
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 2e-5 and proof.first_difference is None
  assert vc.Plan.from_json(plan.to_json()) == plan
  rules = trees.first_match(model.parameter_rules(), variables["params"], may_be_idle=True)
  assert rules["blocks_2"]["fast_path"]["linear"]["kernel"].decay
  assert not rules["blocks_2"]["fast_path"]["norm"]["scale"].decay
  assert rules["blocks_1"]["predict_tokens"]["out3"]["kernel"].decay


def test_weights_are_exported_under_the_authors_names():
  for model in (pvt("pvt_small", vc.Plan(tokens=TOKENS), **STAGES), nextvit()):
    variables = jax.tree.map(np.asarray, tiny.init(model))
    state = vc.to_torch(model, variables)
    assert trees.digest(vc.from_torch(model, state)) == trees.digest(variables)
    assert "score_predictor.1.out_conv.4.weight" in state
  assert state["stages.1.blocks.0.fastmlp.fc1.0.running_var"].shape == (32,)
  assert state["stages.2.blocks.0.fastmlp.fc1.1.weight"].shape == (32, 32)


@pytest.mark.parametrize("name", ["pvt_small", "nextvit_small"])
def test_compact_initialises_the_fast_path_from_the_ffn(name):
  """With images: the FFN's best linear approximation, with less error than one without images."""
  if name == "pvt_small":
    dense = pvt(name, **SHORT)
    plan = vc.Plan(tokens=vc.FastPath((0.5, 0.25), blocks=(0, 1)))
  else:
    dense = nextvit(tokens=None)
    plan = vc.Plan(tokens=HYBRID)
  variables, x = tiny.init(dense, spread=0.2), tiny.images(dense, batch=16)
  expected, lost, notes = np.asarray(apply(dense, variables, x)), {}, {}
  for kind, images in (("fresh", None), ("fitted", x)):
    small, got = vc.compact(dense, variables, plan, images=images, progress=notes.__setitem__)
    tree = jax.eval_shape(small.init, jax.random.key(0), x)
    assert trees.differences(got, tree) == []
    lost[kind] = float(np.square(apply(small, got, x) - expected).mean())
    old = trees.named_leaves(variables["params"])
    new = trees.named_leaves(got["params"])
    assert all(new[leaf] is old[leaf] for leaf in old)
    block = got["params"]["blocks_2"]
    np.testing.assert_array_equal(block["fast_path"]["norm"]["scale"], block["norm2"]["scale"])
  assert lost["fitted"] < 0.7 * lost["fresh"]
  if name == "pvt_small":
    note = notes["blocks_2"]["tokens fast_path"]
    assert 0 < note["fitted"] < 1 and note["held_out"] > 0
  first, second = (np.asarray(got["params"][f"blocks_{i}"]["predict_tokens"]["out1"]["kernel"])
                   for i in plan.tokens.blocks)
  assert first.shape != second.shape or np.abs(first - second).max() > 0


def test_picture_shows_which_patches_take_the_ffn():
  model = pvt("pvt_small", vc.Plan(tokens=TOKENS), **STAGES)
  variables, image = tiny.init(model), tiny.images(model)[0]
  (first, before), (second, after) = drawing.stages(model, variables, image)
  assert (first, second) == ("block 2: FFN for 8 of 16", "block 3: FFN for 12 of 16")
  assert before.shape == (4, 4) and (before == drawing.DROPPED).sum() == 8
  assert (after >= 0).sum() == 12
  np.testing.assert_array_equal(after[after >= 0], np.flatnonzero(after.ravel() >= 0))


@pytest.mark.parametrize("make,words", [
    (lambda: vc.FastPath(keep=0), "(0, 1]"), (lambda: vc.FastPath(keep=(0.5, 1.2, 0.3)), "(0, 1]"),
    (lambda: vc.FastPath(keep=(0.5, 0.4)), "one share for each of the 3 blocks"),
    (lambda: vc.FastPath(keep=0.4), "to 0; give a larger share"),
    (lambda: vc.FastPath(blocks=(2, 2)), "different block numbers"),
    (lambda: pvt("pvt_small", vc.Plan(tokens=vc.FastPath())), "names block 8"),
    (lambda: vc.create_model("nextvit_small", plan=vc.Plan(tokens=vc.FastPath())),
     "block 8 needs an FFN that some tokens may bypass, which nextvit_small does not have"),
    (lambda: drawing.load("no file", '{"tokens": {"method": "fastpath"}}'), "no file"),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "fastpaths"}}'), "did you mean 'fastpath'")])
def test_invalid_settings_raise_one_line_errors(make, words):
  with pytest.raises((ValueError, OSError)) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_default_blocks_are_in_the_third_stage_of_six_block_stages():
  for name, blocks in (("pvt_small", (8, 9, 10)), ("pvt_v2_b2", (8, 9, 10)),
                       ("pvt_medium", (9, 11, 13)), ("pvt_v2_b3", (9, 11, 13)),
                       ("pvt_large", (14, 17, 20)), ("pvt_v2_b4", (14, 17, 20))):
    model = vc.create_model(name)
    third = model.stages()[2].blocks
    offsets = {6: (1, 2, 3), 18: (2, 4, 6), 27: (3, 6, 9)}[len(third)]
    assert tuple(third[i] for i in offsets) == blocks
  assert vc.FastPath().blocks == (8, 9, 10)
