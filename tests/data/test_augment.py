"""Augmentation on the host matches the published one, operation by operation, byte for byte."""
import hashlib

import numpy as np
import pytest
from PIL import Image

from vitcompact.data import augment
from vitcompact.data.randaugment import FILL, NAMES, OPS, apply, draw, randaugment


def image_of(width, height, red, green, blue):
  y, x = np.mgrid[:height, :width]
  channels = [np.broadcast_to(f(x, y), x.shape) for f in (red, green, blue)]
  return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def sha(image):
  return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()[:10]


IMAGE_A = image_of(16, 12, lambda x, y: 16 * x, lambda x, y: 20 * y + 7,
                   lambda x, y: (3 * x * y + 40) % 256)
IMAGE_C = image_of(48, 32, lambda x, y: (3 * x + 2 * y) % 200,
                   lambda x, y: (x**2 + y) % 120 + 30, lambda x, y: x * y % 97)


def test_reference_images_have_the_recorded_digests():
  assert (sha(IMAGE_A), sha(IMAGE_C)) == ("3a96b17e34", "b72d3e54eb")


# Recorded from the published pipeline at magnitude 9 (posterize also at 10).
@pytest.mark.parametrize(("name", "argument", "mean", "digest"), [
    ("auto_contrast", None, 120.8733, "4d5da53fc9"),
    ("equalize", None, 114.4722, "3a96b17e34"),
    ("invert", None, 140.5278, "6be4cc157c"),
    ("rotate", 27, 115.3698, "8ad8f790f1"),
    ("rotate", -27, 114.7986, "c1edaa6dc1"),
    ("posterize", 1, 54.0, "807e925865"),
    ("posterize", 0, 0.0, "1a0295f4bf"),
    ("solarize", 26, 119.8924, "17522c1838"),
    ("solarize", 0, 140.5278, "6be4cc157c"),
    ("solarize_add", 99, 171.7066, "1b123ef4b9"),
    ("color", 1.81, 115.0122, "f78ebd5852"),
    ("color", 0.19, 115.7760, "409ab227df"),
    ("contrast", 1.81, 114.6181, "5120196d27"),
    ("contrast", 0.19, 116.0503, "ef61626afc"),
    ("brightness", 1.81, 172.8472, "6e494222f0"),
    ("brightness", 0.19, 21.3212, "e71631fee4"),
    ("sharpness", 1.81, 114.6562, "0d2d9e499e"),
    ("sharpness", 0.19, 114.2517, "12350a5a92"),
    ("shear_x", 0.27, 118.1788, "62afd35d6b"),
    ("shear_x", -0.27, 107.7552, "23e399227b"),
    ("shear_y", 0.27, 119.1215, "e1a2f0b27b"),
    ("shear_y", -0.27, 104.3264, "fbdf327a8a"),
    ("translate_x", 0.405, 128.8872, "b7bed9f8f1"),
    ("translate_x", -0.405, 100.3247, "52663675f7"),
    ("translate_y", 0.405, 126.2101, "0360ba645c"),
    ("translate_y", -0.405, 103.9913, "327714fdb1"),
])
def test_each_operation_gives_the_recorded_bytes(name, argument, mean, digest):
  image = apply(name, argument, IMAGE_A)
  assert (round(float(np.asarray(image).mean()), 4), sha(image)) == (mean, digest)
  # The recipe's magnitude gives the recorded argument.
  m = 10 if argument == 0 else 9
  reached = [OPS[name].argument(s * m) for s in ((1, -1) if OPS[name].signed else (1,))]
  assert argument in reached or any(np.isclose(argument, r, atol=1e-12) for r in reached)


@pytest.mark.parametrize("size", [(31, 33), (32, 33), (224, 223), (75, 75), (224, 224)])
def test_rotation_matches_pillow_at_odd_sizes(size):
  pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  image = Image.fromarray(pixels)
  for degrees in (27, -27, 30, 28.6, -24.123, 1.5):
    expected = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)
    assert sha(apply("rotate", degrees, image)) == sha(expected), degrees


