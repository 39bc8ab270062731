"""Batches are reproducible, and an epoch contains every image once."""
import collections
import json

import ml_collections
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vitcompact.data import pipeline
from vitcompact.data.digits import split_indices
from vitcompact.data.folder import split_folder


def config(**changes):
  return ml_collections.ConfigDict({
      "name": "digits", "augment": "none", "workers": 0, "replicas": 1, "repeats": 1,
      "on_bad": "stop", "max_bad": 0} | changes)


def batches(data, batch_size=100, image_size=8, seed=0, **processes):
  return pipeline.train_batches(data, image_size=image_size, batch_size=batch_size, seed=seed,
                                **processes)


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def contents(batches):
  """Returns each image as (bytes, label), in order."""
  return [(image.tobytes(), int(label)) for batch in batches
          for image, label in zip(batch["image"], batch["label"], strict=True)]


def of_split(split):
  images = pipeline.source("digits", split, image_size=8)
  return [(images[i]["image"].tobytes(), images[i]["label"]) for i in range(len(images))]


def assert_same(got, expected):
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


def test_splits_are_disjoint_complete_and_stratified_by_class():
  sizes = {split: pipeline.num_examples("digits", split) for split in pipeline.SPLITS}
  assert sizes == {"train": 1257, "val": 180, "test": 360}
  joined = np.concatenate([split_indices(split) for split in pipeline.SPLITS])
  assert sorted(joined.tolist()) == list(range(1797))
  total = np.bincount([label for split in pipeline.SPLITS for _, label in of_split(split)])
  for split in pipeline.SPLITS:
    counts = np.bincount([label for _, label in of_split(split)], minlength=10)
    assert np.abs(counts - total * sizes[split] / 1797).max() < 1.5
  train = set(of_split("train"))
  assert not train & set(of_split("val")) and not train & set(of_split("test"))


def test_each_digit_is_in_the_test_split_of_exactly_one_fold():
  tests = np.concatenate([split_indices("test", fold) for fold in range(5)])
  np.testing.assert_array_equal(np.sort(tests), np.arange(1797))
  for fold in range(5):
    parts = [split_indices(split, fold) for split in pipeline.SPLITS]
    assert len(np.unique(np.concatenate(parts))) == 1797
    assert pipeline.num_examples(f"digits:{fold}", "test") == len(parts[2])


def test_each_epoch_has_every_training_image_once_in_a_new_order():
  stream = contents(take(batches(config()), 26))
  epochs = stream[:1257], stream[1257:2514]
  assert collections.Counter(epochs[0]) == collections.Counter(of_split("train"))
  assert collections.Counter(epochs[1]) == collections.Counter(of_split("train"))
  assert epochs[0] != epochs[1]
  assert contents(take(batches(config(), seed=1), 1)) != stream[:100]


def test_resuming_mid_epoch_equals_the_uninterrupted_run():
  """Through JSON, as a checkpoint stores it; across the end of an epoch; with worker processes."""
  data = config(augment="digits")
  uninterrupted = take(batches(data), 16)
  interrupted = batches(data)
  take(interrupted, 9)
  state = json.dumps(interrupted.get_state())
  for workers in (0, 2):
    resumed = batches(config(augment="digits", workers=workers))
    next(resumed)  # prefetched batches are dropped
    resumed.set_state(json.loads(state))
    assert_same(take(resumed, 7), uninterrupted[9:])
    resumed.close()
  take(interrupted, 1)  # and closing it did not disturb the iterator that continues
  assert_same(take(interrupted, 6), uninterrupted[10:])


@pytest.mark.parametrize("changes", [{}, {"replicas": 4, "repeats": 3}])
def test_processes_read_parts_of_one_global_batch_including_augmentation(changes):
  data = config(augment="digits", **changes)
  one = take(batches(data), 14)  # into the second epoch
  two = [take(batches(data, process_index=i, process_count=2), 14) for i in (0, 1)]
  assert two[0][0]["image"].shape == (50, 8, 8, 3)
  joined = [{name: np.concatenate([a[name], b[name]]) for name in a}
            for a, b in zip(*two, strict=True)]
  assert_same(joined, one)


def test_resuming_with_another_process_count_shows_each_image_of_the_epoch_once():
  """Two processes read six batches, five read the rest of the epoch."""
  stream = []
  for count, start, stop in ((2, 0, 6), (5, 6, 13)):
    parts = [batches(config(), process_index=i, process_count=count) for i in range(count)]
    for part in parts:
      part.set_state({"next_index": start})
    for _ in range(start, stop):
      stream += [image for part in parts for image in contents([next(part)])]
  assert collections.Counter(stream[:1257]) == collections.Counter(of_split("train"))


