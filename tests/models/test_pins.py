"""Every named model has a pinned parameter count: a model without a pin fails."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from vitcompact import trees
from vitcompact.models.backbone import Isotropic
from vitcompact.models.nextvit import NextViT

PINS = {
    "biformer_base": 56_804_968,
    "biformer_small": 25_536_232,
    "biformer_stl": 28_372_552,
    "biformer_tiny": 13_142_760,
    "davit_base": 87_954_408,
    "davit_giant": 1_406_470_120,
    "davit_huge": 348_922_856,
    "davit_large": 196_811_752,
    "davit_small": 49_745_896,
    "davit_tiny": 28_360_168,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_huge_patch14_224": 632_126_440,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_large_patch16_384": 304_763_880,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_small_patch16_384": 22_205_416,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_distilled_patch16_384": 87_630_032,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_patch16_384": 86_859_496,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_small_patch16_224": 22_050_664,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_tiny_patch16_224": 5_717_416,
    "eva02_base_patch14_224": 85_758_720,
    "eva02_base_patch14_448": 87_117_544,
    "eva02_large_patch14_224": 303_268_800,
    "eva02_large_patch14_448": 305_080_232,
    "eva02_small_patch14_224": 21_621_120,
    "eva02_small_patch14_336": 22_129_000,
    "eva02_tiny_patch14_224": 5_502_144,
    "eva02_tiny_patch14_336": 5_756_584,
    "inline_deit_base": 23_797_096,
    "inline_deit_small": 16_734_760,
    "inline_deit_tiny": 6_477_736,
    "inline_pvt_large": 51_154_280,
    "inline_pvt_medium": 37_618_856,
    "inline_pvt_small": 21_556_136,
    "inline_pvt_tiny": 12_032_232,
    "lvvit_m": 55_830_544,
    "lvvit_s": 26_151_824,
    "lvvit_t": 8_534_720,
    "nextvit_base": 44_818_856,
    "nextvit_large": 57_874_344,
    "nextvit_small": 31_763_368,
    "pvt_large": 61_369_320,
    "pvt_medium": 44_208_104,
    "pvt_small": 24_485_864,
    "pvt_tiny": 13_229_288,
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "pvt_v2_b2_li": 22_553_512,
    "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072,
    "pvt_v2_b5": 81_956_008,
    "shvit_s1": 6_330_808,
    "shvit_s2": 11_483_072,
    "shvit_s3": 14_245_273,
    "shvit_s4": 16_588_484,
    "transnext_base": 89_721_496,
    "transnext_micro": 12_809_304,
    "transnext_small": 49_741_564,
    "transnext_tiny": 28_258_960,
    "vit_7b_patch16_dinov3": 6_716_030_976,
    "vit_base_patch14_dinov2": 86_579_712,
    "vit_base_patch14_reg4_dinov2": 86_582_016,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch16_clip_224": 86_568_424,
    "vit_base_patch16_clip_quickgelu_224": 86_193_152,
    "vit_base_patch16_dinov3": 85_641_216,
    "vit_base_patch16_siglip_224": 92_884_224,
    "vit_base_patch16_siglip_256": 92_930_304,
    "vit_base_patch16_siglip_384": 93_176_064,
    "vit_base_patch16_siglip_512": 93_520_128,
    "vit_base_patch16_siglip_gap_224": 85_797_120,
    "vit_base_patch16_siglip_gap_256": 85_843_200,
    "vit_base_patch16_siglip_gap_384": 86_088_960,
    "vit_base_patch16_siglip_gap_512": 86_433_024,
    "vit_base_patch32_224": 88_224_232,
    "vit_base_patch32_384": 88_297_192,
    "vit_base_patch32_clip_224": 88_225_000,
    "vit_base_patch32_clip_quickgelu_224": 87_849_728,
    "vit_base_patch32_siglip_256": 94_552_320,
    "vit_base_patch32_siglip_gap_256": 87_465_216,
    "vit_base_patch8_224": 86_576_872,
    "vit_giant_patch14_dinov2": 1_136_479_232,
    "vit_giant_patch14_reg4_dinov2": 1_136_483_840,
    "vit_huge_patch14_224": 630_764_800,
    "vit_huge_patch14_clip_224": 632_047_080,
    "vit_huge_patch14_clip_336": 632_456_680,
    "vit_huge_patch14_clip_quickgelu_224": 632_077_824,
    "vit_huge_plus_patch16_dinov3": 840_509_440,
    "vit_large_patch14_224": 304_203_752,
    "vit_large_patch14_clip_224": 304_204_776,
    "vit_large_patch14_clip_336": 304_532_456,
    "vit_large_patch14_clip_quickgelu_224": 303_966_976,
    "vit_large_patch14_clip_quickgelu_336": 304_294_656,
    "vit_large_patch14_dinov2": 304_367_616,
    "vit_large_patch14_reg4_dinov2": 304_370_688,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch16_384": 304_715_752,
    "vit_large_patch16_dinov3": 303_079_424,
    "vit_large_patch16_siglip_256": 315_956_224,
    "vit_large_patch16_siglip_384": 316_283_904,
    "vit_large_patch16_siglip_512": 316_742_656,
    "vit_large_patch16_siglip_gap_256": 303_361_024,
    "vit_large_patch16_siglip_gap_384": 303_688_704,
    "vit_large_patch16_siglip_gap_512": 304_147_456,
    "vit_large_patch32_224": 305_510_400,
    "vit_large_patch32_384": 306_632_680,
    "vit_small_patch14_dinov2": 22_056_192,
    "vit_small_patch14_reg4_dinov2": 22_057_344,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch16_384": 22_196_584,
    "vit_small_patch16_dinov3": 21_586_944,
    "vit_small_patch32_224": 22_878_952,
    "vit_small_patch32_384": 22_915_432,
    "vit_small_patch8_224": 21_670_272,
    "vit_small_plus_patch16_dinov3": 28_683_264,
    "vit_so400m_patch14_siglip_224": 427_680_704,
    "vit_so400m_patch14_siglip_378": 428_225_600,
    "vit_so400m_patch14_siglip_384": 428_225_600,
    "vit_so400m_patch14_siglip_gap_224": 412_442_352,
    "vit_so400m_patch14_siglip_gap_378": 412_987_248,
    "vit_so400m_patch14_siglip_gap_384": 412_987_248,
    "vit_so400m_patch16_siglip_256": 427_888_064,
    "vit_so400m_patch16_siglip_384": 428_256_704,
    "vit_so400m_patch16_siglip_512": 428_772_800,
    "vit_so400m_patch16_siglip_gap_256": 412_649_712,
    "vit_so400m_patch16_siglip_gap_384": 413_018_352,
    "vit_so400m_patch16_siglip_gap_512": 413_534_448,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_tiny_patch16_384": 5_790_376,
}


def test_every_named_model_is_pinned():
  assert sorted(PINS) == vc.list_models()


def sizes(name, **fields) -> dict[str, int]:
  """Returns the size of each top-level module, and of each top-level array."""
  model = vc.create_model(name, **fields)
  size = np.broadcast_to(model.image_size, 2).tolist()
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
  assert variables.keys() <= {"params", "batch_stats"}
  return {name: trees.size(tree) for name, tree in variables["params"].items()}


@pytest.mark.parametrize("name", PINS)
def test_parameter_counts_match_the_pins(name):
  """Except in Next-ViT, the blocks of a stage after the first are equal, so two determine all."""
  model = vc.create_model(name)
  if isinstance(model, NextViT):
    assert sum(sizes(name).values()) == PINS[name]
    return
  depths = (model.depth,) if isinstance(model, Isotropic) else model.depths
  short = tuple(min(depth, 2) for depth in depths)
  fields = {"depth": short[0]} if isinstance(model, Isotropic) else {"depths": short}
  counts = sizes(name, **fields)
  blocks = [name for name in counts if name.startswith("blocks_")]
  per_depth = len(blocks) // sum(short)   # DaViT's depths count pairs of blocks
  total = sum(counts.values())
  for stage, depth in enumerate(depths):
    end = per_depth * sum(short[:stage + 1])
    last = range(end - per_depth, end)
    total += (depth - short[stage]) * sum(counts[f"blocks_{i}"] for i in last)
  assert total == PINS[name]
