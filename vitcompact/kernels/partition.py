"""Kernels on many devices: each computes its own images.

The compiler splits a program over devices, but cannot look into a kernel: on GPUs every device
would compute all images. (On TPUs it is an error, and what is done here is not supported.)
"""
from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def over_images(function: Callable) -> Callable:
  """`function` of arrays with images in front, to such arrays; its images may be spread.

  Whatever else the arrays are split by (heads, say) is gathered before.
  """
  def partition(mesh, arguments, results):
    spec = arguments[0].sharding.spec
    spread = NamedSharding(mesh, PartitionSpec(spec[0] if spec else None))
    return (mesh, function, jax.tree.map(lambda _: spread, results),
            jax.tree.map(lambda _: spread, arguments))

  def rule(mesh, arguments, results):
    del mesh
    factors = [[f"x{number}_{axis}" for axis in range(1, len(array.shape))]
               for number, array in enumerate([*arguments, *results])]
    sides = [" ".join(["images", *rest]) for rest in factors]
    replicated = tuple(factor for rest in factors for factor in rest)
    return (", ".join(sides[:len(arguments)]) + " -> " + ", ".join(sides[len(arguments):]),
            {"need_replication_factors": replicated})

  spread = custom_partitioning(function)
  spread.def_partition(partition, sharding_rule=rule)
  return spread
