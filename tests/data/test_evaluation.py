"""Images are preprocessed as in timm, and identically wherever a model sees them.

make_preprocessed.py wrote the files and timm's results for them.
"""
import dataclasses
import io
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image, ImageOps

import vitcompact as vc
from tests import tiny
from vitcompact.data import batch as device_batch
from vitcompact.data import pipeline
from vitcompact.data.evaluation import Preprocess
from vitcompact.train import config as configs
from vitcompact.train import start
from vitcompact.train.build import preprocess_of

with np.load(pathlib.Path(__file__).parent / "references" / "preprocessed.npz") as stored:
  STORED = dict(stored)
KEYS = [key for key in STORED if not key.startswith("file/")]
MEAN, STD = (0.485, 0.456, 0.406), (0.25, 0.5, 0.125)


def file(name) -> io.BytesIO:
  return io.BytesIO(STORED[f"file/{name}"].tobytes())


def evaluation(key) -> Preprocess:
  _, crop_mode, crop, interpolation, size = key.split("/")
  return Preprocess(MEAN, STD, float(crop), interpolation, tuple(map(int, size.split("x"))),
                    crop_mode)


def difference(got, expected) -> int:
  return np.abs(got.astype(int) - expected).max()


def test_every_crop_mode_matches_timm():
  modes = {tuple(key.split("/")[1:]) for key in KEYS}
  assert len(modes) == 48 and len(KEYS) > 120
  for key in KEYS:
    name = key.partition("/")[0]
    if not key.startswith(("grey16", "16x16")):
      with Image.open(file(name)) as image:
        assert difference(evaluation(key).resize(image), STORED[key]) <= 1, key


def test_images_are_normalised_by_mean_and_deviation():
  key = "61x47.png/squash/0.95/bilinear/12x20"
  with Image.open(file("61x47.png")) as image:
    got = evaluation(key)(image)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, (STORED[key] / 255 - np.array(MEAN)) / np.array(STD), atol=1e-5)


def test_documented_differences_from_timm():
  """16-bit grey, which Pillow's conversion turns white, and small images of the model's size."""
  key, = (key for key in KEYS if key.startswith("grey16"))
  with Image.open(file("grey16.png")) as image:
    upper = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    got = evaluation(key).resize(image)
  np.testing.assert_array_equal(got, evaluation(key).resize(upper))
  assert STORED[key].mean() > 250 > 150 > got.mean()
  key, = (key for key in KEYS if key.startswith("16x16"))
  with Image.open(file("16x16.png")) as image:
    np.testing.assert_array_equal(evaluation(key).resize(image), np.asarray(image))
    assert difference(np.asarray(image), STORED[key]) > 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photograph_is_rotated_by_its_orientation_tag_on_request(orientation, tmp_path):
  name = f"exif{orientation}.jpg"
  key, = (key for key in KEYS if key.startswith(name))
  (tmp_path / name).write_bytes(file(name).getvalue())
  turning = dataclasses.replace(evaluation(key), exif_transpose=True)
  with Image.open(tmp_path / name) as image:
    expected = evaluation(key).resize(np.asarray(ImageOps.exif_transpose(image)))
    np.testing.assert_array_equal(turning.resize(image), expected)
  np.testing.assert_array_equal(turning.resize(tmp_path / name), expected)
  assert (difference(expected, STORED[key]) > 1) == (orientation > 1)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_images_are_rotated_and_keep_their_upper_8_bits(tmp_path, mode):
  pixels = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
  exif = Image.Exif()
  exif[0x0112] = 3
  path = tmp_path / ("x.png" if mode == "I;16" else "x.tif")
  Image.frombytes(mode, (7, 5), pixels.astype("<u2" if mode == "I;16" else ">u2").tobytes()).save(
      path, **{"exif": exif} if mode == "I;16" else {})
  got = tiny.preprocess((5, 7), exif_transpose=True).resize(path)
  turned = pixels[::-1, ::-1] if mode == "I;16" else pixels
  np.testing.assert_array_equal(got[..., 0], turned >> 8)


def test_unknown_crop_mode_is_rejected():
  with pytest.raises(ValueError, match="crop_mode='pad' must be one of center, squash, border"):
    tiny.preprocess(16, crop_mode="pad")


@pytest.mark.parametrize("size", [(1, 90), (90, 1), (6000, 3)])
def test_extremely_narrow_images_are_padded_where_timm_fails(size):
  """A side that would round to zero keeps one pixel."""
  shown = tiny.preprocess(16, crop_mode="border").resize(Image.new("RGB", size, "white"))
  assert shown.shape == (16, 16, 3) and {*np.unique(shown)} == {128, 255}


# The same preprocessing everywhere.

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A data set made of the stored files."""
  root = tmp_path_factory.mktemp("images")
  for split in ("train", "val"):
    for number, key in enumerate(key for key in STORED if key.startswith("file/")):
      path = root / split / "ab"[number % 2] / key.partition("/")[2]
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(STORED[key].tobytes())
  return root


@pytest.mark.parametrize("fields", [
    {}, {"in_chans": 1}, {"image_size": (16, 40)}])
def test_evaluation_calibration_and_serving_see_the_same_arrays(folder, fields):
  model = tiny.deit(num_classes=2, **fields)
  config = configs.complete(ml_collections.ConfigDict({
      "model": {"name": "deit_tiny_patch16_224", "image_size": 32, **fields},
      "data": {"name": f"folder:{folder}", "eval_crop": 0.8}}))
  preprocess = preprocess_of(config, model)
  paths = [path for name in "ab" for path in sorted((folder / "val" / name).iterdir())]
  served = np.stack([preprocess(path) for path in paths])
  assert served.shape[1:] == (*preprocess.image_size, model.in_chans)
  batch, = pipeline.eval_batches(config.data, "val", preprocess, batch_size=len(paths))
  np.testing.assert_array_equal(batch["image"], [preprocess.resize(path) for path in paths])
  calibration = start.calibration_images(config, preprocess, "val", len(paths))
  np.testing.assert_array_equal(calibration, served)   # bit for bit
  normalised = jax.jit(device_batch.normalise)(batch["image"], preprocess.mean, preprocess.std)
  np.testing.assert_allclose(normalised, served, atol=1e-6)   # as the evaluation step does


def test_serving_prepares_digits_as_the_training_run_evaluated_them(tmp_path):
  """At any size: such a run does not crop, and its saved file records that."""
  model = tiny.deit(num_classes=10, image_size=48)
  config = configs.complete(ml_collections.ConfigDict({
      "model": {"name": "deit_tiny_patch16_224", "image_size": 48},
      "data": {"name": "digits"}}))
  vc.save(tmp_path / "m.safetensors", model, tiny.init(model),
          preprocess=preprocess_of(config, model))
  batch = next(pipeline.eval_batches(config.data, "val", preprocess_of(config, model),
                                     batch_size=4))
  for image in batch["image"]:
    np.testing.assert_array_equal(vc.preprocess(tmp_path / "m.safetensors").resize(image), image)
