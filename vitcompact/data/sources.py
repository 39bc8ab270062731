"""From the name of a data set to its images, one at a time.

  digits[:FOLD]     1,797 real images that come with scikit-learn; FOLD: 0 (default) to 4
  shapes[:COUNT]    generated scenes, COUNT of them for training
  folder:PATH       PATH/train/CLASS/*.jpg, PATH/val, PATH/test
  arrayrecord:PATH  files that `vitcompact prepare` wrote
  tfds:NAME[@all]   a data set of TensorFlow Datasets, prepared on this machine
  idx:PATH          IDX files of the MNIST family
  fashion_mnist     Debian's package of it, or the folder $FASHION_MNIST_DIR
  hf:NAME[@all]     parquet files of the Hugging Face hub or of a folder
"""
import difflib
from typing import Protocol

from vitcompact.data import folder, hf, idx, records, tfds
from vitcompact.data.decode import Example
from vitcompact.data.digits import FOLDS, Digits, split_indices
from vitcompact.data.folder import Folder, list_files
from vitcompact.data.hf import HfSource
from vitcompact.data.idx import FASHION_CLASSES, Idx
from vitcompact.data.records import Records
from vitcompact.data.shapes import SIZES, Directions, Shapes
from vitcompact.data.tfds import TfdsSource

SPLITS = ("train", "val", "test")
KNOWN = ("digits", "digits:FOLD", "shapes", "shapes:COUNT", "directions",
         "directions:COUNT", "folder:PATH", "arrayrecord:PATH", "tfds:NAME", "idx:PATH",
         "fashion_mnist", "hf:NAME")
NEEDS = {"folder": "a path: 'folder:PATH' with PATH/train/CLASS/*.jpg",
         "arrayrecord": "a path: 'arrayrecord:PATH', as `vitcompact prepare` writes it",
         "tfds": "a name: 'tfds:imagenet2012', 'tfds:cifar10'",
         "idx": "a path: 'idx:PATH' with PATH/train-images-idx3-ubyte.gz and its like",
         "hf": "a name or a folder: 'hf:org/name', 'hf:PATH' with PATH/train-*.parquet"}
# Data generated at the model's size, with content up to the edges: never cropped, and only these
# augmentations preserve the label (a mirrored scene has another label, a mirrored 5 has none).
ALLOWED = {"digits": ("none", "digits"), "shapes": ("none",),
           "directions": ("none",)}
DRAWN = {"shapes": Shapes, "directions": Directions}


class Source(Protocol):
  """One split of a data set. source[i] -> {"image": uint8 (h, w, 3), "label": int}."""
  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict: ...
  def open(self, index: int) -> Example: ...   # without converting the image to an array


def choose(what: str, value: str, known) -> None:
  """Raises ValueError for a value that is not in `known`, listing the most similar ones first."""
  if value not in known:
    close = difflib.get_close_matches(value, known, n=3, cutoff=0.4)
    rest = [name for name in known if name not in close]
    raise ValueError(f"{what}={value!r} is not one of {', '.join(close + rest)}")


def parse(name: str) -> tuple[str, str]:
  """"folder:PATH" -> ("folder", PATH); "shapes" -> ("shapes", "20000"), the number of scenes."""
  kind, _, argument = name.partition(":")
  if kind in NEEDS and not argument:
    raise ValueError(f"data.name={name!r} needs {NEEDS[kind]}")
  if kind in DRAWN:
    argument = argument or str(SIZES["train"])
    if not argument.isdecimal() or int(argument) < 1:
      raise ValueError(f"data.name={name!r} needs a number of scenes, as in '{kind}:20000'")
  elif kind == "digits":
    argument = argument or "0"
    if argument not in map(str, range(FOLDS)):
      raise ValueError(f"data.name={name!r} needs a fold from 0 to {FOLDS - 1}, as in 'digits:1'")
  elif kind not in NEEDS:
    choose("data.name", name, KNOWN)
  return kind, argument


def source(name: str, split: str, *, image_size: int | tuple[int, int], seed: int = 0,
           label_maps: bool = True) -> Source:
  """One split of a data set. image_size: int or (height, width) of generated images; other images
  keep their own size. seed: of the scenes that "shapes" generates. label_maps: whether to read
  label maps, if there are any."""
  kind, argument = parse(name)
  choose("split", split, SPLITS)
  size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  if kind == "digits":
    return Digits(split, size, int(argument))
  if kind in DRAWN:
    return DRAWN[kind](split, size, num_examples(name, split), seed)
  if kind == "tfds":
    return TfdsSource(argument, split)
  if kind == "idx":
    return Idx(argument, split)
  if kind == "fashion_mnist":
    return Idx(idx.fashion_mnist(), split, FASHION_CLASSES)
  if kind == "hf":
    return HfSource(argument, split)
  return {"folder": Folder, "arrayrecord": Records}[kind](argument, split, label_maps)


def class_names(name: str) -> tuple[str, ...]:
  """The names of a data set's classes: name k belongs to label k, and to output k of a model."""
  kind, argument = parse(name)
  readers = {"folder": folder.class_names, "arrayrecord": records.class_names,
             "tfds": tfds.class_names, "idx": idx.class_names, "hf": hf.class_names,
             "fashion_mnist": lambda _: FASHION_CLASSES}
  return (readers[kind](argument) if kind in readers
          else {"digits": Digits, **DRAWN}[kind].class_names)


def num_classes(name: str) -> int:
  return len(class_names(name))


def num_examples(name: str, split: str) -> int:
  """The number of images in a split, without decoding any."""
  kind, argument = parse(name)
  choose("split", split, SPLITS)
  if kind == "digits":
    return len(split_indices(split, int(argument)))
  if kind in DRAWN:
    return int(argument) if split == "train" else SIZES[split]
  if kind == "folder":
    return len(list_files(argument, split)[1])
  if kind == "arrayrecord":
    return sum(shard["records"] for shard in records.shards_of(argument, split))
  if kind == "tfds":
    return len(tfds.choose(argument, split)[1])
  if kind == "hf":
    return len(hf.choose(argument, split)[1])
  return len(idx.choose(argument or idx.fashion_mnist(), split)[1])
