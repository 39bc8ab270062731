"""The isotropic models besides DeiT: timm's logits, rotary positions, every axis on each part."""
import functools
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity
from vitcompact import rotary, trees
from vitcompact.draw.report import page
from vitcompact.measure import feature_error
from vitcompact.token_state import Tokens

SMALL = {"width": 24, "depth": 2, "heads": 3, "patch_size": 8, "image_size": 32, "num_classes": 5}
# Together these have every part that DeiT lacks.
PARTS = ["deit3_small_patch16_224", "vit_giant_patch14_reg4_dinov2",
         "vit_small_plus_patch16_dinov3", "vit_base_patch16_clip_quickgelu_224",
         "vit_base_patch16_siglip_224", "eva02_base_patch14_448"]


@functools.cache
def runs():
  return parity.runs("vit")


@pytest.mark.parametrize("index", range(60), ids=lambda i: str(i))
def test_logits_match_timm(index):
  assert parity.difference(runs()[index]) < 1e-4, runs()[index].name


@pytest.mark.parametrize("model", ["deit3_small_patch16_224", "vit_small_plus_patch16_dinov3",
                                   "vit_base_patch16_siglip_224", "eva02_base_patch14_448"])
def test_probe_weights_reveal_a_wrong_epsilon(model):
  run = next(run for run in runs() if run.name.startswith(model) and run.name.endswith("probed"))
  other = {1e-6: 1e-5, 1e-5: 1e-6}[run.model.epsilon]
  assert parity.difference(run._replace(model=run.model.clone(epsilon=other))) > 1e-3


def test_weights_round_trip_through_pytorch_bit_for_bit():
  for run in runs()[::4]:   # at the native size
    again = vc.to_torch(run.model, vc.from_torch(run.model, run.state))
    assert again.keys() == run.state.keys(), run.name
    assert all(np.array_equal(again[name], run.state[name]) for name in again), run.name


def test_angles_match_the_definition():
  """Patch by patch, from the formula: 2 pi x / period, with the centre's position x in -1 .. 1."""
  grid, width, temperature = (2, 3), 8, 100.0
  places = rotary.grid_positions(grid, prefix=2)
  got = rotary.angles(places, width, temperature)
  assert not got[:2].any()
  for row in range(2):
    for column in range(3):
      y, x = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1
      expected = [2 * math.pi * place / temperature ** (k / 2)
                  for place in (y, x) for k in range(2)]
      np.testing.assert_allclose(got[2 + row * 3 + column], expected, rtol=1e-5)


def test_angles_of_eva02_are_scaled_to_the_grid_of_its_pretraining():
  """Patch by patch: index / side * 16 over the period; neighbouring channels rotate as pairs."""
  grid, width, temperature = (2, 3), 8, 10000.0
  got = rotary.angles(rotary.grid_positions(grid, 1, 16), width, temperature, 16)
  assert not got[0].any()
  for row in range(2):
    for column in range(3):
      expected = [place / temperature ** (k / 2) for place in (row / 2 * 16, column / 3 * 16)
                  for k in range(2)]
      np.testing.assert_allclose(got[1 + row * 3 + column], expected, rtol=1e-5)
  x = np.arange(8, dtype=np.float32).reshape(1, 1, 1, 8)
  turned = np.asarray(rotary.rotate(x, np.float32([[np.pi / 2, 0, 0, np.pi]]), neighbours=True))
  np.testing.assert_allclose(turned[0, 0, 0], [-1, 0, 2, 3, 4, 5, -6, -7], atol=1e-5)


def test_partial_patches_at_the_image_edges_are_cropped():
  model = small("vit_so400m_patch14_siglip_384", image_size=37)
  variables, images = tiny.init(model), tiny.images(model)
  cropped = model.clone(image_size=32)
  np.testing.assert_array_equal(tiny.apply(model, variables, images),
                                tiny.apply(cropped, variables, images[:, :32, :32]))
  with pytest.raises(ValueError, match="37 is not a multiple of patch_size=8"):
    small("vit_so400m_patch14_siglip_378", image_size=37)


