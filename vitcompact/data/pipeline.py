"""From the name of a data set to batches of uint8 images, the same ones whenever asked again.

The keys of a config's `data` section (all must be there; nothing has a hidden default):

  name      "digits", "digits:FOLD" (0 to 4; "digits" is fold 0), "shapes", "shapes:COUNT" (COUNT
            training scenes) or "folder:PATH"
  augment   of training images, on the host: "none", "digits", "flip_crop" or "randaugment"
  workers   worker processes that decode and augment; 0: threads of this process
  erase     probability of random erasing                                     (DeiT: 0.25)
  smoothing label smoothing                                                   (DeiT: 0.1)
  mixup, cutmix     the alphas of the two mixes, 0: off                       (DeiT: 0.8, 1.0)
  mix_groups        groups of a batch that each draw their own mix            (DeiT: batch / 256)

`name`, `augment` and `workers` are read here; the others are for `batch.py`, on the device.

What `augment` does: "digits" turns, scales and shifts a little; "flip_crop" is a random resized
crop and a flip; "randaugment" is these two and then RandAugment, which is the DeiT recipe up to
normalising. "none" resizes and crops as in evaluation, without a margin. Of the DeiT recipe,
repeated augmentation is missing: each epoch sees each image once.
"""
import difflib
import functools
from typing import Protocol

import grain
import numpy as np
from PIL import Image

from vitcompact.data import augment as aug
from vitcompact.data.batches import Batches
from vitcompact.data.digits import FOLDS, Digits, split_indices
from vitcompact.data.folder import Folder, list_classes, list_files
from vitcompact.data.randaugment import randaugment
from vitcompact.data.shapes import SIZES, Shapes

SPLITS = ("train", "val", "test")
KNOWN = ("digits", "digits:FOLD", "shapes", "shapes:COUNT", "folder:PATH")
# Made at the size that the model takes, with something at every edge: evaluated whole, and only
# these augmentations leave the label true (a mirrored scene has another, a mirrored 5 has none).
ALLOWED = {"digits": ("none", "digits"), "shapes": ("none",)}


class Source(Protocol):
  """One split of a data set, by index: {"image": uint8 (h, w, 3), "label": int}."""
  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict: ...


def _choose(what: str, value: str, known) -> None:
  if value not in known:
    close = difflib.get_close_matches(value, known, n=3, cutoff=0.4)
    rest = [name for name in known if name not in close]
    raise ValueError(f"{what}={value!r} is not one of {', '.join(close + rest)}")


def _parse(name: str) -> tuple[str, str]:
  """"folder:PATH" -> ("folder", PATH); "shapes" -> ("shapes", "20000"), how many it draws."""
  kind, _, argument = name.partition(":")
  if kind == "folder" and not argument:
    raise ValueError(f"data.name={name!r} needs a path: 'folder:PATH' with PATH/train/CLASS/*.jpg")
  if kind == "shapes":
    argument = argument or str(SIZES["train"])
    if not argument.isdecimal() or int(argument) < 1:
      raise ValueError(f"data.name={name!r} needs a number of scenes, as in 'shapes:20000'")
  elif kind == "digits":
    argument = argument or "0"
    if argument not in map(str, range(FOLDS)):
      raise ValueError(f"data.name={name!r} needs a fold from 0 to {FOLDS - 1}, as in 'digits:1'")
  elif kind != "folder":
    _choose("data.name", name, KNOWN)
  return kind, argument


def _pair(image_size) -> tuple[int, int]:
  return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def source(name: str, split: str, *, image_size: int | tuple[int, int], seed: int = 0) -> Source:
  """One split of a data set. image_size (int or (height, width)) is that of generated images;
  images of a folder keep their own until a transform. seed: which scenes "shapes" draws."""
  kind, argument = _parse(name)
  _choose("split", split, SPLITS)
  if kind == "digits":
    return Digits(split, _pair(image_size), int(argument))
  if kind == "shapes":
    return Shapes(split, _pair(image_size), num_examples(name, split), seed)
  return Folder(argument, split)


def num_classes(name: str) -> int:
  kind, argument = _parse(name)
  if kind == "folder":
    return len(list_classes(argument))
  return {"digits": Digits, "shapes": Shapes}[kind].num_classes


def num_examples(name: str, split: str) -> int:
  """How many images a split has, without decoding any."""
  kind, argument = _parse(name)
  _choose("split", split, SPLITS)
  if kind == "digits":
    return len(split_indices(split, int(argument)))
  if kind == "shapes":
    return int(argument) if split == "train" else SIZES[split]
  return len(list_files(argument, split)[0])


