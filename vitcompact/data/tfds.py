"""Image classification data of TensorFlow Datasets, read without TensorFlow.

The data set must be in TFDS_DATA_DIR (or ~/tensorflow_datasets) as ArrayRecord. TFDS itself writes
it: `tfds build NAME --file_format=array_record`, for most data sets on a machine with TensorFlow.

val is the data set's "validation" split. If it has none, every tenth image of "train" is held out
as val, and train is the rest; with NAME@all nothing is held out: train is all of "train", and test
serves as val too. test is the "test" split if that has labels (imagenet2012's has none), else
"validation", which then serves as val and test.
"""
import functools
import io

import numpy as np

from vitcompact.data.decode import BadRecord, Example, as_arrays, check_label, rgb
from vitcompact.data.folder import other_split


@functools.cache
def _builder(name: str):
  try:
    import tensorflow_datasets
  except ImportError:
    raise ValueError(f"data.name='tfds:{name}' needs a package that is not installed: pip "
                     "install tensorflow-datasets importlib-resources") from None
  try:
    builder = tensorflow_datasets.builder(name)
  except Exception as error:  # TFDS has many kinds, some with long texts
    raise ValueError(f"data.name='tfds:{name}': {str(error).strip().splitlines()[0]}") from None
  if not builder.data_path.exists():
    raise ValueError(f"data.name='tfds:{name}' is not in {builder.data_path}: set TFDS_DATA_DIR, "
                     f"or write it with `tfds build {name} --file_format=array_record`")
  return builder


def image_and_label(info) -> tuple[str, str]:
  """The names of a data set's image and class label: its supervised keys if those are an image and
  a class label (cifar100 has a coarse label too), else its only image and only class label."""
  features = {key: type(feature).__name__ for key, feature in info.features.items()}
  supervised = tuple(key for key in info.supervised_keys or () if isinstance(key, str))  # or a dict
  if [features.get(key) for key in supervised] == ["Image", "ClassLabel"]:
    return supervised
  found = [[key for key in features if features[key] == kind] for kind in ("Image", "ClassLabel")]
  if any(len(names) != 1 for names in found):
    raise ValueError(f"data.name='tfds:{info.name}' is not image classification: its features are "
                     f"{', '.join(features)}")
  return found[0][0], found[1][0]


@functools.cache
def keys(name: str) -> tuple[str, str]:
  return image_and_label(_builder(name).info)


def open_split(name: str, split: str):
  """TFDS's data source of one of its own splits, with encoded images."""
  import tensorflow_datasets
  try:
    return _builder(name).as_data_source(
        split, decoders={keys(name)[0]: tensorflow_datasets.decode.SkipDecoding()})
  except Exception as error:
    raise ValueError(f"data.name='tfds:{name}' does not support random access: "
                     f"{str(error).strip().splitlines()[0]}; write it with "
                     f"`tfds build {name} --file_format=array_record`") from None


def class_names(name: str) -> tuple[str, ...]:
  """The names of a data set's classes. name: with or without @all."""
  name = name.partition("@")[0]
  return tuple(_builder(name).info.features[keys(name)[1]].names)


@functools.cache
def has_labels(name: str, split: str) -> bool:
  """Whether a split exists and has labels: hidden labels are -1."""
  if split not in _builder(name).info.splits:
    return False
  return int(open_split(name, split)[0][keys(name)[1]]) >= 0


@functools.cache
def choose(name: str, split: str) -> tuple[str, np.ndarray]:
  """(TFDS's own split, indices of its images) for train, val or test."""
  name, _, option = name.partition("@")
  if option not in ("", "all"):
    raise ValueError(f"data.name='tfds:{name}@{option}': only '@all' may follow the name")
  splits = _builder(name).info.splits
  own = {"train": "train", "val": "validation", "test": "test"}
  has = {key: own[key] in splits for key in ("train", "val")}
  has["test"] = has_labels(name, "test")
  if not has["train"] or not (has["val"] or has["test"]):
    raise ValueError(f"data.name='tfds:{name}' has the splits {', '.join(splits)}; 'train' is "
                     "needed, and 'validation' or a labelled 'test'")
  hold_out = not has["val"] and not option
  if split == "val" and hold_out:
    chosen = "train"
  else:
    chosen = split if has[split] else other_split(split, f"tfds:{name}")
  index = np.arange(splits[own[chosen]].num_examples)
  if hold_out and chosen == "train":
    index = index[(index % 10 == 9) == (split == "val")]
  return own[chosen], index


class TfdsSource:
  """Random access to one split: source[i] -> {"image": uint8 (h, w, 3), "label": int}."""

  def __init__(self, name: str, split: str):
    self.arguments = name, split
    self.split, self.index = choose(name, split)
    self.name = name.partition("@")[0]
    self.image_key, self.label_key = keys(self.name)
    self.class_names = class_names(name)
    self.num_classes = len(self.class_names)
    self.records = open_split(self.name, self.split)

  def __len__(self) -> int:
    return len(self.index)

  def open(self, index: int) -> Example:
    number = int(self.index[index])
    what = f"image {number} of {self.split} in tfds:{self.name}"
    try:
      record = self.records[number]
    except Exception as error:  # from array_record, or from TFDS's own decoding
      raise BadRecord(f"cannot read {what}: {error}; skip bad records with "
                      "data.on_bad='skip'") from error
    label = check_label(int(record[self.label_key]), self.num_classes, what)
    return Example(rgb(io.BytesIO(record[self.image_key]), what), label)

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))

  def __reduce__(self):
    """A worker process opens the data set again."""
    return TfdsSource, self.arguments
