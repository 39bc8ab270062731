"""DynamicViT: predictors, straight-through masks in training, gathers at inference."""
import jax
import jax.numpy as jnp
import numpy as np

import vitcompact as vc
from tests import tiny
from tests.methods.tokens import reference
from vitcompact import attention, trees
from vitcompact.attention import Core
from vitcompact.methods.tokens import dynamicvit
from vitcompact.methods.tokens import predictor as predictors
from vitcompact.token_state import Tokens

PREFIX, PATCHES, WIDTH = 2, 12, 8
TOKENS = vc.DynamicViT(keep=0.7, blocks=(0, 1))


def draw(seed, *shape):
  return tiny.normal(*shape, seed=seed)


def predictor():
  module = dynamicvit.PredictTokens(stage=0, share=0.5)
  tokens = Tokens(draw(0, 3, PREFIX + PATCHES, WIDTH))
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, PREFIX))
  return module, tiny.randomised(shapes, spread=0.5), tokens


def test_inference_keeps_the_best_by_the_published_score_in_their_order():
  module, variables, tokens = predictor()
  out = jax.device_get(jax.jit(lambda v, t: module.apply(v, t, PREFIX))(variables, tokens))
  assert out.x.shape == (3, PREFIX + 6, WIDTH)
  for image in range(3):
    x = np.asarray(tokens.x[image], float)
    score = reference.predict(variables["params"], x[PREFIX:], np.ones(PATCHES))[:, 0]
    kept = [0, 1, *sorted(PREFIX + np.argsort(-score)[:6])]
    np.testing.assert_array_equal(out.x[image], tokens.x[image, np.array(kept)])
    source = np.full(PREFIX + PATCHES, -1)
    source[kept] = range(len(kept))
    np.testing.assert_array_equal(out.source[image], source)


def test_training_samples_masks_among_kept_tokens_and_reports_them_to_the_loss():
  module, variables, tokens = predictor()
  before = np.ones((3, PREFIX + PATCHES), np.float32)
  before[:, -5:] = 0
  tokens = tokens.replace(keep_mask=before)

  @jax.jit
  @jax.vmap
  def run(key):
    out, sown = module.apply(variables, tokens, PREFIX, True, rngs={"dropout": key},
                             mutable=["tokens"])
    return out.keep_mask, out.x, sown["tokens"]["keep_mask"][0]

  keep_mask, x, sown = map(np.asarray, run(jax.random.split(jax.random.key(0), 800)))
  np.testing.assert_array_equal(x[0], tokens.x)
  np.testing.assert_array_equal(keep_mask[:, :, PREFIX:], sown)
  assert set(np.unique(keep_mask)) == {0, 1} and (keep_mask[:, :, :PREFIX] == 1).all()
  assert not keep_mask[:, :, -5:].any()
  for image in range(3):
    log_pi = reference.predict(variables["params"],
                               np.asarray(tokens.x[image, PREFIX:], float),
                               before[image, PREFIX:])
    np.testing.assert_allclose(keep_mask[:, image, PREFIX:-5].mean(axis=0), np.exp(log_pi[:-5, 0]),
                               atol=0.07)


def test_global_half_is_the_mean_over_kept_tokens():
  x, keep_mask = draw(0, 2, 5, 6), np.float32([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
  out = np.asarray(jax.jit(predictors.with_mean)(x, keep_mask))
  np.testing.assert_array_equal(out[..., :3], x[..., :3])
  np.testing.assert_allclose(out[0, :, 3:], np.tile(x[0, np.array([0, 2, 3]), 3:].mean(0), (5, 1)),
                             rtol=1e-5)
  assert not out[1, :, 3:].any()      # having no kept token gives no NaN


def test_mask_gradient_is_that_of_a_gumbel_softmax():
  key, scores = jax.random.key(0), draw(1, 2, 5, 2)
  choice = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))

  def soft(choice):
    return jnp.sum(jnp.sin(jnp.arange(5.0))[None] * jax.nn.softmax(
        choice + jax.random.gumbel(key, choice.shape))[..., 0])

  def hard(choice):
    mask = predictors.straight_through(key, choice)
    return jnp.sum(jnp.sin(jnp.arange(5.0))[None] * mask)

  np.testing.assert_allclose(*jax.jit(lambda choice: [
      jax.grad(loss)(choice) for loss in (hard, soft)])(choice), atol=1e-6)


def test_hidden_tokens_act_as_if_removed():
  """With the others hidden, rows of the kept tokens equal attention among only the kept ones."""
  query, key, value = (draw(i, 2, 9, 3, 4) for i in range(3))
  survivors = np.array([0, 1, 4, 5, 8])
  keep_mask = np.tile(np.isin(np.arange(9), survivors).astype(np.float32), (2, 1))

  @jax.jit
  def run(query, key, value):
    core = Core(keep_mask=keep_mask)
    return (core(query, key, value), core.maps(query, key),
            attention.DENSE(*(x[:, survivors] for x in (query, key, value))))

  got, maps, expected = map(np.asarray, run(query, key, value))
  np.testing.assert_allclose(got[:, survivors], expected, atol=1e-4)
  np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)
  # A hidden token is seen only by itself, but sees the kept ones too.
  assert float(maps[..., 2][..., np.arange(9) != 2].max()) < 1e-5
  assert float(maps[..., 2, 2].min()) > 1e-3