def test_scores_depend_on_the_distance_between_two_tokens():
  rng = np.random.default_rng(0)
  query, key = (rng.standard_normal((1, 1, 2, 8)).astype(np.float32) for _ in range(2))

  def score(place, other):
    turned = [rotary.rotate(x, rotary.angles(np.float32([at]), 8, 100.0))
              for x, at in ((query, place), (key, other))]
    return np.einsum("bnhd,bnhd->h", *turned)

  np.testing.assert_allclose(score([0.1, -0.4], [0.3, 0.5]), score([-0.5, -0.6], [-0.3, 0.3]),
                             rtol=1e-4)
  assert abs(score([0.1, -0.4], [0.3, 0.5]) - score([0.1, -0.4], [0.3, 0.1])).max() > 1e-2


def test_tokens_keep_their_positions_and_merged_ones_get_the_mean():
  places = rotary.grid_positions((2, 2), prefix=1)
  source = jnp.array([[0, 1, -1, 2, 2], [0, -1, 1, -1, 2]])   # dropped, kept, merged
  got = rotary.token_positions(Tokens(jnp.zeros((2, 3, 4)), source=source), places)
  expected = [[places[0], places[1], (places[3] + places[4]) / 2],
              [places[0], places[2], places[4]]]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_with_all_patches_kept_rotary_positions_equal_the_dense_ones():
  """Positions follow the source maps of tokens, not their index."""
  dense = small("vit_small_plus_patch16_dinov3")
  variables, images = tiny.init(dense), tiny.images(dense)
  tokens = Tokens(jnp.zeros((3, 21, 24)))
  kept = tokens.replace(source=jnp.broadcast_to(jnp.arange(21), (3, 21)))
  block = dense.submodules()["blocks_0"]
  np.testing.assert_allclose(block._positions(kept), np.tile(block._positions(tokens), (3, 1, 1)),
                             atol=1e-6)
  assert np.ptp(tiny.apply(dense, variables, images)) > 0.1


def small(name, **fields):
  return vc.create_model(name, **{**SMALL, **fields})


# No token masks here: with nine images for fitting, scores tie and rounding breaks the ties.
ALL = [vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(), tokens=vc.ToMe(r=3)),
       vc.Plan(heads=vc.HMHSA(layout="grid"), ffn=vc.CFFN(factor="both"),
               attention=vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0))]


# DeiT III adds only LayerScale, which DINOv2 also has; compacting it is compared below.
@pytest.mark.parametrize("name,plan", [
    pytest.param(name, plan, id=name, marks=[pytest.mark.slow] * name.startswith("deit3"))
    for name, plan in zip(PARTS, 3 * ALL, strict=True)])
def test_all_axes_compact_train_fold_and_are_counted(name, plan, tmp_path):
  """With one block; with two where a block after the merging one has rotary positions."""
  dense = small(name, depth=2 if name == "vit_small_plus_patch16_dinov3" else 1)
  variables, images = tiny.init(dense), tiny.images(dense, batch=9)
  model, compacted = vc.compact(dense, variables, plan, images=np.asarray(images))

  grads = tiny.gradients(model, compacted, images)
  assert all(np.all(np.isfinite(grad)) for grad in grads.values())
  for leaf in ("blocks_0/attn/value/kernel", "blocks_0/ls1/gamma", "reg_token", "norm_pre/scale",
               "attn_pool/latent"):
    assert leaf not in grads or np.any(grads[leaf]), leaf
  deploy, folded = tiny.fold(model, compacted)
  proof = vc.verify(model, compacted, deploy, folded, images)
  assert proof.max_rel < 1e-4
  assert vc.count(deploy).macs < vc.count(dense).macs
  vc.save(tmp_path / "a.safetensors", deploy, folded)
  again, loaded = vc.load(tmp_path / "a.safetensors")
  assert again == deploy
  assert trees.digest(loaded) == trees.digest(folded)


def test_registers_and_prefix_tokens_are_never_reduced():
  plan = vc.Plan(tokens=vc.EViT(keep=0.5, blocks=(0,)))
  model = small("vit_giant_patch14_reg4_dinov2", plan=plan)
  _, state = tiny.apply(model, tiny.init(model), tiny.images(model), mutable=["tokens"])
  source = state["tokens"]["source_1"][0]
  np.testing.assert_array_equal(source[:, :5], np.tile(np.arange(5), (3, 1)))
  assert np.any(source[:, 5:] < 0) or source.max() < 20