def test_arguments_are_rounded_as_in_timm():
  """Bit for bit: a grey level may depend on it."""
  for m in (9.13, 8.7, 10.0, 9.77, 7.3):
    assert OPS["translate_x"].argument(m) == (m / 10) * 0.45
    assert OPS["rotate"].argument(-m) == -((m / 10) * 30)
    assert OPS["shear_y"].argument(m) == (m / 10) * 0.3


def test_equalize_and_autocontrast_work_per_channel():
  assert sha(apply("equalize", None, IMAGE_C)) == "e4a9faf28d"
  assert sha(apply("auto_contrast", None, IMAGE_C)) == "56e3e00525"


def test_magnitudes_map_to_the_published_levels():
  levels = (0, 5, 7.49, 7.5, 9, 10)
  assert [OPS["posterize"].argument(m) for m in levels] == [4, 2, 2, 1, 1, 0]
  assert [OPS["solarize"].argument(m) for m in levels] == [256, 128, 65, 64, 26, 0]
  assert [OPS["solarize_add"].argument(m) for m in levels] == [0, 55, 82, 82, 99, 110]
  assert len(OPS) == 15 and FILL == (124, 116, 104)


def test_zero_one_or_two_operations_have_probability_quarter_half_quarter():
  rng, n = np.random.default_rng(0), 20_000
  draws = [draw(rng) for _ in range(n)]
  counts = np.bincount([len(ops) for ops in draws], minlength=3)
  expected = n * np.array([0.25, 0.5, 0.25])
  assert np.all(np.abs(counts - expected) < 3 * np.sqrt(expected * (1 - expected / n)))
  ops = [op for image in draws for op in image]
  op_counts = np.array([sum(name == op for op, _ in ops) for name in NAMES])
  assert np.all(np.abs(op_counts - len(ops) / 15) < 4 * np.sqrt(len(ops) / 15))
  magnitudes = np.array([m for _, m in ops])
  assert abs(np.abs(magnitudes).mean() - 9) < 0.03 and np.abs(magnitudes).max() == 10
  signed = [m for op, m in ops if OPS[op].signed]
  assert abs(np.mean(np.array(signed) < 0) - 0.5) < 3 * 0.5 / np.sqrt(len(signed))
  assert all(m > 0 for op, m in ops if not OPS[op].signed)


def test_the_same_generator_gives_the_same_augmented_image():
  images = [randaugment(IMAGE_C, np.random.default_rng(s)) for s in (3, 3, 4)]
  assert sha(images[0]) == sha(images[1]) != sha(images[2])


def test_crop_and_evaluation_give_the_recorded_bytes():
  assert sha(augment.resized_crop(IMAGE_C, (5, 3, 40, 25), (16, 16))) == "b9551a8507"
  assert sha(augment.evaluation(IMAGE_C, (16, 16), 16 / 18, "bicubic")) == "aa5e86da3a"


@pytest.mark.parametrize(("size", "crop", "resized"), [
    (224, 0.875, 256), (224, 0.9, 248), (224, 0.95, 235), (384, 0.875, 438), (384, 1.0, 384)])
def test_evaluation_resizes_the_shorter_side_as_published(monkeypatch, size, crop, resized):
  sizes = []
  resize = Image.Image.resize
  monkeypatch.setattr(Image.Image, "resize",
                      lambda self, s, *a: sizes.append(s) or resize(self, s, *a))
  for image in (IMAGE_C, IMAGE_C.transpose(Image.Transpose.ROTATE_90)):
    assert augment.evaluation(image, (size, size), crop, "bicubic").size == (size, size)
  assert sizes == [(int(resized * 48 / 32), resized), (resized, int(resized * 48 / 32))]


