"""preprocess: each model's published preprocessing for evaluation."""
import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import vitcompact as vc
from tests import tiny


@pytest.mark.parametrize("name,size,crop,mean", [
    ("deit_small_patch16_224", 224, 0.9, 0.485), ("deit_base_patch16_384", 384, 1.0, 0.485),
    ("vit_small_patch16_224", 224, 0.9, 0.5), ("nextvit_small", 224, 0.95, 0.485),
    ("nextvit_small", 384, 1.0, 0.485), ("pvt_small", 224, 0.875, 0.485),
    ("davit_base", 224, 0.95, 0.485), ("davit_tiny.msft_in1k", 224, 0.95, 0.485),
    ("pvt_v2_b2", 224, 0.9, 0.485), ("lvvit_s", 224, 0.9, 0.485), ("lvvit_m", 224, 1.0, 0.485),
    ("shvit_s1", 224, 0.875, 0.485), ("shvit_s4", 256, 0.875, 0.485)])
def test_each_model_has_its_own_preprocessing(name, size, crop, mean):
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


def test_the_centre_is_kept():
  pre = vc.preprocess(tiny.deit())
  pixels = np.zeros((100, 100, 3), np.uint8)
  pixels[:3] = pixels[-3:] = pixels[:, :3] = pixels[:, -3:] = 255   # outside the crop of 90%
  inside = pre(pixels)[2:-2, 2:-2]                # away from where the filter reaches the border
  assert np.ptp(inside[..., 0]) == 0 and inside[0, 0, 0] < 0
  assert np.ptp(pre(pixels[:, 20:])[..., 0]) > 1   # cropped on one side: another centre


def test_without_a_crop_the_full_image_is_warped():
  pre = dataclasses.replace(vc.preprocess(tiny.deit()), crop=None)
  image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))
  pixels = (pre(image) * pre.std + pre.mean) * 255
  np.testing.assert_allclose(pixels, image.resize((32, 32), Image.Resampling.BICUBIC), atol=1e-3)


def test_a_value_that_is_not_an_image_is_refused():
  pre = vc.preprocess(tiny.deit())
  with pytest.raises(ValueError, match=r"uint8 array \(H, W, 3\), got float32 \(8, 8, 3\)"):
    pre(np.zeros((8, 8, 3), np.float32))


def test_one_channel_models_get_grey_images_and_averaged_means():
  pre = vc.preprocess(tiny.deit(in_chans=1))
  assert pre.mean == pytest.approx((0.449,)) and pre.std == pytest.approx((0.226,))
  pixels = np.full((40, 40, 3), (10, 200, 90), np.uint8)
  grey = np.asarray(Image.fromarray(pixels).convert("L"))
  out = pre(pixels)
  assert out.shape == (32, 32, 1) and out.dtype == np.float32
  np.testing.assert_allclose(out, (grey[0, 0] / 255 - 0.449) / 0.226, rtol=1e-4)
  for same in (grey, grey[..., None], Image.fromarray(grey)):
    np.testing.assert_array_equal(pre(same), out)
  model = tiny.deit(in_chans=1)
  variables = jax.eval_shape(model.init, jax.random.key(0), out[None])
  assert jax.eval_shape(model.apply, variables, out[None]).shape[0] == 1


def test_other_numbers_of_channels_have_means_but_take_no_image_files():
  pre = vc.preprocess(tiny.deit(in_chans=5))
  assert len(pre.mean) == len(pre.std) == 5
  with pytest.raises(ValueError, match="a model with 5 channels cannot take image files"):
    pre(np.zeros((8, 8, 3), np.uint8))


def test_16_bit_grey_images_keep_their_brightness_as_in_training(tmp_path):
  """They used to become white: Pillow's own conversion clips at 255."""
  pixels = np.full((40, 40), 100 * 256 + 7, np.uint16)
  Image.fromarray(pixels).save(tmp_path / "grey.png")
  pre = vc.preprocess(tiny.deit())
  expected = pre(np.full((40, 40, 3), 100, np.uint8))
  with Image.open(tmp_path / "grey.png") as image:
    np.testing.assert_array_equal(pre(image), expected)
  np.testing.assert_array_equal(pre(tmp_path / "grey.png"), expected)
  np.testing.assert_array_equal(pre(str(tmp_path / "grey.png")), expected)


def test_an_orientation_in_the_exif_data_is_not_applied(tmp_path):
  """As in training, and in the loaders behind published accuracies."""
  exif = Image.Exif()
  exif[0x0112] = 6  # rotate by 90 degrees
  pixels = np.zeros((40, 40, 3), np.uint8)
  pixels[:20] = 255
  Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
  pre = vc.preprocess(tiny.deit())
  np.testing.assert_array_equal(pre(tmp_path / "x.png"), pre(pixels))


def test_small_images_at_the_models_size_are_not_cropped_as_in_evaluation():
  pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
  pre = vc.preprocess(tiny.deit())
  assert pre.image_size == (32, 32) and pre.crop == 0.9
  np.testing.assert_allclose((pre(pixels) * pre.std + pre.mean) * 255, pixels, atol=1e-3)


def test_a_crop_larger_than_the_image_is_refused_at_once():
  with pytest.raises(ValueError, match=r"crop=1\.14 must be above 0 and at most 1"):
    dataclasses.replace(vc.preprocess(tiny.deit()), crop=1.14)


@pytest.mark.parametrize(("image", "message"), [
    (np.zeros((8, 8), np.uint16), r"got uint16 \(8, 8\): scale its pixels to 0\.\.255"),
    (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\).* one image at a time"),
    (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\).* its channels to red, green and blue"),
    (np.zeros((0, 8, 3), np.uint8), r"got uint8 \(0, 8, 3\)"),
    (Image.new("F", (8, 8), 300), r"cannot read the image: its pixels are numbers of mode F"),
    (Image.new("I", (8, 8), 300), r"numbers of mode I, whose range is unknown: scale them"),
    ("nowhere.png", r"cannot read nowhere\.png: No such file or directory"),
    (None, r"must be a path, a PIL image")])
def test_images_of_unknown_range_or_shape_are_refused_in_one_line(image, message):
  with pytest.raises(ValueError, match=message) as error:
    vc.preprocess(tiny.deit())(image)
  assert "\n" not in str(error.value)
