"""Kernels on several devices: each computes its own images."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.kernels.cases import draw, reference
from vitcompact.kernels.block_sparse import attention


def test_devices_compute_their_own_images_and_together_match_one_device():
  seen = []

  # The reference stands in for the kernels, which do not run here.
  def forward(interpret, query, *rest):
    seen.append(query.shape[0])
    return reference(query, *rest)

  def backward(interpret, query, key, value, bias, chosen, log_sum, shift, d_out):
    seen.append(query.shape[0])
    (out, _), pull = jax.vjp(lambda *arrays: reference(*arrays, bias, chosen), query, key,
                             value)
    return pull((d_out, shift + jnp.sum(out * d_out, axis=-1)))

  attend = attention(forward, backward)
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  blocks = [draw(8, 1, 2, 4, width, seed=width) for width in (3, 3, 5)]
  bias, chosen = draw(1, 1, 2, 4), jnp.tile(jnp.asarray([[[[1], [0]]]], jnp.int32), (8, 1, 1, 1))

  def run(attend):
    def run(*blocks):
      out, pull = jax.vjp(lambda *blocks: attend(*blocks, bias, chosen), *blocks)
      return out, pull(out)
    return jax.jit(run)

  spread = run(attend)(*jax.device_put(blocks, NamedSharding(mesh, PartitionSpec("data"))))
  assert seen == [8, 8, 2, 2]  # once traced, then compiled for each of four groups of devices
  for leaf in jax.tree.leaves(spread):
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), spread,
               run(reference)(*blocks))