def test_evaluation_at_a_rectangular_size_covers_it():
  image = augment.evaluation(IMAGE_C, (20, 60), 0.9, "bilinear")
  assert image.size == (60, 20)
  assert np.asarray(image).min(axis=(0, 1)).any()  # no black bars from outside the image


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_without_a_crop_warps_the_whole_image_as_pil_does(interpolation):
  expected = IMAGE_C.resize((20, 24), Image.Resampling[interpolation.upper()])
  assert sha(augment.evaluation(IMAGE_C, (24, 20), None, interpolation)) == sha(expected)
  assert sha(augment.evaluation(IMAGE_C, (24, 20), 1.0, interpolation)) != sha(expected)


def test_random_crops_stay_inside_with_the_given_areas_and_aspects():
  rng = np.random.default_rng(0)
  boxes = np.array([augment.crop_box(400, 300, rng) for _ in range(4000)])
  left, top, right, bottom = boxes.T
  w, h = right - left, bottom - top
  assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
  assert 0.078 < (w * h).min() / 120_000 < 0.1 and (w * h).max() / 120_000 > 0.9
  assert 0.73 < (w / h).min() < 0.76 and 1.32 < (w / h).max() < 1.36
  assert (left == 0).any() and (right == 400).any()  # both ends are included


def test_crop_that_never_fits_falls_back_to_the_centre():
  # A 1000 x 10 strip contains no box with an allowed aspect and 8 % of its area.
  assert augment.crop_box(1000, 10, np.random.default_rng(0)) == (493, 0, 506, 10)
  assert augment.crop_box(10, 1000, np.random.default_rng(0)) == (0, 493, 10, 506)


def test_half_of_the_images_are_mirrored():
  rng = np.random.default_rng(0)
  pixels, n = np.asarray(IMAGE_A), 1000
  flipped = 0
  for _ in range(n):
    out = np.asarray(augment.flip(IMAGE_A, rng))
    if not np.array_equal(out, pixels):
      np.testing.assert_array_equal(out, pixels[:, ::-1])
      flipped += 1
  assert abs(flipped - n / 2) < 3 * np.sqrt(n / 4)


def test_small_affine_moves_a_dot_by_the_documented_amount():
  class Fixed:
    """A generator with known draws: no rotation, no scaling, a shift of 1/8 right and 1/16 up."""
    def uniform(self, low, high, size=None):
      return np.array([0.125, -0.0625]) if size else (low + high) / 2

  dot = np.zeros((32, 32, 3), np.uint8)
  dot[16, 16] = 255
  moved = np.asarray(augment.small_affine(Image.fromarray(dot), Fixed()))
  assert np.argwhere(moved[..., 0] == 255).tolist() == [[14, 20]]
  # With real draws, the centre of mass moves at most by the shift stated in the docstring.
  blob = np.zeros((32, 32, 3), np.uint8)
  blob[12:20, 12:20] = 255
  for seed in range(50):
    out = np.asarray(augment.small_affine(Image.fromarray(blob), np.random.default_rng(seed)))
    centre = np.argwhere(out[..., 0] > 127).mean(axis=0)
    assert np.abs(centre - 15.5).max() < 0.08 * 32 + 1


def test_padded_crop_shifts_by_up_to_four_pixels_and_pads_with_black():
  rng, pixels, shifts = np.random.default_rng(0), np.asarray(IMAGE_C), set()
  padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
  for _ in range(900):
    out = np.asarray(augment.pad_crop(IMAGE_C, rng))
    shifts |= {(y, x) for y in range(9) for x in range(9)
               if np.array_equal(out, padded[y:y + 32, x:x + 48])}
  assert len(shifts) == 81  # all possible shifts, and nothing else
  out = augment.IMAGES["pad_crop"](IMAGE_C, rng, (32, 48))
  assert out.size == (48, 32)
  with pytest.raises(ValueError, match=r"\(48, 32\) came for a model of \(224, 224\)"):
    augment.IMAGES["pad_crop"](IMAGE_C, rng, (224, 224))


