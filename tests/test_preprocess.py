"""preprocess: the published evaluation of each model, as an array."""
import dataclasses

import numpy as np
import pytest
from PIL import Image

import vitcompact as vc
from tests import tiny


@pytest.mark.parametrize("name,size,crop,mean", [
    ("deit_small_patch16_224", 224, 0.9, 0.485), ("deit_base_patch16_384", 384, 1.0, 0.485),
    ("vit_small_patch16_224", 224, 0.9, 0.5), ("nextvit_small", 224, 0.95, 0.485),
    ("nextvit_small", 384, 1.0, 0.485), ("pvt_small", 224, 0.875, 0.485),
    ("pvt_v2_b2", 224, 0.9, 0.485), ("lvvit_s", 224, 0.9, 0.485), ("lvvit_m", 224, 1.0, 0.485)])
def test_each_model_has_its_own_evaluation(name, size, crop, mean):
  pre = vc.preprocess(vc.create_model(name, image_size=size))
  assert (pre.image_size, pre.crop, pre.mean[0]) == ((size, size), crop, mean)
  assert pre.interpolation == "bicubic"


def test_an_image_is_resized_cropped_and_normalised():
  pre = vc.preprocess(tiny.deit(image_size=(16, 32)))
  pixels = np.zeros((80, 100, 3), np.uint8)
  pixels[:, :, 1] = 255
  out = pre(pixels)
  assert out.shape == (16, 32, 3) and out.dtype == np.float32
  np.testing.assert_allclose(out[8, 16], [-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225],
                             rtol=1e-5)
  np.testing.assert_array_equal(pre(Image.fromarray(pixels)), out)


def test_the_centre_is_what_is_kept():
  pre = vc.preprocess(tiny.deit())
  pixels = np.zeros((100, 100, 3), np.uint8)
  pixels[:3] = pixels[-3:] = pixels[:, :3] = pixels[:, -3:] = 255   # outside the crop of 90%
  inside = pre(pixels)[2:-2, 2:-2]                # away from where the filter reaches the border
  assert np.ptp(inside[..., 0]) == 0 and inside[0, 0, 0] < 0
  assert np.ptp(pre(pixels[:, 20:])[..., 0]) > 1   # an image cut on one side has another centre


def test_without_a_crop_the_whole_image_is_warped():
  pre = dataclasses.replace(vc.preprocess(tiny.deit()), crop=None)
  image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))
  pixels = (pre(image) * pre.std + pre.mean) * 255
  np.testing.assert_allclose(pixels, image.resize((32, 32), Image.Resampling.BICUBIC), atol=1e-3)


def test_what_is_no_image_is_refused():
  pre = vc.preprocess(tiny.deit())
  with pytest.raises(ValueError, match=r"uint8 array \(H, W, 3\), got float32 \(8, 8, 3\)"):
    pre(np.zeros((8, 8, 3), np.float32))
