"""TensorFlow Datasets are read without TensorFlow, and held-out images stay held out."""
import json
import subprocess
import sys
import types

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets

from vitcompact.data import pipeline, tfds

# Writes data sets as TFDS does: {name: {split: number of images}}. Labels are i % 3, or hidden.
# Each also has a second label, as cifar100 does.
WRITE = '''
import io, json, sys
import tensorflow_datasets as tfds
from PIL import Image

def write(name, splits, root):
  def examples(self, split, count, hidden):
    for i in range(count):
      file = io.BytesIO()
      Image.new("RGB", (10, 8), (i, 5 * list(splits).index(split), 0)).save(file, "PNG")
      file.seek(0)
      yield i, {"image": file, "label": -1 if hidden else i % 3, "coarse_label": 0}

  builder = type(name, (tfds.core.GeneratorBasedBuilder,), {
      "VERSION": tfds.core.Version("1.0.0"),
      "_info": lambda self: tfds.core.DatasetInfo(
          builder=self, supervised_keys=("image", "label"), features=tfds.features.FeaturesDict({
              "image": tfds.features.Image(shape=(8, 10, 3), encoding_format="png"),
              "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
              "coarse_label": tfds.features.ClassLabel(names=["all"])})),
      "_split_generators": lambda self, _: {
          split: examples(self, split, abs(count), count < 0) for split, count in splits.items()},
      "_generate_examples": examples})
  builder(data_dir=root, file_format="array_record").download_and_prepare()

for name, splits in json.loads(sys.argv[1]).items():
  write(name.title().replace("_", ""), splits, sys.argv[2])
assert "tensorflow" not in sys.modules
'''
SETS = {"with_test": {"train": 40, "test": 6}, "hidden": {"train": 9, "validation": 5, "test": -4}}


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  subprocess.run([sys.executable, "-c", WRITE, json.dumps(SETS), str(root)], check=True)
  with pytest.MonkeyPatch.context() as patch:
    from tensorflow_datasets.core import constants
    patch.setattr(constants, "DATA_DIR", str(root))
    patch.setenv("TFDS_DATA_DIR", str(root))
    yield root


def numbers(name, split):
  """Returns which images a split has, identified by their colours."""
  source = pipeline.source(name, split, image_size=8)
  got = [source[i] for i in range(len(source))]
  assert all(e["label"] == e["image"][0, 0, 0] % 3 for e in got)
  return sorted(int(e["image"][0, 0, 0]) for e in got), {int(e["image"][0, 0, 1]) for e in got}


def test_data_set_provides_its_class_names():
  for name in ("tfds:with_test", "tfds:with_test@all"):
    assert pipeline.class_names(name) == ("a", "b", "c")
    assert pipeline.source(name, "test", image_size=8).class_names == ("a", "b", "c")


def test_without_a_validation_split_a_tenth_of_train_is_held_out():
  train, val, test = (numbers("tfds:with_test", split) for split in pipeline.SPLITS)
  assert [len(part[0]) for part in (train, val, test)] == [36, 4, 6]
  assert sorted(train[0] + val[0]) == list(range(40))
  assert train[1] == val[1] == {0} and test[1] == {5}
  assert [pipeline.num_examples("tfds:with_test", s) for s in pipeline.SPLITS] == [36, 4, 6]


def test_with_all_nothing_is_held_out_and_a_message_says_so(caplog):
  train, val, test = (numbers("tfds:with_test@all", split) for split in pipeline.SPLITS)
  assert len(train[0]) == 40 and val == test and test[1] == {5}
  assert "serves as both val and test" in caplog.text


def test_test_split_with_hidden_labels_is_replaced_by_validation():
  """imagenet2012 is of this kind."""
  train, val, test = (numbers("tfds:hidden", split) for split in pipeline.SPLITS)
  assert len(train[0]) == 9 and len(val[0]) == 5 and val == test and val[1] == {5}


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet2012", "oxford_iiit_pet"])
def test_image_and_label_are_found_in_sets_that_have_several(name, root):
  """Some also have coarse labels or masks. Checked with their own builders, without the data."""
  info = tensorflow_datasets.builder(name, data_dir=str(root)).info
  assert tfds.image_and_label(info) == ("image", "label")
  assert "tensorflow" not in sys.modules


def test_data_that_is_not_image_classification_is_rejected(root):
  info = tensorflow_datasets.builder("tiny_shakespeare", data_dir=str(root)).info
  with pytest.raises(ValueError, match=r"'tfds:tiny_shakespeare' is not image .* are text"):
    tfds.image_and_label(info)
  nested = types.SimpleNamespace(name="x", features={"a": 0, "b": 0},
                                 supervised_keys=({"a": "a"}, "b"))   # as TFDS allows
  with pytest.raises(ValueError, match=r"'tfds:x' is not image .* are a, b"):
    tfds.image_and_label(nested)


def test_batches_can_come_from_worker_processes():
  def first(workers):
    data = ml_collections.ConfigDict({
        "name": "tfds:with_test", "augment": "flip_crop", "workers": workers, "replicas": 2,
        "repeats": 1, "on_bad": "stop", "max_bad": 0})
    stream = pipeline.train_batches(data, image_size=8, batch_size=4, seed=0)
    batch = next(stream)
    stream.close()
    return batch
  np.testing.assert_array_equal(first(0)["image"], first(1)["image"])
  assert pipeline.num_classes("tfds:with_test") == 3


@pytest.mark.parametrize(("name", "message"), [
    ("tfds:no_such_set", r"data\.name='tfds:no_such_set'"),
    ("tfds:with_test@some", r"only '@all' may follow"),
    ("tfds:cifar10", r"'tfds:cifar10' is not in .*TFDS_DATA_DIR")])
def test_unreadable_data_set_is_named(name, message):
  with pytest.raises(ValueError, match=message) as error:
    pipeline.source(name, "train", image_size=8)
  assert len(str(error.value).splitlines()) == 1
