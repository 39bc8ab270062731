"""Every family trains on several devices and lowers for each platform."""
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny, tiny_run
from vitcompact import trees
from vitcompact.run import loop
from vitcompact.train import sharding

FAMILIES = {   # a parameter specific to the family, and how it is split over a mesh
    "deit3_small_patch16_224": ("blocks_0/ls1/gamma", P(None)),
    "vit_small_patch16_224": ("pos_embed", P(None, None, "fsdp")),              # AugReg, DINO
    "vit_base_patch16_224": ("fc_norm/scale", P(None)),                         # MAE
    "vit_small_patch14_dinov2": ("cls_token", P(None, None, "fsdp")),
    "vit_small_patch14_reg4_dinov2": ("reg_token", P(None, None, "fsdp")),
    "vit_giant_patch14_reg4_dinov2": ("blocks_0/mlp/fc1/kernel", P("fsdp", "tensor")),
    "vit_small_plus_patch16_dinov3": ("reg_token", P(None, None, "fsdp")),
    "vit_base_patch16_clip_quickgelu_224": ("norm_pre/scale", P(None)),
    "vit_base_patch16_siglip_224": ("attn_pool/query/kernel", P("fsdp", "tensor", None)),
    "vit_base_patch16_siglip_gap_224": ("norm/scale", P(None)),
    "eva02_base_patch14_448": ("blocks_0/mlp/norm/scale", P(None)),
    "davit_tiny": ("blocks_1/cpe1/kernel", P(None, None, None, "fsdp")),
    "shvit_s1": ("downsample_2/merge/conv2/conv/kernel", P(None, None, None, "tensor")),
    "biformer_tiny": ("blocks_0/lce/kernel", P(None, None, None, "fsdp")),
    "biformer_stl": ("downsample_1/conv/kernel", P(None, None, None, "fsdp")),
    "transnext_tiny": ("blocks_0/cosine/tokens", P("tensor", None, None))}


# Without blocks that repeat those of the previous stage.
SHORTER = {"davit_tiny": {"depths": (1, 0)}, "shvit_s1": {"depths": (1, 1, 0)}}


@functools.cache
def build_run(name: str, devices: int) -> loop.Run:
  """Builds a run of one block with a plan; 8 devices are 2 each for data, parameters and heads."""
  config = tiny_run.tiny_config()
  if name in tiny.NETWORKS:
    config.model = {"name": name, **tiny.NETWORKS[name], **SHORTER.get(name, {})}
    if name.startswith("biformer"):   # regions depend on the grid
      config.plan = config.plan.replace('"hmhsa"', '"hmhsa", "layout": "grid"')
    if name.startswith("transnext"):   # its heads have parameters of their own
      config.plan = ""
  else:
    config.model.update(name=name, depth=1)
  config.model.drop_path_rate = 0.0
  if name == "vit_base_patch16_224":
    config.model.global_pool = "avg"
  config.data.update(augment="none", erase=0.0, mixup=0.0, cutmix=0.0)
  config.ema_half_life, config.mesh.fsdp, config.mesh.tensor = 0.0, 1, 1
  if devices > 1:
    config.mesh.fsdp = config.mesh.tensor = 2
  with pytest.MonkeyPatch.context() as patch:
    visible = jax.devices()[:devices]
    patch.setattr(jax, "devices", lambda: visible)
    return loop.build(loop.resolve(config))


def take_step(run: loop.Run):
  """Returns (state, gradients, metrics) after a step from random variables, as NumPy arrays."""
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype),
                       run.shapes.replace(key=np.zeros(())))
  variables = jax.device_get(tiny.randomised(   # placing a JAX array would compile a program
      {"params": run.shapes.params, "batch_stats": run.shapes.batch_stats}))
  state = state.replace(**variables, key=jax.random.key(0))
  rng, size = np.random.default_rng(0), run.model.image_size
  batch = {"image": rng.integers(0, 256, (16, size, size, 3), np.uint8),
           "label": rng.integers(0, 10, 16, np.int32)}
  state, metrics = run.step_at(0)(jax.device_put(state, run.shardings),
                                  sharding.put_batch(batch, run.mesh))
  assert metrics.keys() >= {"loss"}
  gradients = optax.tree_utils.tree_get(state.opt_state, "mu")   # a tenth of them
  return state, jax.device_get((gradients, state.batch_stats, metrics))


# Their training step consists of parts that other families cover.
ALIKE = ("vit_small_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
         "vit_base_patch16_siglip_gap_224", "biformer_stl")


@pytest.mark.parametrize("name", FAMILIES)
def test_family_specific_parameters_are_split_over_a_mesh(name):
  run = build_run(name, 8)
  leaf, expected = FAMILIES[name]
  assert dict(run.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert trees.named_leaves(run.shardings.params)[leaf].spec == expected


# These run a step by default: LayerScale, registers and SwiGLU (the giant), attention pooling
# (SigLIP), rotary positions and a norm inside the FFN (EVA-02), a norm before the blocks (CLIP),
# and each hierarchical network. The others add only a mean over tokens, or one of these parts.
LIKE_OTHERS = ("deit3_small_patch16_224", "vit_base_patch16_224", "vit_small_plus_patch16_dinov3")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS))
    for name in FAMILIES if name not in ALIKE])
def test_eight_devices_take_the_same_step_as_one_and_the_folded_model_lowers(name):
  run = build_run(name, 8)
  state, eight = take_step(run)
  _, one = take_step(build_run(name, 1))
  scale = max(np.abs(value).max() for value in jax.tree.leaves(one[0]))
  for got, expected in zip(*map(jax.tree.leaves, (eight, one)), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale)
  assert np.any(trees.named_leaves(one[0])[FAMILIES[name][0]])
  deploy, folded = tiny.fold(run.model, jax.device_get(
      {"params": state.params, "batch_stats": state.batch_stats}))
  images = jax.ShapeDtypeStruct((2, *[run.model.image_size] * 2, 3), np.float32)
  lowered = jax.export.export(jax.jit(deploy.apply), platforms=["cpu", "cuda", "tpu"])(
      folded, images)
  assert lowered.platforms == ("cpu", "cuda", "tpu")
  assert lowered.out_avals[0].shape == (2, 10)
