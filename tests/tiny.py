"""Small models and random trees that many tests share."""
import jax
import jax.numpy as jnp
import numpy as np

import vitcompact as vc
from vitcompact.data.evaluation import Preprocess
from vitcompact.methods.protocol import CAPABILITIES, Site

SIZES = {"width": 24, "depth": 2, "heads": 4, "image_size": 32, "patch_size": 8, "num_classes": 5}


def deit(plan=None, name="deit_tiny_patch16_224", **fields):
  """A DeiT of two narrow blocks: 16 patches, 4 heads of 6."""
  return vc.create_model(name, plan=plan or vc.Plan(), **{**SIZES, **fields})


def preprocess(image_size, crop=1.0, **fields):
  """An evaluation at a size: int or (height, width)."""
  return Preprocess(**{"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop": crop,
                       "interpolation": "bicubic",
                       "image_size": tuple(np.broadcast_to(image_size, 2).tolist()), **fields})


def site(**fields):
  """A block of such a DeiT, the class token counted."""
  sizes = {"width": 24, "ffn_width": 24, "hidden": 96, "heads": 4}
  place = {"tokens": 17, "tokens_left": 17, "prefix": 1, "query_grid": (4, 4), "key_grid": (4, 4)}
  return Site(**{"block": 0, "depth": 2, **sizes, **place, "provides": frozenset(CAPABILITIES),
                 **fields})


def images(model, batch=3, seed=0):
  size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
  return jax.random.normal(jax.random.key(seed), (batch, *size, model.in_chans))


def randomised(tree, seed=1, spread=0.3):
  """Every leaf redrawn around zero (variances around one): hides no missing term behind a zero.

  Drawn by numpy: by JAX, each shape would be compiled.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = spread * rng.standard_normal(leaf.shape)
    return jnp.asarray(np.exp(noise) if "var" in str(path[-1]) else noise, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, tree)


def init(model, seed=1, spread=0.3):
  """Random variables for a model, without running it."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), images(model))
  return randomised(shapes, seed, spread)