def test_compact_absorbs_layer_scale_and_computes_the_same():
  """With a plan that keeps full rank, only rounding may differ, whatever the factors are."""
  dense = small("deit3_small_patch16_224")
  variables, images = tiny.init(dense), tiny.images(dense, batch=16)
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=1.0, rep="none", branches=1, avg_skip=False))
  with pytest.warns(UserWarning):
    model, compacted = vc.compact(dense, variables, plan)
  np.testing.assert_allclose(tiny.apply(model, compacted, images),
                             tiny.apply(dense, variables, images),
                             atol=1e-4)
  assert np.all(compacted["params"]["blocks_0"]["ls2"]["gamma"] == 1)
  np.testing.assert_array_equal(compacted["params"]["blocks_0"]["ls1"]["gamma"],
                                variables["params"]["blocks_0"]["ls1"]["gamma"])


def test_fitting_to_images_takes_the_output_after_layer_scale():
  """At full rank, the fitted factors equal the layer and the residual gap stays 0."""
  dense = small("deit3_small_patch16_224")
  variables, images = tiny.init(dense), np.asarray(tiny.images(dense, batch=32))
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=1.0, rep="none", branches=1, avg_skip=False))
  model, compacted = vc.compact(dense, variables, plan, images=images)
  np.testing.assert_allclose(tiny.apply(model, compacted, images),
                             tiny.apply(dense, variables, images),
                             atol=2e-2)


def test_model_without_a_classifier_is_measured_by_its_features(monkeypatch):
  tiny.few_options(monkeypatch)
  model = small("vit_small_patch14_dinov2", patch_size=8, num_classes=0, depth=1)
  variables, images = tiny.init(model), np.asarray(tiny.images(model, batch=16))
  errors = []
  # Patched through the module, because vc.measure is the function.
  monkeypatch.setattr(sys.modules["vitcompact.measure"], "feature_error",
                      lambda *features: errors.append(feature_error(*features)) or errors[-1])
  report = vc.measure(model, variables, images)
  measured = [option.kl for row in report.blocks for option in row["options"] if option.measured]
  assert measured and set(measured) <= set(errors)
  assert report.unit == "error" and "error" in str(report.explain(report.plan(macs=0.9)))
  assert "nats" not in page(report)
  expected = np.asarray([[1.0, 2.0], [3.0, 6.0]])   # variances 1 and 4
  assert feature_error(expected, expected + 0.5) == pytest.approx(0.25 / 2.5)


@pytest.mark.parametrize("fields,message", [
    ({"class_token": False}, "global_pool='token' needs class_token=True"),
    ({"class_token": False, "distilled": True, "global_pool": "avg"}, "needs a class token"),
    ({"rotary": 100.0, "width": 18, "heads": 3}, "must be a multiple of 4"),
    ({"rotary": -1.0}, "rotary=-1.0: must be above 0"),
    ({"rotary_grid": 16}, "rotary=None has none; give rotary=10000.0"),
    ({"act": "relu"}, "act='relu': must be one of 'gelu'"),
    ({"pos_embed_of": "class"}, "must be one of 'all', 'patches', 'none'"),
    ({"reg_tokens": -1}, "reg_tokens=-1: must be a whole number of at least 0"),
    ({"qk_norm": "yes"}, "qk_norm='yes': must be True or False"),
    ({"layer_scale": "1"}, "layer_scale='1': must be a number"),
    ({"distilled": True, "global_pool": "map"}, "two classifiers")])
def test_incompatible_fields_are_rejected(fields, message):
  with pytest.raises(ValueError, match=message):
    small("vit_small_patch16_224", **fields)


def test_evit_without_a_class_token_suggests_another_method():
  with pytest.raises(ValueError, match="ToMe"):
    small("vit_base_patch16_siglip_224", plan=vc.Plan(tokens=vc.EViT(blocks=(0,))))


def test_files_record_every_field(tmp_path):
  model = small("vit_small_plus_patch16_dinov3", qk_norm=True, global_pool="map", reg_tokens=2)
  vc.save(tmp_path / "a.safetensors", model, tiny.init(model))
  again, _ = vc.load(tmp_path / "a.safetensors")
  assert again == model