def test_repetitions_of_an_image_differ_and_go_to_different_replicas():
  data = config(augment="digits", replicas=4, repeats=3)
  batch = next(batches(data, batch_size=96))
  plain = next(batches(config(replicas=4, repeats=3), batch_size=96))
  shown = collections.defaultdict(set)
  for i, (image, _) in enumerate(contents([plain])):
    shown[image].add(i // 24)  # the replica
  assert len(shown) == 32 and {len(replicas) for replicas in shown.values()} == {3}
  assert len(set(contents([batch]))) == 96
  assert pipeline.steps_per_epoch(data, 96) == 1024 // 96


def test_augmentation_differs_between_epochs():
  plain, augmented = ([sorted(contents(take(batches(config(augment=a)), 26))[s])
                       for s in (slice(1257), slice(1257, 2514))] for a in ("none", "digits"))
  assert plain[0] == plain[1]
  assert len(set(augmented[0]) & set(augmented[1])) < 10


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_counts_each_image_once_and_masks_the_padding(process_count):
  streams = [list(pipeline.eval_batches(
      config(), "val", tiny.preprocess(8, 0.875), batch_size=100, process_index=i,
      process_count=process_count)) for i in range(process_count)]
  assert [len(s) for s in streams] == [2] * process_count
  b = 100 // process_count
  real = []
  for batch in (batch for stream in streams for batch in stream):
    assert batch["image"].shape == (b, 8, 8, 3) and batch["mask"].shape == (b,)
    assert (batch["image"].dtype, batch["label"].dtype, batch["mask"].dtype) == (
        np.uint8, np.int32, np.float32)
    valid = batch["mask"] == 1
    real += contents([{"image": batch["image"][valid], "label": batch["label"][valid]}])
    assert not batch["image"][~valid].any() and not batch["mask"][~valid].any()
  assert collections.Counter(real) == collections.Counter(of_split("val"))


def test_exhausted_evaluation_stays_exhausted_and_keeps_no_threads():
  batches = pipeline.eval_batches(config(), "val", tiny.preprocess(8), batch_size=100)
  assert len(list(batches)) == 2 and batches.ahead is None
  assert list(batches) == []


def test_rectangular_size_is_height_by_width():
  batch = next(batches(config(), batch_size=2, image_size=(12, 20)))
  assert batch["image"].shape == (2, 12, 20, 3)
  assert pipeline.source("digits", "val", image_size=(12, 20))[0]["image"].shape == (12, 20, 3)


# Folders.

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two classes distinguished by colour; 3 and 2 training images, 1 and 1 for val, of odd sizes."""
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split, counts in (("train", {"cat": 3, "dog": 2}), ("val", {"cat": 1, "dog": 1})):
    for name, count in counts.items():
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 60, (30 + i, 40, 3), dtype=np.uint8)
        pixels[..., {"cat": 0, "dog": 1}[name]] += 190
        Image.fromarray(pixels).save(root / split / name / f"{i}.{'jpg' if i else 'png'}")
  return root


def test_folder_is_read_with_its_labels(folder):
  name = f"folder:{folder}"
  assert pipeline.num_classes(name) == 2
  assert pipeline.num_examples(name, "train") == 5 and pipeline.num_examples(name, "val") == 2
  train = pipeline.source(name, "train", image_size=16)
  assert train.class_names == ("cat", "dog") and train[1]["image"].shape == (31, 40, 3)
  for augment in ("none", "flip_crop"):
    batch = next(batches(config(name=name, augment=augment), batch_size=5, image_size=16))
    assert batch["image"].shape == (5, 16, 16, 3)
    assert sorted(batch["label"]) == [0, 0, 0, 1, 1]
    strongest = batch["image"].mean((1, 2)).argmax(1)
    np.testing.assert_array_equal(strongest, batch["label"])
  drawn = take(batches(config(name=name, augment="randaugment"), batch_size=5, image_size=16), 4)
  assert len(set(contents(drawn))) > 15
  (batch,) = pipeline.eval_batches(config(name=name), "val", tiny.preprocess(16, 0.9), batch_size=4)
  assert batch["mask"].tolist() == [1, 1, 0, 0] and batch["label"].tolist() == [0, 1, 0, 0]


def test_evaluation_crop_applies_to_folders_but_not_to_generated_images(folder):
  def first(name, crop, size=16):
    return next(pipeline.eval_batches(config(name=name), "val", tiny.preprocess(size, crop),
                                      batch_size=1))["image"]
  assert not np.array_equal(first(f"folder:{folder}", 0.5), first(f"folder:{folder}", 1.0))
  for size in (16, 40):
    uncropped = first("digits", 1.0, size)
    for crop in (0.5, None):
      np.testing.assert_array_equal(first("digits", crop, size), uncropped)


def test_evaluation_can_warp_folder_images_instead(folder):
  batch = next(pipeline.eval_batches(config(name=f"folder:{folder}"), "val",
                                     tiny.preprocess((16, 24), None), batch_size=1))
  with Image.open(folder / "val" / "cat" / "0.png") as image:
    assert image.size == (40, 30)
    expected = image.convert("RGB").resize((24, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(batch["image"][0], expected)


def test_only_other_split_serves_as_test_with_a_message(folder, caplog):
  assert split_folder(str(folder), "test") == folder / "val"
  assert "serves as both val and test" in caplog.text
  assert pipeline.num_examples(f"folder:{folder}", "test") == 2


# Mistakes in a config.

@pytest.mark.parametrize(("changes", "message"), [
    ({"name": "digits:5"}, "needs a fold from 0 to 4"),
    ({"name": "digit"}, r"data\.name='digit' is not one of digits"),
    ({"name": "shapes:many"}, r"data\.name='shapes:many' needs a number of scenes"),
    ({"name": "shapes", "augment": "digits"}, r"would change the meaning of shapes; use.* none"),
    ({"name": "folder"}, r"data\.name='folder' needs a path"),
    ({"name": "arrayrecord:"}, r"data\.name='arrayrecord:' needs a path"),
    ({"name": "arrayrecord:/nowhere"}, r"no /nowhere/manifest\.json.*vitcompact prepare"),
    ({"name": "tfds"}, r"data\.name='tfds' needs a name"),
    ({"on_bad": "ignore"}, r"data\.on_bad='ignore' is not one of"),
    ({"max_bad": -1}, r"data\.max_bad=-1 must be 0 or more"),
    ({"replicas": 0}, r"data\.replicas=0 and data\.repeats=1 must be 1 or more"),
    ({"replicas": 3}, r"batch_size=100 must be divisible by data\.replicas=3"),
    ({"augment": "token_labels"}, r"'token_labels' would change the meaning of digits"),
    ({"name": "folder:/nowhere"}, r"no folder /nowhere/train"),
    ({"augment": "randaug"}, r"data\.augment='randaug' is not one of randaugment"),
    ({"augment": "flip_crop"}, r"'flip_crop' would change the meaning of digits; use one of none"),
])
def test_mistake_in_the_config_is_named_with_a_way_out(changes, message):
  with pytest.raises(ValueError, match=message):
    batches(config(**changes))


def test_impossible_sizes_are_rejected():
  with pytest.raises(ValueError, match="batch_size=2000 is more than the 1257 training images"):
    batches(config(), batch_size=2000)
  with pytest.raises(ValueError, match=r"1257 training images, of which data\.repeats=3 uses 1024"):
    batches(config(repeats=3), batch_size=1200)
  with pytest.raises(ValueError, match="batch_size=100 must be divisible by process_count=3"):
    batches(config(), process_count=3)
  with pytest.raises(ValueError, match="seed=-1 must be 0 or more"):
    batches(config(), seed=-1)
  with pytest.raises(ValueError, match="split='valid' is not one of val"):
    pipeline.source("digits", "valid", image_size=8)


def test_images_already_of_the_models_small_size_are_not_cropped(tmp_path):
  """As published for CIFAR at 32 pixels: no resize and no crop."""
  pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
  for split in ("train", "val"):
    (tmp_path / split / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
  def shown(size):
    return next(pipeline.eval_batches(config(name=f"folder:{tmp_path}"), "val",
                                      tiny.preprocess(size, 0.875), batch_size=1))["image"]
  np.testing.assert_array_equal(shown(32)[0], pixels)
  assert shown(24).shape == (1, 24, 24, 3)


def test_incomplete_folders_are_named(tmp_path):
  (tmp_path / "train").mkdir()
  name = f"folder:{tmp_path}"
  with pytest.raises(ValueError, match=r"train holds no class folders"):
    pipeline.num_classes(name)
  (tmp_path / "train" / "cat").mkdir()
  with pytest.raises(ValueError, match=r"train/cat holds no images"):
    pipeline.num_examples(name, "train")
  Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "0.png")
  with pytest.raises(ValueError, match=r"no folder .*/val, nor .*/test"):
    pipeline.num_examples(name, "val")
  (tmp_path / "val" / "fish").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"val/fish is a class that .*/train does not have"):
    pipeline.num_examples(name, "val")


def test_sample_has_images_of_every_class_preprocessed_as_in_evaluation():
  """The training images of digits are ordered by class: the first 100 are all zeros."""
  def sample(split, count):
    return pipeline.sample(config(), split, count, tiny.preprocess(8, 0.9))

  label_of = dict(of_split("train"))
  assert {label_of[image.tobytes()] for image in sample("train", 100)} == set(range(10))
  assert len(sample("train", 100)) == 100 and len(sample("val", 500)) == 180