def test_hidden_tokens_are_weighted_as_published():
  query, key = draw(0, 1, 4, 1, 3), draw(1, 1, 4, 1, 3)
  keep_mask = np.float32([1, 0, 1, 0])
  maps, scores = jax.jit(lambda query, key: (
      Core(keep_mask=keep_mask[None]).maps(query, key), attention.scores(query, key)))(query, key)
  exp = np.exp(np.asarray(scores, float)[0, 0])
  exp = exp / exp.max(axis=-1, keepdims=True) * np.where(np.eye(4), 1, keep_mask)
  expected = (exp + 1e-6 / 4) / (exp.sum(axis=-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(np.asarray(maps)[0, 0], expected, rtol=1e-5)


def model():
  return tiny.deit(vc.Plan(tokens=TOKENS), drop_path_rate=0.0)


def test_every_predictor_gets_gradients_from_the_ratio_and_the_logits():
  net = model()
  variables, x = tiny.init(net), tiny.images(net)

  def losses_of(params, remat=False):
    run = net.clone(remat=remat)
    logits, sown = run.apply({"params": params}, x, train=True, mutable=["tokens"],
                             rngs={"dropout": jax.random.key(3)})
    masks = [sown["tokens"][f"blocks_{i}"]["predict_tokens"]["keep_mask"][0] for i in TOKENS.blocks]
    ratio = predictors.kept_ratio(masks, TOKENS.shares()).mean()
    return jnp.stack([ratio, jnp.mean(logits ** 2)]), (masks, sown["tokens"]["keep_mask"][0])

  jacobian, (masks, last) = jax.device_get(
      jax.jit(jax.jacrev(losses_of, has_aux=True))(variables["params"]))
  for name, leaf in trees.named_leaves(jacobian).items():
    assert np.isfinite(leaf).all(), name
    if "predict_tokens" in name:
      assert np.abs(leaf).reshape(2, -1).max(axis=1).min() > 0, name
  assert (masks[1] <= masks[0]).all() and 0 < masks[1].sum() < masks[0].sum() < masks[0].size
  np.testing.assert_array_equal(last, masks[1])
  _, again = jax.jit(lambda p: losses_of(p, remat=True))(variables["params"])
  assert jax.tree.all(jax.tree.map(np.array_equal, again, (masks, last)))


def test_compact_adds_new_predictors_with_distinct_values():
  dense = tiny.deit()
  variables = tiny.init(dense)
  small, got = vc.compact(dense, variables, vc.Plan(tokens=TOKENS))
  shapes = jax.eval_shape(small.init, jax.random.key(0), tiny.images(small))
  assert trees.differences(got, shapes) == []
  first, second = (np.asarray(got["params"][f"blocks_{i}"]["predict_tokens"]["out1"]["kernel"])
                   for i in (0, 1))
  assert got["params"]["blocks_0"]["attn"] is variables["params"]["blocks_0"]["attn"]
  assert 0.01 < first.std() < 0.03
  assert np.abs(first - second).max() > 0
  rules = trees.first_match(small.parameter_rules(), got["params"], may_be_idle=True)
  assert rules["blocks_1"]["predict_tokens"]["out3"]["kernel"].decay


def test_predictors_are_exported_under_the_authors_names():
  net = model()
  variables = jax.tree.map(np.asarray, tiny.init(net))
  state = vc.to_torch(net, variables)
  assert state["score_predictor.1.out_conv.4.weight"].shape == (2, 6)
  assert state["score_predictor.0.in_conv.0.bias"].shape == (24,)
  assert trees.digest(vc.from_torch(net, state)) == trees.digest(variables)


def test_at_least_one_patch_is_kept_whatever_the_share():
  module = dynamicvit.PredictTokens(stage=0, share=1e-3)
  _, variables, tokens = predictor()
  out = jax.eval_shape(lambda v, t: module.apply(v, t, PREFIX), variables, tokens)
  assert out.x.shape[1] == PREFIX + 1


def test_dropped_patches_are_excluded_from_the_pooled_features():
  net = tiny.deit(vc.Plan(tokens=vc.DynamicViT(keep=0.5, blocks=(0,))), depth=1, num_classes=0,
                  drop_path_rate=0.0, global_pool="avg")
  x = tiny.images(net)
  params = tiny.init(net)["params"]

  @jax.jit
  def run(params):
    out, sown = tiny.apply(net, {"params": params}, x, train=True, mutable=["tokens", "features"],
                          rngs={"dropout": jax.random.key(1)})
    keep_mask = sown["tokens"]["blocks_0"]["predict_tokens"]["keep_mask"][0]
    return out, keep_mask, sown["features"]["block_0"][0]

  out, keep_mask, features = map(np.asarray, run(params))
  patches = features[:, 1:]
  mean = (patches * keep_mask[..., None]).sum(1) / keep_mask.sum(1)[:, None]
  source, norm = mean, jax.device_get(params["fc_norm"])
  source = source - source.mean(-1, keepdims=True)
  expected = source / np.sqrt((source ** 2).mean(-1, keepdims=True) + 1e-6)
  expected = expected * norm["scale"][None] + norm["bias"][None]
  np.testing.assert_allclose(out, expected, atol=1e-4)
  assert 0 < keep_mask.sum() < keep_mask.size
