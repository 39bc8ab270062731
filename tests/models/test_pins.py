"""Every named model has its parameters counted: a model without a pin fails."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from vitcompact import trees

PINS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_patch16_384": 86_859_496,
    "deit_base_distilled_patch16_384": 87_630_032,
    "lvvit_t": 8_534_720,
    "lvvit_s": 26_151_824,
    "lvvit_m": 55_830_544,
    "nextvit_small": 31_763_368,
    "nextvit_base": 44_818_856,
    "nextvit_large": 57_874_344,
    "pvt_tiny": 13_229_288,
    "pvt_small": 24_485_864,
    "pvt_medium": 44_208_104,
    "pvt_large": 61_369_320,
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "pvt_v2_b2_li": 22_553_512,
    "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072,
    "pvt_v2_b5": 81_956_008,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
}


def test_every_named_model_is_pinned():
  assert sorted(PINS) == vc.list_models()


@pytest.mark.parametrize("name", PINS)
def test_parameters(name):
  model = vc.create_model(name)
  size = np.broadcast_to(model.image_size, 2).tolist()
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
  assert trees.size(variables["params"]) == PINS[name]
  assert variables.keys() <= {"params", "batch_stats"}
