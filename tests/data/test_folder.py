"""Each entry of a folder is used or named: nothing is skipped silently."""
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from vitcompact.data import pipeline, prepare
from vitcompact.data.decode import SUFFIXES

silent = {"say": lambda text: None}


def picture(path, colour=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 8), (colour, colour, colour)).save(path, "PNG")


@pytest.fixture
def folder(tmp_path):
  """Two classes with one image each, in train and val."""
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      picture(tmp_path / split / name / "0.png")
  return tmp_path


def count(folder, split="train"):
  return pipeline.num_examples(f"folder:{folder}", split)


@pytest.mark.parametrize("suffix", ["tif", "tiff", "jfif", "gif", "ppm", "TIFF", "PNG", "JPEG",
                                    "Jpg", "bmp", "webp", "pgm", "jp2", "tga", "avif"])
def test_files_that_pillow_reads_are_found_whatever_their_case(folder, suffix):
  Image.new("RGB", (8, 8), (200, 200, 200)).save(folder / "train" / "cat" / f"1.{suffix}")
  assert count(folder) == 3
  image = pipeline.source(f"folder:{folder}", "train", image_size=8)[1]["image"]
  assert image.shape == (8, 8, 3) and abs(int(image[4, 4, 0]) - 200) < 5


def test_extensions_are_pillows_except_programs_and_containers():
  Image.init()
  known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
  left = {".bufr", ".emf", ".eps", ".fit", ".fits", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg",
          ".ps", ".wmf"}
  assert known - SUFFIXES == left and SUFFIXES - known == {".mpo"}


def test_skipped_files_are_counted_and_named(folder, caplog):
  cat = folder / "train" / "cat"
  for name in ("a.txt", "b.TXT", "Thumbs.db", "nothing", ".hidden.png", "._0.png"):
    (cat / name).write_bytes(b"")
  picture(cat / "more" / "1.png")
  picture(cat / ".ipynb_checkpoints" / "0-checkpoint.png")
  picture(folder / "train" / "stray.png")
  assert count(folder) == 2
  assert ("train: 2 images; left out: 1 *.db (cat/Thumbs.db), 2 *.txt (cat/a.txt, ...), 1 folder "
          "inside a class (cat/more), 3 hidden (cat/._0.png, ...), 1 outside the class folders "
          "(stray.png), 1 without a suffix (cat/nothing)") in caplog.text
  caplog.clear()
  count(folder, "val")
  assert not caplog.text


def test_class_without_images_reports_what_is_there_instead(folder):
  picture(folder / "train" / "bird" / "robin" / "0.png")
  with pytest.raises(ValueError, match=r"bird holds no images .*, only 1 folder inside a class "
                                       r"\(bird/robin\): add some, or remove the folder"):
    count(folder)


def test_class_without_evaluation_images_is_named(folder, caplog):
  picture(folder / "train" / "bird" / "0.png")
  assert count(folder, "val") == 2
  assert "val has no images of 1 of the 3 classes: 'bird'" in caplog.text


@pytest.mark.parametrize("kind", ["flat", "empty", "hidden"])
def test_unlabelled_test_next_to_a_labelled_val_is_skipped_with_a_message(folder, tmp_path, caplog,
                                                                    kind):
  (folder / "test").mkdir()
  if kind == "flat":
    picture(folder / "test" / "0.png")
  elif kind == "hidden":
    picture(folder / "test" / ".ipynb_checkpoints" / "0.png")
  assert count(folder, "test") == count(folder, "val") == 2
  assert "has no test (test holds no class folders): val serves as both val and test" in caplog.text
  manifest = prepare.prepare_folder(folder, tmp_path / "out", **silent)
  assert set(manifest["splits"]) == {"train", "val"}


def test_unlabelled_test_in_a_subfolder_gets_an_error_with_a_way_out(folder):
  picture(folder / "test" / "unknown" / "0.png")
  with pytest.raises(ValueError, match=r"test/unknown is a class that .*/train does not have: .* "
                                       r"if the classes of its images are unknown, move .*/test"):
    count(folder, "test")


def test_no_labelled_split_reports_what_is_there(folder):
  (folder / "val").rename(folder / "valid")
  picture(folder / "test" / "0.png")
  with pytest.raises(ValueError, match=r"no folder .*/val, nor .*/test, with classes \(valid is "
                                       r"not read: rename it to val; test holds no class folders"):
    count(folder, "val")


def test_misnamed_split_is_pointed_out(folder, caplog):
  (folder / "val").rename(folder / "valid")
  picture(folder / "test" / "cat" / "0.png")
  count(folder, "val")
  assert "no val (valid is not read: rename it to val): test serves as both" in caplog.text


def test_misnamed_train_is_pointed_out(folder):
  (folder / "train").rename(folder / "Train")
  with pytest.raises(ValueError, match=r"no folder .*/train: .* \(PATH holds Train, val\)"):
    count(folder)


