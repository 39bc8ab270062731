"""The one place that knows mesh axes: parameters over "fsdp" and "tensor", batches over the rest.

"data" copies the parameters and splits the batch; "fsdp" splits both; "tensor" splits what a layer
computes (heads, hidden channels) and gives all its devices the same images.

A model says what the axes of its parameters mean (`trees.Leaf.axes`); RULES says which of those
meanings a mesh axis may split. Everything else follows: moments and averages lie as their
parameters do, batch statistics and scalars are on every device, and GSPMD adds the communication.
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

# Logical axis -> mesh axis, the preferred first: a mesh axis splits one dimension of a leaf, and a
# dimension is split by one mesh axis.
RULES = (("heads", "tensor"), ("mlp", "tensor"), ("rank", "tensor"),
         ("embed", "fsdp"), ("mlp", "fsdp"), ("rank", "fsdp"))

# A leaf of fewer elements that does not divide may lie whole on every device: it costs nothing.
SMALL = 2**14


def make_mesh(sizes, devices=None) -> Mesh:
  """A mesh of all `devices` from {"data": n, "fsdp": m, "tensor": t}; one -1 is all the rest."""
  devices = jax.devices() if devices is None else devices
  # By process: each then holds one run of a batch's rows, which is what its data pipeline reads.
  devices = sorted(devices, key=lambda device: (device.process_index, device.id))
  sizes = dict(sizes)
  if unknown := set(sizes) - set(MESH_AXES):
    raise ValueError(f"mesh={sizes} has unknown axes {sorted(unknown)}; the axes are {MESH_AXES}")
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
    raise ValueError(f"mesh={sizes}: sizes are positive, and at most one is -1 (all the rest)")
  known = math.prod(n for n in shape if n != -1)
  shape = [len(devices) // known if n == -1 else n for n in shape]
  if math.prod(shape) != len(devices):
    raise ValueError(f"mesh={sizes} does not multiply out to {len(devices)} devices; "
                     "give one axis -1 to let it take all the rest")
  tensor, local = shape[MESH_AXES.index("tensor")], len(devices) // jax.process_count()
  if local % tensor and tensor > 1 and jax.process_count() > 1:
    raise ValueError(f"mesh.tensor={tensor} does not divide the {local} devices of a process: "
                     "devices that share images must be of one process")
  # Explicit axes, the default of jax.make_mesh, refuse a plain ViT (concatenating the class token);
  # and it may reorder devices, which would give a process rows from here and there.
  return Mesh(np.array(devices).reshape(shape), MESH_AXES,
              axis_types=(AxisType.Auto,) * len(shape))


def partition(name: str, shape, leaf: trees.Leaf, mesh: Mesh) -> PartitionSpec:
  """How one parameter is split: by the first rule of each mesh axis whose dimension divides."""
  if leaf.axes and len(leaf.axes) != len(shape):
    raise ValueError(f"{name} {shape} has {len(shape)} dimensions, but its rule names {leaf.axes}")
  split = [None] * len(shape)
  for logical, axis in RULES:
    if logical in leaf.axes and axis not in split and mesh.shape[axis] > 1:
      dimension = leaf.axes.index(logical)
      if split[dimension] is None and shape[dimension] % mesh.shape[axis] == 0:
        split[dimension] = axis
  whole = math.prod(mesh.shape[axis] for axis in split if axis) == 1
  if whole and mesh.shape["fsdp"] > 1 and math.prod(shape) >= SMALL:
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
  """The leading dimension over every device that has images of its own."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def moments(optimizer, opt_state, parameter_shardings, mesh: Mesh):
  """Shardings of an optimiser's state: what mirrors a parameter lies as that parameter does."""
  def absent(leaf):   # another group's parameter, of which this part of the state knows nothing
    return isinstance(leaf, optax.MaskedNode)
  return tree_utils.tree_map_params(
      optimizer, lambda leaf, sharding: leaf if absent(leaf) else sharding, opt_state,
      parameter_shardings, transform_non_params=lambda _: replicated(mesh), is_leaf=absent)


def check_batch(name: str, size: int, mesh: Mesh):
  """Refuses a batch that the devices cannot share evenly."""
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if size % parts:
    raise ValueError(f"{name}={size} cannot be split over {parts} devices; choose a multiple "
                     f"of {parts}, such as {-(-size // parts) * parts}")


def put_batch(batch, mesh: Mesh):
  """A global batch from this process's share of it ({name: numpy array (b, ...)})."""
  return {name: jax.make_array_from_process_local_data(batches(mesh), np.asarray(array))
          for name, array in batch.items()}


def gather(tree, mesh: Mesh):
  """Every leaf whole on every device, so that each process can read it."""
  return jax.device_put(tree, replicated(mesh))
