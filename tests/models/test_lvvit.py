"""LV-ViT: the published counts, the authors' logits, token logits and MixToken, folding."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity
from vitcompact import layers, trees
from vitcompact.models import lvvit

HEADS, FFN = {"heads": vc.HMHSA()}, {"ffn": vc.CFFN()}
BOTH = vc.Plan(**HEADS, **FFN)
STEM_NORMS = 3 * 64   # parameters that folding saves: three scales and biases become three biases
# (parameters before the stem is folded, MACs / 1e9) dense, heads, ffn, both.
ROWS = {
    "lvvit_t": [(8_534_720, 2.8680), (7_843_664, 2.6777), (7_843_520, 2.7319),
                (7_152_464, 2.5415)],
    "lvvit_s": [(26_151_824, 6.5515), (23_792_816, 5.9711), (23_792_528, 6.0867),
                (21_433_520, 5.5063)],
    "lvvit_m": [(55_830_544, 12.6780), (50_588_144, 11.4525), (50_587_664, 11.6452),
                (45_345_264, 10.4197)],
}
DEPLOYED = {"lvvit_t": (8_534_528, 7_152_272), "lvvit_s": (26_151_632, 21_433_328),
            "lvvit_m": (55_830_352, 45_345_072)}
AT_384 = {"lvvit_s": (26_297_744, 21.896), "lvvit_m": (56_025_104, 41.638)}


def small(plan=None, **fields):
  """One block is enough: what depends on depth is tested against the authors' logits."""
  return tiny.deit(plan, name="lvvit_s", **{"heads": 3, "depth": 1, "stem_width": 8, **fields})


@functools.cache
def runs():
  return parity.runs("lvvit")


