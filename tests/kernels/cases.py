"""Small blocked arrays, and the two sides of a comparison, for the kernels' tests."""
import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny


def draw(*shape, seed=0, dtype=jnp.float32):
  return np.asarray(tiny.normal(*shape, seed=seed), dtype)


def case(dtype, area: int, e: int, *, d: int = 64, biased: bool = True, batch: int = 2,
         heads: int = 1):
  """Arguments of block attention with batch * heads = 2, and gradients of both its outputs.

  There are two query blocks, each with two of three key blocks chosen. Half of the first key block
  is hidden; no query block chooses the last key block in the first image or head.
  """
  queries, keys = 2, 3
  query = draw(batch, heads, queries, area, d, dtype=dtype) * np.asarray(d ** -0.5, dtype)
  key = draw(batch, heads, keys, area, d, seed=1, dtype=dtype)
  value = draw(batch, heads, keys, area, e, seed=2, dtype=dtype)
  bias = draw(batch, 1, keys, area, seed=3)
  bias[:, :, 0, area // 2:] = -np.inf
  chosen = np.int32([[[0, 1], [1, 0]], [[1, 2], [2, 0]]]).reshape(batch, heads, queries, 2)
  bias, chosen = jax.device_put((bias, chosen))   # kernels index them
  gradients = tuple(draw(batch, heads, queries, area, *width, seed=4) for width in ((e,), ()))
  return (query, key, value), (bias if biased else None, chosen), gradients


def reference(query_bfqad, key_bfkcd, value_bfkce, bias, chosen_bfqs):
  """What the kernels compute, as masked dense attention."""
  seen_bfqk = jax.nn.one_hot(chosen_bfqs, key_bfkcd.shape[2], dtype=bool).any(axis=-2)
  scores = jnp.einsum("bfqad,bfkcd->bfqakc", query_bfqad, key_bfkcd)
  scores = scores if bias is None else scores + bias[:, :, None, None]
  scores = jnp.where(seen_bfqk[:, :, :, None, :, None], scores, -jnp.inf)
  log_sum = jax.nn.logsumexp(scores, axis=(-2, -1))
  weights = jnp.exp(scores - log_sum[..., None, None])
  return jnp.einsum("bfqakc,bfkce->bfqae", weights, value_bfkce), log_sum


def results(attend, arrays, fixed, gradients):
  """Returns ((out, log_sum), gradients of query, key, value), as float32."""
  def run(*arrays):
    out, pull = jax.vjp(lambda *arrays: attend(*arrays, *fixed), *arrays)
    return out, pull(gradients)
  return jax.tree.map(lambda x: np.asarray(x, np.float32), jax.jit(run)(*arrays))


def assert_equals_the_reference(attend, arrays, fixed, gradients, tolerance: float):
  """Checks the largest difference relative to the largest entry. The reference uses float32."""
  got = results(attend, arrays, fixed, gradients)
  expected = results(reference, [x.astype(np.float32) for x in arrays], fixed, gradients)
  for name, a, b in zip(("out", "log_sum", "d_query", "d_key", "d_value"), jax.tree.leaves(got),
                        jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


def export(attend, platform: str, arrays, fixed, gradients):
  """Lowers the forward and backward passes for an absent platform."""
  def run(arrays, fixed, gradients):
    out, pull = jax.vjp(lambda *arrays: attend(*arrays, *fixed), *arrays)
    return out, pull(gradients)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                        (arrays, fixed, gradients))
  return jax.export.export(jax.jit(run), platforms=[platform])(*shapes).mlir_module()
