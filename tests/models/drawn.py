"""Weights and images, drawn instead of stored: equal wherever numpy is, with torch or without."""
import re

import numpy as np

SEED = 2306


def weights(shapes: dict[str, tuple[int, ...]], probe: dict[str, float] | None = None):
  """Returns {name: float32 array} for a PyTorch state dict's names and shapes.

  All kinds of tensors are random, running statistics and norms included, so that an omission always
  shows. probe: {full-match pattern: factor} scales the matching tensors: with activations of
  about 1e-3 before the norms, a wrong epsilon shows in the logits.
  """
  rng = np.random.default_rng(SEED)
  out = {}
  for name, shape in sorted(shapes.items()):
    factor = [f for pattern, f in (probe or {}).items() if re.fullmatch(pattern, name)]
    array = _draw(rng, name, shape) * np.float32(factor[0] if factor else 1)
    out[name] = np.asarray(array, np.float32)
  return out


def _draw(rng, name, shape):
  normal = rng.standard_normal(shape, np.float32)
  if name.endswith("num_batches_tracked"):
    return np.zeros(shape)
  if name.endswith("running_var"):
    return 0.5 + normal ** 2
  if len(shape) > 1 and name.endswith("weight"):
    return normal * np.prod(shape[1:]) ** -0.5
  if name.endswith("weight"):           # of a norm
    return 1 + 0.2 * normal
  return 0.3 * normal                   # biases, running means, tokens, positions


def images(image_size: tuple[int, int], count: int = 2):
  """Returns (count, H, W, 3) float32, as if normalised."""
  return np.random.default_rng(SEED + 1).standard_normal((count, *image_size, 3), np.float32)