@pytest.mark.parametrize("name", tiny.named(ROWS, "lvvit_s"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  params = []
  for (expected, gmacs), axes in zip(ROWS[name], ({}, HEADS, FFN, {**HEADS, **FFN}), strict=True):
    count = vc.count(vc.create_model(name, plan=vc.Plan(**axes), deploy=True))
    assert count.params == expected - STEM_NORMS
    assert abs(count.macs / 1e9 / gmacs - 1) < 1e-3
    params.append(count.params)
  assert (params[0], params[-1]) == DEPLOYED[name]


@pytest.mark.parametrize("name", AT_384)
def test_counts_at_384_pixels_match(name):
  count = vc.count(vc.create_model(name, image_size=384, deploy=True))
  assert count.params == AT_384[name][0] - STEM_NORMS
  assert abs(count.macs / 1e9 / AT_384[name][1] - 1) < 1e-3


@pytest.mark.parametrize("index", range(4))
def test_logits_match_the_authors_code(index):
  assert parity.difference(runs()[index]) < 1e-4


def test_probe_weights_reveal_a_wrong_epsilon(monkeypatch):
  probed = runs()[1]
  with monkeypatch.context() as patch:
    patch.setattr(lvvit, "EPSILON", 1e-6)
    assert parity.difference(probed, retrace=True) > 1e-2
  monkeypatch.setattr(layers, "BatchNorm", functools.partial(layers.BatchNorm, epsilon=1e-6))
  assert parity.difference(probed, retrace=True) > 1e-2


def test_weights_round_trip_through_pytorch_bit_for_bit():
  run = runs()[0]
  back = vc.to_torch(run.model, vc.from_torch(run.model, run.state))
  batches = {name for name in run.state if name.endswith("num_batches_tracked")}
  assert len(batches) == 3 and back.keys() == run.state.keys() - batches
  for name, tensor in back.items():
    np.testing.assert_array_equal(tensor, run.state[name])


def test_folding_keeps_the_function_and_gives_the_deployed_tree():
  model = small(BOTH)
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = tiny.fold(model, variables)
  assert trees.differences(folded, jax.eval_shape(deploy.init, jax.random.key(0), x)) == []
  assert "batch_stats" not in folded
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 1e-5 and proof.first_difference is None
  again, twice = vc.fold(deploy, folded)
  assert again == deploy and trees.digest(twice) == trees.digest(folded)


def test_compacting_with_all_heads_and_full_rank_is_the_dense_model():
  model = small()
  variables, x = tiny.init(model), tiny.images(model)
  plan = vc.Plan(heads=vc.HMHSA(real_heads=3), ffn=vc.CFFN(rank_ratio=1.0))
  with pytest.warns(UserWarning):     # full rank saves nothing
    compact, new = vc.compact(model, variables, plan, images=x)
    assert vc.verify(model, variables, compact, new, x).max_rel < 1e-4


@functools.partial(jax.jit, static_argnums=0)
def forward_mixed(model, variables, x, key):
  return tiny.apply(model, variables, x, train=True, mutable=["batch_stats"],
                    rngs={"dropout": jax.random.key(key)})[0]


def test_patch_logits_return_to_their_images():
  # Without blocks, a patch's logits depend only on the patch and its position.
  model = small(depth=0)
  variables, x = tiny.init(model), tiny.images(model, batch=4)
  plain = forward_mixed(small(depth=0, mix_token=False), variables, x, 0)
  assert plain.share == 1
  shares = []
  for key in range(4):
    out = forward_mixed(model, variables, x, key)
    np.testing.assert_allclose(out.token_logits, plain.token_logits, atol=1e-5)
    shares.append(float(out.share))
  assert min(shares) < 1
  assert np.abs(plain.token_logits - plain.token_logits[::-1]).max() > 0.1


def test_blocks_see_the_mixed_patches():
  model = small(drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model, batch=4)
  plain = forward_mixed(small(drop_path_rate=0.0, mix_token=False), variables, x, 0)
  out = forward_mixed(model, variables, x, 1)
  assert out.share < 1 and np.abs(out.logits - plain.logits).max() > 1e-3


def test_mixing_share_is_the_area_outside_the_box():
  grid = (6, 9)
  boxes = jax.jit(jax.vmap(lambda key: lvvit.draw_box(key, grid)))(
      jax.random.split(jax.random.key(0), 500))
  x = jnp.broadcast_to(jnp.arange(2.0)[:, None, None, None], (2, *grid, 1))
  for box in np.asarray(boxes[:20]):
    swapped = lvvit.swap(x, box)
    assert float((swapped[0] == 0).mean()) == pytest.approx(1 - box.sum() / 54)
    np.testing.assert_array_equal(lvvit.swap(swapped, box), x)
    rows, columns = box.any(axis=1), box.any(axis=0)
    np.testing.assert_array_equal(box, rows[:, None] & columns[None])
  # Boxes reach every cell and all sizes, and are clipped: more than the mean share of 1/2 remains.
  area = np.asarray(boxes).mean(axis=(1, 2))
  assert np.asarray(boxes).any(axis=0).all() and area.min() == 0 and area.max() > 0.5
  assert 0.6 < 1 - area.mean() < 0.9


def test_training_updates_statistics_and_gradients_are_finite():
  model = small(BOTH)
  variables, x = tiny.init(model), tiny.images(model, batch=4)

  @jax.jit
  def grad(params):
    def loss(params):
      out, new = tiny.apply(model, {**variables, "params": params}, x, train=True,
                            rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
      return jnp.mean(out.logits ** 2) + jnp.mean(out.token_logits ** 2), new["batch_stats"]
    return jax.grad(loss, has_aux=True)(params)

  grads, stats = grad(variables["params"])
  for name, leaf in trees.named_leaves(grads).items():
    assert np.isfinite(leaf).all(), name
    assert np.abs(leaf).max() > 0, name
  old = trees.named_leaves(variables["batch_stats"])
  assert all(np.abs(leaf - old[name]).max() > 0 for name, leaf in trees.named_leaves(stats).items())


def test_initialisation_matches_the_authors():
  model = vc.create_model("lvvit_t", depth=1, image_size=32)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
  assert variables.keys() == {"params", "batch_stats"}
  for name, leaf in trees.named_leaves(jax.device_get(variables["params"])).items():
    if "stem" in name and "/norm/" not in name:      # torch's default for convolutions
      fan_in = {"conv1": 7 * 7 * 3, "conv2": 3 * 3 * 64, "conv3": 3 * 3 * 64, "proj": 8 * 8 * 64}
      bound = fan_in[name.split("/")[1]] ** -0.5
      assert 0.9 * bound < np.abs(leaf).max() <= bound, name
    elif name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif name.endswith("bias"):
      assert (leaf == 0).all(), name
    else:
      assert 0.015 < leaf.std() < 0.025, name
  stats = trees.named_leaves(jax.device_get(variables["batch_stats"]))
  assert all((leaf == name.endswith("var")).all() for name, leaf in stats.items())


@pytest.mark.parametrize("name,rate,lam", [("lvvit_t", 0.1, 1), ("lvvit_s", 0.1, 2),
                                           ("lvvit_m", 0.2, 2)])
def test_stochastic_depth_and_residual_scale_match_the_authors(name, rate, lam):
  model = vc.create_model(name)
  blocks = [block for key, block in model.submodules().items() if key.startswith("blocks_")]
  np.testing.assert_allclose([b.drop_path for b in blocks], np.linspace(0, rate, model.depth))
  assert {b.skip_lam for b in blocks} == {lam}


def test_every_leaf_has_one_rule_and_only_matrices_decay():
  model = small(BOTH)
  params = tiny.init(model)["params"]
  leaves = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
  rules = jax.tree_util.tree_leaves_with_path(leaves, is_leaf=lambda x: isinstance(x, trees.Leaf))
  decayed = [trees.name_of(path) for path, leaf in rules if leaf.decay]
  assert decayed == [name for name in trees.named_leaves(params) if name.endswith("/kernel")]


@pytest.mark.parametrize("fields,shape", [
    ({"num_classes": 0}, (3, 24)), ({"image_size": (16, 40), "in_chans": 1}, (3, 5)),
    ({"dtype": "bfloat16", "remat": True}, (3, 5)), ({"patch_size": 16}, (3, 5))])
def test_input_and_output_options(fields, shape):
  model = small(**fields)
  out, variables = jax.eval_shape(
      lambda: model.init_with_output(jax.random.key(0), tiny.images(model)))
  assert out.shape == shape and out.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_features_are_returned_on_request():
  model = small(depth=2)
  variables, x = tiny.init(model), tiny.images(model)
  _, seen = jax.eval_shape(lambda: tiny.apply(model, variables, x, mutable=["features"]))
  shapes = {name: leaf[0].shape for name, leaf in seen["features"].items()}
  assert shapes == {"block_0": (3, 17, 24), "block_1": (3, 17, 24)}


@pytest.mark.parametrize("fields,words", [
    ({"image_size": 36}, "36 is not a multiple of patch_size=8; the nearest multiple: 32"),
    ({"patch_size": 7}, "patch_size=7: must be even"),
    ({"heads": 5}, "does not divide width=24")])
def test_incompatible_settings_raise_one_line_errors(fields, words):
  with pytest.raises(ValueError) as error:
    small(**fields)
  assert words in str(error.value) and "\n" not in str(error.value)
