"""Small models and random trees that many tests share."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from vitcompact import checks, trees
from vitcompact.count import Count
from vitcompact.data.evaluation import Preprocess
from vitcompact.methods.ffn import cffn
from vitcompact.methods.protocol import CAPABILITIES, Site
from vitcompact.receipt import Receipt, Row
from vitcompact.verify import Proof

SIZES = {"width": 24, "depth": 2, "heads": 4, "image_size": 32, "patch_size": 8, "num_classes": 5}


def named(rows, *always):
  """Returns test parameters for all sizes of a family; those not in `always` are marked slow."""
  return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in rows]


def deit(plan=None, name="deit_tiny_patch16_224", **fields):
  """Returns a DeiT of two narrow blocks: 16 patches, 4 heads of 6."""
  return vc.create_model(name, plan=plan or vc.Plan(), **{**SIZES, **fields})


# Hierarchical networks at their smallest, with every kind of block.
NETWORKS = {
    # Maps of 4 x 4 and 2 x 2, smaller than the windows.
    "davit_tiny": {"image_size": 16, "widths": (8, 16), "depths": (1, 1), "heads": (2, 4),
                   "window_size": 3},
    "biformer_tiny": {"image_size": 32, "widths": (16, 24), "depths": (1, 1), "head_dim": 4,
                      "regions": 2, "top_ks": (2,), "dense_heads": 4},
    # One block per stage. At 96 pixels the grids are 6, 3 and 2 on a side; the squeezed widths of
    # the two downsamplings are rounded, and the attending parts are odd and even.
    "shvit_s1": {"image_size": 64, "widths": (8, 12, 20), "depths": (1, 1, 1),
                 "partial_widths": (5, 8), "qk_width": 4},
    # A stage of aggregated attention, and one of attention over all tokens.
    "transnext_tiny": {"image_size": 8, "widths": (8, 16), "depths": (1, 1), "heads": (2, 4),
                       "mlp_ratios": (3, 3), "sr_ratios": (2, 1), "pretrain_size": 32},
}
NETWORKS["biformer_stl"] = NETWORKS["biformer_tiny"]


def biformer(plan=None, name="biformer_tiny", **fields):
  """Returns a BiFormer of two blocks: 8 x 8 patches attend to 2 of 4 regions, then 4 x 4 to all."""
  return vc.create_model(name, plan=plan or vc.Plan(),
                         **{**NETWORKS[name], "num_classes": 5, **fields})


def shvit(plan=None, **fields):
  """Returns an SHViT of three narrow blocks; the last two have attention."""
  return vc.create_model("shvit_s1", plan=plan or vc.Plan(),
                         **{**NETWORKS["shvit_s1"], "image_size": 96, "num_classes": 5, **fields})


def transnext(plan=None, **fields):
  """Returns a TransNeXt of two narrow blocks, on grids of 6 x 10 and 3 x 5."""
  return vc.create_model("transnext_tiny", plan=plan or vc.Plan(), **{
      **NETWORKS["transnext_tiny"], "image_size": (24, 40), "num_classes": 5, **fields})


def few_options(patch):
  """Leaves few options to `measure`, since each option is a program to compile."""
  patch.setattr(cffn, "RATIOS", (0.25,))
  for kind, options in ((vc.ToMe, []), (vc.MCTF, []), (vc.EViT, [vc.EViT(blocks=(0,))])):
    patch.setattr(kind, "options", classmethod(lambda _, site, options=options: options))


def preprocess(image_size, crop=1.0, **fields):
  """Returns the preprocessing for a size: int or (height, width)."""
  return Preprocess(**{"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop": crop,
                       "interpolation": "bicubic",
                       "image_size": tuple(np.broadcast_to(image_size, 2).tolist()), **fields})


def site(**fields):
  """Returns the site of a block of such a DeiT, class token included."""
  sizes = {"width": 24, "ffn_width": 24, "hidden": 96, "heads": 4}
  place = {"tokens": 17, "tokens_left": 17, "prefix": 1, "query_grid": (4, 4), "key_grid": (4, 4)}
  return Site(**{"block": 0, "depth": 2, **sizes, **place, "provides": frozenset(CAPABILITIES),
                 **fields})


def images(model, batch=3, seed=0):
  size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
  return jax.random.normal(jax.random.key(seed), (batch, *size, model.in_chans))


def randomised(tree, seed=1, spread=0.3):
  """Redraws every leaf around zero (variances around one), so that no zero hides a missing term.

  Draws with NumPy, and does not call jnp.asarray: JAX would compile a program for each shape.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = spread * rng.standard_normal(leaf.shape)
    return np.asarray(np.exp(noise) if "var" in str(path[-1]) else noise, np.float32)

  return jax.device_put(jax.tree_util.tree_map_with_path(draw, tree))


def normal(*shape, seed=0):
  """Returns a NumPy array of normal values, which can be indexed without compiling a program."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def init(model, seed=1, spread=0.3):
  """Returns random variables for a model, without running it."""
  return randomised(checks.variable_shapes(model), seed, spread)


def apply(model, variables, *args, rngs=None, mutable=False, **options):
  """Calls `model.apply` compiled as a whole: op by op, compiling takes five times as long."""
  mutable = tuple(mutable) if isinstance(mutable, list) else mutable
  return _applied(model, mutable, tuple(sorted(options.items())), variables, args, rngs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _applied(model, mutable, options, variables, args, rngs):
  return model.apply(variables, *args, rngs=rngs, mutable=mutable, **dict(options))


def fold(model, variables):
  """Calls `vc.fold`, compiled as a whole."""
  return model.clone(deploy=True), _folded(model, variables)


@functools.partial(jax.jit, static_argnums=0)
def _folded(model, variables):
  return vc.fold(model, variables)[1]


@functools.partial(jax.jit, static_argnums=(0, 3))
def features(model, variables, images, maps=False):
  """Calls `vc.features`, compiled as a whole."""
  return vc.features(model, variables, images, maps=maps)


def gradients(model, variables, images, key=0):
  """Returns the gradients of the sum of squared logits in train mode, by parameter name.

  They are NumPy arrays: np.any of a JAX array compiles a program for each shape.
  """
  return trees.named_leaves(jax.device_get(
      _gradients(model, variables, images, jax.random.key(key))))


@functools.partial(jax.jit, static_argnums=0)
def _gradients(model, variables, images, key):
  def loss(params):
    out, _ = model.apply({**variables, "params": params}, images, train=True,
                         rngs={"dropout": key}, mutable=["batch_stats"])
    return jnp.sum(getattr(out, "logits", out) ** 2)
  return jax.grad(loss)(variables["params"])


def receipt(**changes) -> Receipt:
  """A receipt of one row, without a run."""
  count = Count(**dict.fromkeys(Count._fields, 7))
  proof = Proof(**{field: 0 for field in Proof.__dataclass_fields__})
  return Receipt("a run", (Row("dense", count, 0.5),), proof, {"data": "folder:x"}, **changes)
