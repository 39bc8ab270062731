"""--mode=memory: the memory that a training step needs on each device of a simulated mesh.

The step is compiled for simulated devices (main.py sets them up before JAX is loaded) and never
run, so nothing is allocated and no data are needed.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import trees
from vitcompact.data import pipeline
from vitcompact.train import build as building
from vitcompact.train import sharding

IMAGENET_CLASSES = 1000
MIB = 2**20


def local_bytes(shapes, shardings) -> int:
  """Bytes of a tree on one device."""
  def shard_bytes(leaf, sharding):
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(sharding.shard_shape(leaf.shape)) * size
  return sum(jax.tree.leaves(jax.tree.map(shard_bytes, shapes, shardings)))


def activations(run) -> int:
  """Bytes of activations that one device keeps for the backward pass.

  They are counted in the traced model, with its dtypes and rematerialised blocks, and so do not
  depend on the compiler (XLA ignores rematerialisation on CPUs). A tensor axis, with which a device
  keeps less, is not taken into account.
  """
  config = run.config
  local = sharding.batches(run.mesh).shard_shape((config.batch_size,))[0] // config.accumulate
  shapes = {"params": run.shapes.params, "batch_stats": run.shapes.batch_stats}

  def pullback(params, images):
    rest = {name: tree for name, tree in shapes.items() if name != "params" and tree}
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return jax.vjp(lambda params: run.model.apply(
        {"params": params, **rest}, images, train=True, rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats"])[0], params)[1]

  def residual_bytes(count):
    images = jax.ShapeDtypeStruct((count, *run.preprocess.image_size, 3), np.float32)
    leaves = jax.tree.leaves(jax.eval_shape(pullback, run.shapes.params, images))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves
               if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended))

  return local * (residual_bytes(3) - residual_bytes(2))   # the difference leaves out the weights


def measure(run) -> dict[str, int]:
  """{name: bytes per device}. "working memory" is XLA's own figure: activations kept for the
  backward pass, gradients, and all other temporaries of a step."""
  batch = building.batch_shapes(run)
  compiled = run.step_at(0).lower(run.shapes, batch).compile()
  parts = {"parameters": "params", "optimiser": "opt_state", "averages": "ema_params"}
  out = {what: local_bytes(getattr(run.shapes, field), getattr(run.shardings, field))
         for what, field in parts.items()}
  state = local_bytes(run.shapes, run.shardings)
  out["statistics and counters"] = state - sum(out.values())
  out["batch"] = local_bytes(batch, jax.tree.map(lambda leaf: leaf.sharding, batch))
  out["working memory"] = compiled.memory_analysis().temp_size_in_bytes
  return out | {"total": sum(out.values())}


def table(config) -> str:
  """A table of `measure`, with a header that describes the run, and notes."""
  config = building.resolve(config)
  notes = ["Compiled for the CPU: a TPU or GPU fuses differently, keeps bfloat16 where the CPU "
           "widens it, and reserves some memory for itself. State and batch are exact everywhere. "
           "The CPU ignores remat, but the traced activations take it into account."]
  try:
    classes = pipeline.num_classes(config.data.name)
  except (ValueError, OSError):
    classes = IMAGENET_CLASSES
    notes.append(f"{config.data.name} is not available here: {classes} classes are assumed.")
  run = building.build(config, classes)
  mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
  head = (f"{config.model.name}, {trees.size(run.shapes.params) / 1e6:.2f} M parameters, batch "
          f"{config.batch_size} in microbatches of {config.batch_size // config.accumulate}, "
          f"remat {config.model.remat}, on {run.mesh.size} devices ({mesh})")
  lines = [f"{name:<26}{size / MIB:12.1f} MiB" for name, size in measure(run).items()]
  size = f"{activations(run) / MIB:.1f} MiB"
  notes.insert(0, f"In the traced model, {size} of activations are kept for the backward pass.")
  return "\n".join([head, "", "Memory of each device", *lines, "", *notes])
