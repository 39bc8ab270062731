"""Sharding, and the only place that knows mesh axes: "data", "fsdp" and "tensor".

"data" replicates the parameters and splits the batch; "fsdp" splits both; "tensor" splits what a
layer computes (heads, hidden channels), and all its devices get the same images.

A model names the logical axes of its parameters (`trees.Leaf.axes`); RULES says which logical axes
a mesh axis may split. Everything else follows: moments and averages are sharded like their
parameters, batch statistics and scalars are replicated, and GSPMD adds the communication.
"""
import math

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax import tree_utils

from vitcompact import trees

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis, the preferred first. A mesh axis splits at most one dimension of a
# leaf, and a dimension is split by at most one mesh axis.
RULES = (("heads", "tensor"), ("mlp", "tensor"), ("rank", "tensor"),
         ("embed", "fsdp"), ("mlp", "fsdp"), ("rank", "fsdp"))

# A leaf with fewer elements may be replicated if it cannot be split: it costs almost nothing.
SMALL = 2**14


def make_mesh(sizes, devices=None) -> Mesh:
  """A mesh of all `devices` from {"data": n, "fsdp": m, "tensor": t}; one size may be -1: the rest.
  """
  devices = jax.devices() if devices is None else devices
  # Sorted by process, so that each holds the contiguous rows of a batch that its pipeline reads.
  devices = sorted(devices, key=lambda device: (device.process_index, device.id))
  sizes = dict(sizes)
  if unknown := set(sizes) - set(MESH_AXES):
    raise ValueError(f"mesh={sizes} has unknown axes {sorted(unknown)}; the axes are {MESH_AXES}")
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
    raise ValueError(f"mesh={sizes}: sizes must be positive, and at most one may be -1 (the rest)")
  known = math.prod(n for n in shape if n != -1)
  shape = [len(devices) // known if n == -1 else n for n in shape]
  if math.prod(shape) != len(devices):
    raise ValueError(f"mesh={sizes} does not multiply out to {len(devices)} devices; "
                     "set one axis to -1 to let it take the rest")
  tensor, local = shape[MESH_AXES.index("tensor")], len(devices) // jax.process_count()
  if local % tensor and tensor > 1 and jax.process_count() > 1:
    raise ValueError(f"mesh.tensor={tensor} does not divide the {local} devices of a process: "
                     "devices that share images must belong to one process")
  # Not jax.make_mesh: its default, explicit axes, fails on a plain ViT (concatenating the class
  # token), and it may reorder devices, so that the rows of a process would not be contiguous.
  return Mesh(np.array(devices).reshape(shape), MESH_AXES,
              axis_types=(AxisType.Auto,) * len(shape))


def partition(name: str, shape, leaf: trees.Leaf, mesh: Mesh) -> PartitionSpec:
  """The split of one parameter: each mesh axis splits the first dimension in RULES that divides."""
  if leaf.axes and len(leaf.axes) != len(shape):
    raise ValueError(f"{name} {shape} has {len(shape)} dimensions, but its rule names {leaf.axes}")
  split = [None] * len(shape)
  for logical, axis in RULES:
    if logical in leaf.axes and axis not in split and mesh.shape[axis] > 1:
      dimension = leaf.axes.index(logical)
      if split[dimension] is None and shape[dimension] % mesh.shape[axis] == 0:
        split[dimension] = axis
  unsplit = math.prod(mesh.shape[axis] for axis in split if axis) == 1
  if unsplit and mesh.shape["fsdp"] > 1 and math.prod(shape) >= SMALL:
    raise ValueError(f"{name} {shape} with axes {leaf.axes} cannot be split over "
                     f"fsdp={mesh.shape['fsdp']}: none of {[rule[0] for rule in RULES]} divides; "
                     "choose an fsdp that divides the model's width")
  return PartitionSpec(*split)


def parameters(params, rules, mesh: Mesh):
  """A tree of NamedSharding for parameters (arrays or shapes), by `parameter_rules()`."""
  leaves = trees.first_match(rules, params, may_be_idle=True)
  return jax.tree_util.tree_map_with_path(
      lambda path, array, leaf: NamedSharding(
          mesh, partition(trees.name_of(path), array.shape, leaf, mesh)), params, leaves)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batches(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its leading dimension is split over the axes of BATCH_AXES."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def moments(optimizer, opt_state, parameter_shardings, mesh: Mesh):
  """Shardings of an optimiser's state: moments are sharded like their parameters."""
  def absent(leaf):   # a parameter of another group, which has no moments in this part of the state
    return isinstance(leaf, optax.MaskedNode)
  return tree_utils.tree_map_params(
      optimizer, lambda leaf, sharding: leaf if absent(leaf) else sharding, opt_state,
      parameter_shardings, transform_non_params=lambda _: replicated(mesh), is_leaf=absent)


def check_batch(name: str, size: int, mesh: Mesh):
  """Raises ValueError for a batch size that the devices cannot split evenly."""
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if size % parts:
    raise ValueError(f"{name}={size} cannot be split over {parts} devices; choose a multiple "
                     f"of {parts}, such as {-(-size // parts) * parts}")


def put_batch(batch, mesh: Mesh):
  """A global batch from this process's part of it ({name: numpy array (b, ...)})."""
  return {name: jax.make_array_from_process_local_data(batches(mesh), np.asarray(array))
          for name, array in batch.items()}


def gather(tree, mesh: Mesh):
  """Replicates every leaf over all devices, so that each process can read it."""
  return jax.device_put(tree, replicated(mesh))