def train_transform(example: dict, rng: np.random.Generator, *, augment: str,
                    image_size: tuple[int, int]) -> dict:
  """One training image, augmented: uint8 (height, width, 3), label int32."""
  image = Image.fromarray(example["image"])
  if augment in ("flip_crop", "randaugment"):
    image = aug.flip(aug.resized_crop(image, aug.crop_box(*image.size, rng), image_size), rng)
  elif image.size != image_size[::-1]:
    image = aug.evaluation(image, image_size, 1.0, "bicubic")
  if augment == "randaugment":
    image = randaugment(image, rng)
  elif augment == "digits":
    image = aug.small_affine(image, rng)
  return {"image": np.asarray(image), "label": np.int32(example["label"])}


def _share(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(f"{batch_size=} must be divisible by {process_count=}")
  return batch_size // process_count


def train_batches(data, *, image_size, batch_size: int, seed: int, process_index: int = 0,
                  process_count: int = 1) -> Batches:
  """Endless batches {"image": uint8 (b, H, W, 3), "label": int32 (b,)}, b of this process.

  The images of an epoch are shuffled anew, epochs follow one another without a gap, and a batch
  is the next `batch_size` of that line: each epoch sees each image exactly once, and a batch may
  straddle two epochs. What position n of the line holds, augmentation included, depends on
  (seed, n) alone, whatever the number of processes, workers or restarts; process i of P takes
  positions i, i + P, i + 2P, ...
  """
  b, size = _share(batch_size, process_count), _pair(image_size)
  kind, _ = _parse(data.name)
  _choose("data.augment", data.augment, ("none", "digits", "flip_crop", "randaugment"))
  if data.augment not in ALLOWED.get(kind, (data.augment,)):
    raise ValueError(f"data.augment={data.augment!r} would change what {kind} mean; "
                     f"use one of {', '.join(ALLOWED[kind])}")
  images = source(data.name, "train", image_size=size)
  if seed < 0:
    raise ValueError(f"{seed=} must be 0 or more")
  if len(images) < batch_size:
    raise ValueError(f"{batch_size=} is more than the {len(images)} training images of "
                     f"{data.name}: use a smaller batch")
  transform = functools.partial(train_transform, augment=data.augment, image_size=size)
  dataset = grain.MapDataset.source(images).seed(seed).shuffle().random_map(transform).repeat()
  dataset = dataset[process_index::process_count].batch(b, drop_remainder=True)
  return Batches(dataset, data.workers)


def _eval_example(index: int, *, images: Source, image_size: tuple[int, int], whole: bool,
                  crop: float, interpolation: str) -> dict:
  """Image `index`, ready for evaluation, or black with mask 0 beyond the last."""
  if index >= len(images):
    return {"image": np.zeros((*image_size, 3), np.uint8), "label": np.int32(0),
            "mask": np.float32(0)}
  example = images[index]
  pixels = example["image"]
  if not whole:
    image = aug.evaluation(Image.fromarray(pixels), image_size, crop, interpolation)
    pixels = np.asarray(image)
  return {"image": pixels, "label": np.int32(example["label"]), "mask": np.float32(1)}


def eval_batches(data, split: str, *, image_size, batch_size: int, crop: float, interpolation: str,
                 process_index: int = 0, process_count: int = 1) -> Batches:
  """One pass in order: {"image": uint8 (b, H, W, 3), "label": int32 (b,), "mask": float32 (b,)}.

  The last batch is filled with black images whose mask is 0; every process yields equally many.
  crop and interpolation ("bicubic", ...) are of the model's preprocessing. Generated images
  (digits, shapes) come at the model's size and are shown whole, whatever `crop`.
  """
  b, size = _share(batch_size, process_count), _pair(image_size)
  images = source(data.name, split, image_size=size)
  load = functools.partial(_eval_example, images=images, image_size=size, crop=crop,
                           whole=_parse(data.name)[0] in ALLOWED, interpolation=interpolation)
  padded = -(-len(images) // batch_size) * batch_size
  dataset = grain.MapDataset.range(padded)[process_index::process_count].map(load)
  return Batches(dataset.batch(b), data.workers)


def sample(data, split: str, count: int, *, image_size, crop: float,
           interpolation: str) -> np.ndarray:
  """uint8 (n, H, W, 3): `count` images (or all, if there are fewer) as `eval_batches` shows them.

  Evenly spread over the split: the first ones of a split are often all of one class.
  """
  size = _pair(image_size)
  images = source(data.name, split, image_size=size)
  indices = np.linspace(0, len(images), min(count, len(images)), endpoint=False).astype(int)
  return np.stack([_eval_example(
      int(i), images=images, image_size=size, crop=crop, whole=_parse(data.name)[0] in ALLOWED,
      interpolation=interpolation)["image"] for i in indices])
