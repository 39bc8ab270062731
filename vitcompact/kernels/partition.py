"""Kernels on several devices: each computes its own images.

The compiler splits a program over devices, but cannot see inside a kernel: on GPUs, every device
would compute all images. (On TPUs that is an error, and custom partitioning is not supported.)
"""
from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def over_images(function: Callable) -> Callable:
  """Lets `function` be split over images, the first axis of its arguments and results.

  If the arrays are also split along another axis, such as heads, they are gathered first.
  """
  def partition(mesh, arguments, results):
    spec = arguments[0].sharding.spec
    by_image = NamedSharding(mesh, PartitionSpec(spec[0] if spec else None))
    return (mesh, function, jax.tree.map(lambda _: by_image, results),
            jax.tree.map(lambda _: by_image, arguments))

  def rule(mesh, arguments, results):
    del mesh
    factors = [[f"x{number}_{axis}" for axis in range(1, len(array.shape))]
               for number, array in enumerate([*arguments, *results])]
    sides = [" ".join(["images", *rest]) for rest in factors]
    replicated = tuple(factor for rest in factors for factor in rest)
    return (", ".join(sides[:len(arguments)]) + " -> " + ", ".join(sides[len(arguments):]),
            {"need_replication_factors": replicated})

  partitioned = custom_partitioning(function)
  partitioned.def_partition(partition, sharding_rule=rule)
  return partitioned
