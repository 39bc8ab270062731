"""Image classification sets of TensorFlow Datasets, read without TensorFlow.

The set must lie in TFDS_DATA_DIR (or ~/tensorflow_datasets) as ArrayRecord. TFDS itself writes it:
`tfds build NAME --file_format=array_record`, on a machine that has TensorFlow for most sets.

val is the set's "validation" where it has one. Else every tenth image of its train is held out,
and train is the others. With NAME@all nothing is held out: train is the whole, and test serves as
val too. test is the set's "test" where that has labels (imagenet2012's has none), else its
validation: then nothing is held out beside the set that is reported.
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
  except Exception as error:  # each of TFDS's own, some of them of many lines
    raise ValueError(f"data.name='tfds:{name}': {str(error).strip().splitlines()[0]}") from None
  if not builder.data_path.exists():
    raise ValueError(f"data.name='tfds:{name}' is not in {builder.data_path}: set TFDS_DATA_DIR, "
                     f"or write it with `tfds build {name} --file_format=array_record`")
  return builder


def image_and_label(info) -> tuple[str, str]:
  """The names of a set's image and class label: those that it is known for, where it has several
  (cifar100 has a coarse label too), else its only ones."""
  features = {key: type(feature).__name__ for key, feature in info.features.items()}
  known = tuple(key for key in info.supervised_keys or () if isinstance(key, str))   # or a dict
  if [features.get(key) for key in known] == ["Image", "ClassLabel"]:
    return known
  found = [[key for key in features if features[key] == kind] for kind in ("Image", "ClassLabel")]
  if any(len(these) != 1 for these in found):
    raise ValueError(f"data.name='tfds:{info.name}' is not image classification: its features are "
                     f"{', '.join(features)}")
  return found[0][0], found[1][0]


@functools.cache
def keys(name: str) -> tuple[str, str]:
  return image_and_label(_builder(name).info)


def open_split(name: str, split: str):
  """TFDS's data source of one of its own splits; images are left as they were encoded."""
  import tensorflow_datasets
  try:
    return _builder(name).as_data_source(
        split, decoders={keys(name)[0]: tensorflow_datasets.decode.SkipDecoding()})
  except Exception as error:
    raise ValueError(f"data.name='tfds:{name}' cannot be read at random: "
                     f"{str(error).strip().splitlines()[0]}; write it with "
                     f"`tfds build {name} --file_format=array_record`") from None


def class_names(name: str) -> tuple[str, ...]:
  """name: with or without @all."""
  name = name.partition("@")[0]
  return tuple(_builder(name).info.features[keys(name)[1]].names)


@functools.cache
def has_labels(name: str, split: str) -> bool:
  """Whether a split exists and is labelled: hidden labels are -1."""
  if split not in _builder(name).info.splits:
    return False
  return int(open_split(name, split)[0][keys(name)[1]]) >= 0


@functools.cache
def choose(name: str, split: str) -> tuple[str, np.ndarray]:
  """(TFDS's own split, which of its images) for train, val or test."""
  name, _, more = name.partition("@")
  if more not in ("", "all"):
    raise ValueError(f"data.name='tfds:{name}@{more}': only '@all' may follow the name")
  splits = _builder(name).info.splits
  own = {"train": "train", "val": "validation", "test": "test"}
  has = {key: own[key] in splits for key in ("train", "val")}
  has["test"] = has_labels(name, "test")
  if not has["train"] or not (has["val"] or has["test"]):
    raise ValueError(f"data.name='tfds:{name}' has the splits {', '.join(splits)}; 'train' is "
                     "needed, and 'validation' or a labelled 'test'")
  hold_out = not has["val"] and not more
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
    except Exception as error:  # of array_record, or of TFDS's own decoding
      raise BadRecord(f"cannot read {what}: {error}; pass over some with "
                      "data.on_bad='skip'") from error
    label = check_label(int(record[self.label_key]), self.num_classes, what)
    return Example(rgb(io.BytesIO(record[self.image_key]), what), label)

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))

  def __reduce__(self):
    """A worker process opens the set again."""
    return TfdsSource, self.arguments
