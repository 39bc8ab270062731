"""Any file a user may have: training and serving read it identically, or both name it."""
import io
import pathlib
import tempfile
import warnings

import ml_collections
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image

import vitcompact as vc
from tests import tiny
from vitcompact.data import pipeline

PRE = vc.preprocess(tiny.deit())
# The formats that each mode can be stored in, among those that Pillow writes.
FORMATS = {"1": ("PNG", "TIFF", "BMP", "GIF", "PPM"), "L": ("PNG", "JPEG", "TIFF", "GIF", "WEBP"),
           "LA": ("PNG", "TIFF"), "P": ("PNG", "GIF", "TIFF", "BMP"),
           "RGB": ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP", "GIF", "TGA", "JPEG2000"),
           "RGBA": ("PNG", "TIFF", "WEBP", "TGA"), "CMYK": ("JPEG", "TIFF"),
           "YCbCr": ("JPEG", "TIFF"), "LAB": ("TIFF",), "I;16": ("PNG", "TIFF"),
           "I;16B": ("TIFF",), "I": ("TIFF",), "F": ("TIFF",)}
REFUSED = {"I", "F"}
SEVERAL = {"GIF", "TIFF", "PNG", "WEBP"}


def random_image(mode, width, height, seed):
  """Returns an image of a mode with random pixels."""
  rng = np.random.default_rng(seed)
  if mode.startswith("I;16"):
    pixels = rng.integers(0, 2**16, (height, width), np.uint16)
    return Image.frombytes(mode, (width, height),
                           pixels.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
  if mode in ("I", "F"):
    dtype = np.int32 if mode == "I" else np.float32
    return Image.fromarray(rng.normal(0, 1e4, (height, width)).astype(dtype))
  image = Image.new(mode, (width, height))
  stride = (width + 7) // 8 if mode == "1" else width * len(image.getbands())
  image.frombytes(rng.bytes(stride * height))
  if mode == "P":
    image.putpalette(rng.bytes(768))
  return image


@st.composite
def encoded(draw):
  """Returns (bytes, the mode that was written, whether the file is complete)."""
  mode = draw(st.sampled_from(sorted(FORMATS)))
  kind = draw(st.sampled_from(FORMATS[mode]))
  side, other = draw(st.integers(1, 40)), draw(st.sampled_from((1, 2, 31, 32, 33, 700)))
  width, height = draw(st.permutations((side, other)))
  seed = draw(st.integers(0, 2**20))
  options = {}
  if mode == "P" and kind in ("PNG", "GIF"):
    options["transparency"] = draw(st.sampled_from((0, 7)))
  if mode == "P" and kind == "PNG" and draw(st.booleans()):
    options["transparency"] = bytes(range(256))
  if kind in ("JPEG", "PNG", "WEBP", "TIFF"):
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(1, 8))
    options["exif"] = exif
  if kind in SEVERAL and mode in ("L", "RGB", "P", "RGBA") and draw(st.booleans()):
    options.pop("transparency", None)
    options |= {"save_all": True, "append_images": [random_image(mode, width, height, seed + 1)]}
  file = io.BytesIO()
  random_image(mode, width, height, seed).save(file, kind, **options)
  data = file.getvalue()
  damage = draw(st.sampled_from(("no", "no", "no", "cut", "flipped", "empty", "text")))
  event(f"{kind} {mode}")
  if damage == "cut":
    data = data[:draw(st.integers(0, len(data) - 1))]
  elif damage == "flipped":
    at = draw(st.integers(0, len(data) - 1))
    data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1:]
  elif damage != "no":
    data = {"empty": b"", "text": b"<html>404</html>\n" * 9}[damage]
  return data, mode, damage == "no"


def config(root, augment="none"):
  return ml_collections.ConfigDict({
      "name": f"folder:{root}", "augment": augment, "workers": 0, "replicas": 1, "repeats": 1,
      "on_bad": "stop", "max_bad": 0})


def outcome(function):
  """Returns a function's result, or the text of its ValueError; other exceptions are failures."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      return function(), None
    except ValueError as error:
      return None, str(error)


@given(encoded(), st.sampled_from(("png", "JPG", "tif", "gif")))
def test_training_and_serving_read_any_file_identically_or_name_it(file, suffix):
  data, mode, is_complete = file
  with tempfile.TemporaryDirectory() as root:
    for split in ("train", "val"):
      path = pathlib.Path(root) / split / "cat" / f"0.{suffix}"
      path.parent.mkdir(parents=True)
      path.write_bytes(data)
    images = pipeline.source(f"folder:{root}", "val", image_size=32)
    seen, error = outcome(lambda: images[0]["image"])
    served, refused = outcome(lambda: PRE(path))
    if is_complete:
      assert (error is None) == (mode not in REFUSED), error
    if error:
      assert refused
      for text in (error, refused):
        assert text.startswith("cannot read ") and f"val/cat/0.{suffix}: " in text
        assert text.isprintable()
      return
    with Image.open(path) as image:
      image.load()   # applies the orientation of a TIFF
      assert seen.shape == (image.height, image.width, 3)
      if is_complete and not image.mode.startswith("I"):
        np.testing.assert_array_equal(seen, image.convert("RGB"))
    batch = next(pipeline.eval_batches(config(root), "val", PRE, batch_size=1))
    np.testing.assert_array_equal(served, PRE.normalise(batch["image"][0]))
    batch = next(pipeline.train_batches(config(root, "flip_crop"), image_size=32, batch_size=1,
                                        seed=0))
    assert batch["image"].shape == (1, 32, 32, 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_images_of_either_byte_order_keep_the_upper_8_bits(tmp_path, mode):
  image = random_image(mode, 9, 5, 0)
  image.save(tmp_path / "x.tif")
  expected = np.frombuffer(image.tobytes(), ">u2" if mode == "I;16B" else "<u2").reshape(5, 9) >> 8
  for split in ("train", "val"):
    (tmp_path / split / "a").mkdir(parents=True)
    image.save(tmp_path / split / "a" / "x.tif")
  got = pipeline.source(f"folder:{tmp_path}", "val", image_size=8)[0]["image"]
  np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, -1))


def test_16_bit_pgm_is_scaled_by_the_maximum_in_its_header(tmp_path):
  """A PGM header states the maximum value, and Pillow scales to 16 bits."""
  path = tmp_path / "x.pgm"
  path.write_bytes(b"P5 2 1 4095\n" + np.array([0, 4095], ">u2").tobytes())
  pre = vc.preprocess(tiny.deit(image_size=(32, 64)))
  pixels = (pre(path) * pre.std + pre.mean) * 255
  assert pixels.min() < 1 and pixels.max() > 254


def test_transparency_is_dropped_and_the_stored_colour_is_kept(tmp_path):
  for mode, colour in (("RGBA", (200, 10, 20, 0)), ("LA", (200, 0))):
    Image.new(mode, (8, 8), colour).save(tmp_path / "x.png")
    pixels = (PRE(tmp_path / "x.png") * PRE.std + PRE.mean) * 255
    assert round(float(pixels[0, 0, 0])) == 200