def test_jitter_scales_brightness_contrast_and_saturation_up_to_its_strength():
  grey = Image.new("RGB", (4, 4), (100, 100, 100))  # unchanged by contrast and saturation
  rng = np.random.default_rng(0)
  means = [np.asarray(augment.colour_jitter(grey, rng)).mean() for _ in range(300)]
  assert 69 <= min(means) < 75 and 125 < max(means) <= 131
  coloured = Image.new("RGB", (4, 4), (100, 100, 160))
  spans = [np.ptp(np.asarray(augment.colour_jitter(coloured, rng, 0.3))[0, 0].astype(int))
           for _ in range(300)]
  assert min(spans) < 42 and max(spans) > 78
  assert sha(augment.colour_jitter(IMAGE_C, rng, 0.0)) == sha(IMAGE_C)


def smooth_image(width, height, seed):
  """An image as smooth as a photograph, with a little noise."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
  pixels = np.asarray(coarse.resize((width, height), augment.BICUBIC), np.int16)
  return Image.fromarray(np.clip(pixels + rng.integers(-3, 4, pixels.shape), 0, 255).astype("u1"))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (60, 400), (640, 30),
                                               (9, 7)])
@pytest.mark.parametrize(("size", "crop"), [((224, 224), 0.9), ((64, 96), 0.875), ((96, 96), 1.0)])
def test_resizing_only_the_kept_region_differs_by_rounding(monkeypatch, width, height, size, crop):
  image = smooth_image(width, height, width)
  full = augment.evaluation(image, size, crop, "bicubic")
  monkeypatch.setattr(augment, "MUCH_LARGER", 0)
  part = augment.evaluation(image, size, crop, "bicubic")
  assert part.size == full.size
  assert np.abs(np.subtract(part, full, dtype=np.int16)).max() <= 1


@pytest.mark.parametrize(("size", "resized"), [((3, 3000), (24, 24000)), ((3000, 7), (10285, 24))])
# Not BOX: at its edges, rounding decides which whole pixel is taken.
@pytest.mark.parametrize("resample", [kind for kind in Image.Resampling if kind.name != "BOX"])
def test_resizing_only_the_kept_part_of_a_noise_strip_differs_by_rounding(size, resized, resample):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
  left, top = ((side - 24) // 2 for side in resized)
  part = left, top, left + 24, top + 24
  expected = image.resize(resized, resample).crop(part)
  got = augment._resized_part(image, resized, part, resample)
  assert np.abs(np.subtract(got, expected, dtype=np.int16)).max() <= 1


@pytest.mark.parametrize("shape", [(6000, 1), (1, 6000), (6000, 40), (1, 1), (1, 20000)])
def test_extreme_image_takes_at_most_64_times_the_pixels_that_are_kept(monkeypatch, shape):
  pixels = []
  resize = Image.Image.resize
  monkeypatch.setattr(Image.Image, "resize", lambda self, s, *a: pixels.append(s[0] * s[1]) or
                      resize(self, s, *a))
  image = smooth_image(*shape, 0)
  assert augment.evaluation(image, (224, 224), 0.9, "bicubic").size == (224, 224)
  rng = np.random.default_rng(0)
  assert augment.IMAGES["randaugment"](image, rng, (224, 224)).size == (224, 224)
  assert augment.IMAGES["none"](image, rng, (224, 224)).size == (224, 224)
  assert max(pixels) <= 64 * 248 ** 2


def test_extreme_image_shows_its_centre():
  """Columns 0 to 5999 go from black to white; the centre crop keeps the middle of the ramp."""
  ramp = Image.fromarray(np.linspace(0, 255, 6000).astype(np.uint8)[None]).convert("RGB")
  centre = np.asarray(augment.evaluation(ramp, (224, 224), 0.9, "bicubic"))
  assert np.ptp(centre) <= 1 and abs(int(centre[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("crop", [0, -0.5, 1.14, 256 / 224])
def test_crop_that_would_show_black_borders_is_rejected(crop):
  with pytest.raises(ValueError, match=r"crop=.* must be above 0 and at most 1: .*0\.875"):
    augment.evaluation(IMAGE_C, (16, 16), crop, "bicubic")
