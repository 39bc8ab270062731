"""Bad input is named and stops the run, or is counted and skipped."""
import io

import ml_collections
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vitcompact.data import pipeline
from vitcompact.data.decode import BadRecord, check_label, rgb


def config(path, **changes):
  return ml_collections.ConfigDict({
      "name": f"folder:{path}", "augment": "none", "workers": 0, "replicas": 1, "repeats": 1,
      "on_bad": "stop", "max_bad": 0} | changes)


def batches(data, batch_size=2):
  return pipeline.train_batches(data, image_size=16, batch_size=batch_size, seed=0)


def encoded(image, kind="PNG", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
JPEG = encoded(NOISE, "JPEG")


@pytest.fixture
def folder(tmp_path):
  """Six valid images of one class, four of them for training."""
  for split, count in (("train", 4), ("val", 2)):
    (tmp_path / split / "cat").mkdir(parents=True)
    for i in range(count):
      (tmp_path / split / "cat" / f"{i}.jpg").write_bytes(JPEG)
  return tmp_path


@pytest.mark.parametrize("data", [JPEG[:len(JPEG) // 2], encoded(NOISE)[:2000], b"", b"no image",
                                  encoded(Image.new("I", (8, 8), 70_000), "TIFF")],
                         ids=["truncated", "truncated-png", "empty", "text", "unknown-range"])
def test_bad_image_stops_the_run_and_is_named(folder, data):
  (folder / "train" / "cat" / "1.jpg").write_bytes(data)
  with pytest.raises(ValueError, match=r"cannot read image 1, .*/train/cat/1\.jpg: .*'skip'"):
    next(batches(config(folder), batch_size=4))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
def test_truncated_file_is_rejected_unless_its_pixels_are_complete(kind):
  """A PNG without its last checksum still has all of its pixels."""
  image = NOISE.crop((0, 0, 12, 12))
  data = encoded(image, kind)
  full = np.asarray(rgb(io.BytesIO(data), "it"))
  accepted = 0
  for length in range(len(data)):
    try:
      got = np.asarray(rgb(io.BytesIO(data[:length]), "it"))
    except BadRecord as error:
      assert len(str(error).splitlines()) == 1
    else:
      np.testing.assert_array_equal(got, full)
      accepted += 1
  assert accepted <= 20


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_can_be_skipped_and_are_counted(folder, workers):
  """Each process counts a bad image once, however often it is drawn; batches stay full."""
  (folder / "train" / "cat" / "1.jpg").write_bytes(b"")
  data = batches(config(folder, on_bad="skip", max_bad=1, workers=workers))
  got = [next(data) for _ in range(4)]  # two epochs
  assert data.bad_records == {1}
  assert all(batch.keys() == {"image", "label"} and len(batch["image"]) == 2 for batch in got)
  data.close()


def test_more_bad_images_than_allowed_stop_the_run(folder):
  for name in ("1.jpg", "2.jpg"):
    (folder / "train" / "cat" / name).write_bytes(b"")
  data = batches(config(folder, on_bad="skip", max_bad=1), batch_size=4)
  with pytest.raises(ValueError, match=r"2 records .* images 1, 2, .*data\.max_bad=1"):
    next(data)
  for name in ("0.jpg", "3.jpg"):
    (folder / "train" / "cat" / name).write_bytes(b"")
  with pytest.raises(ValueError, match="4 records in a row cannot be used"):
    next(batches(config(folder, on_bad="skip", max_bad=9), batch_size=4))


def test_bad_evaluation_image_stops_the_run_or_is_masked_and_counted(folder):
  (folder / "val" / "cat" / "0.jpg").write_bytes(b"")
  def evaluation(**changes):
    return pipeline.eval_batches(config(folder, **changes), "val", tiny.preprocess(16),
                                 batch_size=2)
  with pytest.raises(ValueError, match=r"cannot read image 0, .*/val/cat/0"):
    next(evaluation())
  data = evaluation(on_bad="skip", max_bad=1)
  assert next(data)["mask"].tolist() == [0, 1] and data.bad_records == {0}
  shown = pipeline.sample(config(folder, on_bad="skip", max_bad=1), "val", 2,
                          tiny.preprocess(16))
  assert len(shown) == 1


def test_cmyk_palette_and_grey_images_become_rgb():
  colour = (250, 10, 20)
  red = Image.new("RGB", (8, 8), colour)
  for data in (encoded(red.convert("CMYK"), "JPEG", quality=95), encoded(red.quantize(4)),
               encoded(red.quantize(4), "GIF")):
    image = rgb(io.BytesIO(data), "it")
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((4, 4)), colour)).max() < 9
  grey = Image.new("LA", (8, 8), (90, 5))  # alpha is ignored, even near transparency
  assert rgb(io.BytesIO(encoded(grey)), "it").getpixel((0, 0)) == (90, 90, 90)


def test_16_bit_grey_keeps_its_brightness():
  """Pillow's own conversion clips at 255, which turns nearly everything white."""
  pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
  image = rgb(io.BytesIO(encoded(Image.fromarray(pixels))), "it")
  np.testing.assert_array_equal(np.asarray(image)[..., 1], pixels >> 8)


def test_animation_is_read_as_its_first_frame():
  frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
  for kind in ("GIF", "WEBP", "PNG"):
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
      assert image.n_frames == 2
    red, green, _ = rgb(io.BytesIO(data), "it").getpixel((4, 4))
    assert red > 180 and green < 20


def test_png_named_jpg_is_read_as_png(folder):
  (folder / "train" / "cat" / "0.jpg").write_bytes(encoded(NOISE))
  first = pipeline.source(f"folder:{folder}", "train", image_size=16)[0]
  np.testing.assert_array_equal(first["image"], np.asarray(NOISE))


def test_damaged_metadata_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encoded(NOISE, "JPEG", exif=exif.tobytes()[:-4])
  with pytest.warns(UserWarning, match="Corrupt EXIF"):
    assert rgb(io.BytesIO(data), "it").size == (64, 64)


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_label_out_of_range_is_rejected(label):
  with pytest.raises(BadRecord, match=rf"cannot use image 7: its label {label} is not in 0\.\.2"):
    check_label(label, 3, "image 7")
  assert check_label(np.int64(2), 3, "image 7") == 2
