"""--mode=memory: what a training step takes of each device's memory, on a mesh that is not here.

The step is compiled for as many pretended devices (main.py sets them up before JAX is loaded) and
never run, so nothing is allocated and no data are needed.
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
  def one(leaf, place):
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(place.shard_shape(leaf.shape)) * size
  return sum(jax.tree.leaves(jax.tree.map(one, shapes, shardings)))


def activations(run) -> int:
  """Bytes that one device keeps of its images from the forward to the backward pass.

  Read off the traced model, so it knows dtypes and rematerialised blocks, whatever the compiler
  (XLA drops rematerialisation on a processor). A tensor axis is not counted; it keeps less.
  """
  config = run.config
  local = sharding.batches(run.mesh).shard_shape((config.batch_size,))[0] // config.accumulate
  given = {"params": run.shapes.params, "batch_stats": run.shapes.batch_stats}

  def pullback(params, images):
    rest = {name: tree for name, tree in given.items() if name != "params" and tree}
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return jax.vjp(lambda params: run.model.apply(
        {"params": params, **rest}, images, train=True, rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats"])[0], params)[1]

  def kept(count):
    images = jax.ShapeDtypeStruct((count, *run.preprocess.image_size, 3), np.float32)
    leaves = jax.tree.leaves(jax.eval_shape(pullback, run.shapes.params, images))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves
               if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended))

  return local * (kept(3) - kept(2))   # what does not grow with the images is weights


def measure(run) -> dict[str, int]:
  """{what: bytes a device}. "working memory" is XLA's own figure: activations kept for the
  backward pass, gradients, and everything else that lives within a step."""
  batch = building.batch_shapes(run)
  compiled = run.step_at(0).lower(run.shapes, batch).compile()
  parts = {"parameters": "params", "optimiser": "opt_state", "averages": "ema_params"}
  out = {what: local_bytes(getattr(run.shapes, field), getattr(run.shardings, field))
         for what, field in parts.items()}
  state = local_bytes(run.shapes, run.shardings)
  out["statistics and counters"] = state - sum(out.values())
  out["batch"] = local_bytes(batch, jax.tree.map(lambda leaf: leaf.sharding, batch))
  out["working memory"] = compiled.memory_analysis().temp_size_in_bytes
  return out | {"in all": sum(out.values())}


def table(config) -> str:
  """A table of `measure`, with what it was measured for."""
  config = building.resolve(config)
  notes = ["Compiled for the CPU: a TPU or GPU fuses otherwise, keeps bfloat16 where the CPU "
           "widens it, and needs a reserve of its own. State and batch are exact everywhere; a "
           "processor ignores remat, the traced activations do not."]
  try:
    classes = pipeline.num_classes(config.data.name)
  except (ValueError, OSError):
    classes = IMAGENET_CLASSES
    notes.append(f"{config.data.name} is not here: {classes} classes are assumed.")
  run = building.build(config, classes)
  mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
  head = (f"{config.model.name}, {trees.size(run.shapes.params) / 1e6:.2f} M parameters, batch "
          f"{config.batch_size} in microbatches of {config.batch_size // config.accumulate}, "
          f"remat {config.model.remat}, on {run.mesh.size} devices ({mesh})")
  lines = [f"{what:<26}{size / MIB:12.1f} MiB" for what, size in measure(run).items()]
  kept = f"{activations(run) / MIB:.1f} MiB"
  notes.insert(0, f"By the traced model, {kept} of activations wait for the backward pass.")
  return "\n".join([head, "", "Each device holds", *lines, "", *notes])