def test_val_in_capitals_is_pointed_out(folder):
  (folder / "val").rename(folder / "Val")
  with pytest.raises(ValueError, match=r"with classes \(Val is not read: rename it to val\)"):
    count(folder, "val")


def test_links_count_as_their_targets_and_broken_links_stop_the_run(folder):
  os.symlink(folder / "train" / "cat", folder / "train" / "also")
  os.symlink(folder / "train" / "cat" / "0.png", folder / "train" / "dog" / "1.png")
  assert pipeline.class_names(f"folder:{folder}") == ("also", "cat", "dog") and count(folder) == 4
  other = folder / "other"
  picture(other / "train" / "cat" / "0.png")
  os.symlink(folder / "gone", other / "train" / "bird")
  with pytest.raises(ValueError, match=r"train/bird is a link to nothing: repair or remove it"):
    pipeline.class_names(f"folder:{other}")


def test_link_to_itself_gives_no_traceback(folder):
  os.symlink(folder / "train" / "loop", folder / "train" / "loop")
  with pytest.raises(ValueError, match="train/loop is a link to nothing"):
    count(folder)


def test_link_loop_next_to_the_splits_gives_no_traceback(folder):
  os.symlink(folder / "loop", folder / "loop")
  assert count(folder, "test") == 2


def test_classes_that_differ_only_in_case_are_pointed_out(folder, caplog):
  picture(folder / "train" / "Cat" / "0.png")
  assert pipeline.class_names(f"folder:{folder}") == ("Cat", "cat", "dog")
  assert "names differ only in case" in caplog.text and "'Cat', 'cat'" in caplog.text
  picture(folder / "val" / "DOG" / "0.png")
  with pytest.raises(ValueError, match=r"val/DOG is a class that .*: rename it to 'dog', as in"):
    count(folder, "val")


def test_names_of_arbitrary_bytes_are_read_prepared_and_shown(folder, tmp_path):
  """Latin-1 names from an old archive cause no error, in messages or in records."""
  root = os.fsencode(folder)
  for split in (b"train", b"val"):
    os.mkdir(os.path.join(root, split, b"caf\xe9"))
    with open(os.path.join(root, split, b"caf\xe9", b"\xe9t\xe9\n.png"), "wb") as file:
      file.write((folder / "train" / "cat" / "0.png").read_bytes())
  names = ("caf\\xe9", "cat", "dog")
  prepare.prepare_folder(folder, tmp_path / "out", **silent)
  for name in (f"folder:{folder}", f"arrayrecord:{tmp_path}/out"):
    source = pipeline.source(name, "train", image_size=8)
    assert pipeline.class_names(name) == source.class_names == names
    assert source[0]["label"] == 0
  assert source.read(0)[2].endswith("train/caf\\xe9/\\xe9t\\xe9\\n.png")
  with open(os.path.join(root, b"train", b"caf\xe9", b"\xe9t\xe9\n.png"), "wb"):
    pass
  with pytest.raises(ValueError, match=r"image 0, .*/caf\\xe9/\\xe9t\\xe9\\n\.png: ") as e:
    pipeline.source(f"folder:{folder}", "train", image_size=8)[0]
  assert str(e.value).isprintable()
  with pytest.raises(ValueError, match=r"xe9t\\xe9\\n\.png \(0 bytes\) is not an image") as e:
    prepare.prepare_folder(folder, tmp_path / "again", **silent)
  assert str(e.value).isprintable()


def test_two_images_sharing_a_label_map_are_rejected(folder):
  maps = folder / "label_maps" / "train"
  for name in ("cat", "dog"):
    (maps / name).mkdir(parents=True)
    np.save(maps / name / "0.npy", np.zeros((2, 5, 18, 18), np.float16))
  pipeline.source(f"folder:{folder}", "train", image_size=8)
  Image.new("RGB", (8, 8)).save(folder / "train" / "dog" / "0.jpg")
  from vitcompact.data.folder import list_files
  list_files.cache_clear()
  with pytest.raises(ValueError, match=r"dog/0\.jpg and .*dog/0\.png would share the label map .*/"
                                       r"dog/0\.npy: rename one of them"):
    pipeline.source(f"folder:{folder}", "train", image_size=8)


def test_listing_order_is_unchanged(folder):
  """By class, then by name as text: the order that runs started earlier resume with."""
  for name in ("10.png", "9.png", "a.jpg", "B.png", "é.png"):
    picture(folder / "train" / "cat" / name)
  images = pipeline.source(f"folder:{folder}", "train", image_size=8)
  assert [pathlib.Path(images.path(i)).name for i in range(len(images))] == [
      "0.png", "10.png", "9.png", "B.png", "a.jpg", "é.png", "0.png"]
