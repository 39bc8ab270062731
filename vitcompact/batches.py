"""Images in memory: joined from batches, held out, and split into chunks and among devices."""
import math
import warnings
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vitcompact import checks

# Most values of the images that an iterable or a command gives: 1 GiB in float32, 1,783 images of
# 224 x 224.
MOST_VALUES = 2 ** 28
CHUNK_VALUES = 2 ** 22   # residual stream values in a chunk of images: about 50 images of DeiT-S


def join_batches(model, images):
  """Returns the images of an iterable of batches (B, H, W, C), such as a data loader, as a float32
  array; anything else unchanged. The iterable is read until `MOST_VALUES` are in memory."""
  if hasattr(images, "shape") or isinstance(images, str) or not isinstance(images, Iterable):
    return images
  if isinstance(images, tuple):
    raise ValueError("images: a tuple was given; give the images alone, such as images=batch[0]")
  joined, values = [], 0
  for batch in images:
    if isinstance(batch, (tuple, list, Mapping)):
      image = '["image"]' if isinstance(batch, Mapping) else "[0]"
      raise ValueError(f"images: a batch is a {type(batch).__name__}; give images alone, such as "
                       f"images=(batch{image} for batch in loader)")
    if len(getattr(batch, "shape", ())) == 3:
      raise ValueError(f"images: an item of shape {tuple(batch.shape)} is a single image, not a "
                       "batch; give np.stack(images)")
    checks.check_images(model, batch, "a batch of images")
    joined.append(np.asarray(batch, np.float32))
    if joined[-1].shape[1:] != joined[0].shape[1:]:
      raise ValueError(f"images: a batch of shape {batch.shape} follows one of {joined[0].shape}; "
                       "give images of one size")
    values += joined[-1].size
    if values >= MOST_VALUES:
      read = sum(map(len, joined))
      warnings.warn(f"only the first {read:,} images were read: they take 1 GiB of memory",
                    stacklevel=3)
      break
  if not joined:
    raise ValueError("images: there are no batches in what was given")
  return np.concatenate(joined)


def hold_out_last(images) -> tuple[np.ndarray, int]:
  """Returns (images with every fourth one moved to the end, how many were moved): those are held
  out. If the images are ordered by class, the last quarter would contain only a few classes."""
  images = np.asarray(images, np.float32)
  if len(images) < 8:
    return images, 0
  held_out = np.arange(len(images)) % 4 == 3
  return np.concatenate([images[~held_out], images[held_out]]), int(held_out.sum())


def take_images(tree, at: slice):
  return jax.tree.map(lambda leaf: leaf[at], tree)


def chunks(x, start: int, stop: int):
  """Yields slices of images that fit in the memory of all devices. All but the last have the same
  length, a multiple of the number of devices if there are enough images."""
  leaf, devices = max(jax.tree.leaves(x), key=np.size), jax.local_device_count()
  most = devices * min(max(8, CHUNK_VALUES * len(leaf) // max(leaf.size, 1)), 256)
  if stop > start:
    # If possible a divisor of the quarter that is held out: the chunks of all passes then have one
    # length, for which programs are compiled.
    share = stop - start if stop - start <= most else len(leaf) // 4
    size = next((size for size in range(most, most // 2, -1) if share % size == 0),
                math.ceil(share / math.ceil(share / most)))
    if size >= devices:
      size = math.ceil(size / devices) * devices
    for first in range(start, stop, size):
      yield slice(first, min(first + size, stop))


def all_chunks(x):
  """Returns the chunks of all images."""
  return chunks(x, 0, len(jax.tree.leaves(x)[0]))


def _device_sharding(spec: PartitionSpec) -> NamedSharding:
  return NamedSharding(Mesh(np.asarray(jax.local_devices()), ("images",)), spec)


def shard_images(tree):
  """Splits leaves (images, ...) among the devices of this process, or replicates uneven ones."""
  devices = jax.local_device_count()
  if devices == 1:
    return tree
  even = all(len(leaf) % devices == 0 for leaf in jax.tree.leaves(tree))
  return jax.device_put(tree, _device_sharding(PartitionSpec(*["images"] * even)))


def replicate(tree):
  """Copies a tree to each device of this process."""
  return tree if jax.local_device_count() == 1 else jax.device_put(
      tree, _device_sharding(PartitionSpec()))
