"""Layers: their handwritten backward passes equal autodiff of the plain form."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitcompact import convolution, layers
from vitcompact.count import macs_of
from vitcompact.methods.ffn import branch_norms
from vitcompact.train import sharding


def plain_gelu(x):
  return jax.nn.gelu(x, approximate=False)


def plain_linear(x, kernel, bias):
  return jnp.einsum("...m,mk->...k", x, kernel) + bias[None, None]


def plain_layer_norm(x, scale, bias):
  norm = nn.LayerNorm(epsilon=1e-3, use_fast_variance=False)
  return norm.apply({"params": {"scale": scale, "bias": bias}}, x)


def plain_batch_norms(z_nk, gamma_br, beta_br):
  z_nbr = z_nk.reshape(-1, *gamma_br.shape)
  mean, var = z_nbr.mean(0, keepdims=True), z_nbr.var(0, keepdims=True)
  normed = (z_nbr - mean) / jnp.sqrt(var + branch_norms.EPSILON)
  return (normed * gamma_br[None] + beta_br[None]).sum(1)


PAIRS = {
    "gelu": (layers.gelu, plain_gelu, [(2, 5, 6)]),
    "linear, wider": (layers.linear, plain_linear, [(2, 5, 4), (4, 6), (6,)]),
    "linear, narrower": (layers.linear, plain_linear, [(2, 5, 6), (6, 4), (4,)]),
    "layer_norm": (lambda *a: layers.layer_norm(*a, 1e-3), plain_layer_norm,
                   [(2, 5, 6), (6,), (6,)]),
    "batch_norms": (lambda *a: branch_norms.batch_norms(*a)[0], plain_batch_norms,
                    [(9, 8), (2, 4), (2, 4)]),
}


def value_and_gradients(function, arrays):
  """Returns the value, and the gradients of a sum that weights every output differently."""
  def total(*arrays):
    y = function(*arrays)
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y * weights), y
  grads, y = jax.jit(jax.grad(total, argnums=range(len(arrays)), has_aux=True))(*arrays)
  return y, *grads


def drawn(shapes, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return [(2 * rng.standard_normal(shape) + 0.5).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_match_the_plain_form(name):
  ours, plain, shapes = PAIRS[name]
  arrays = drawn(shapes)
  for got, expected in zip(value_and_gradients(ours, arrays), value_and_gradients(plain, arrays),
                           strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_keeps_its_dtype_and_stays_close(name):
  ours, plain, shapes = PAIRS[name]
  arrays = drawn(shapes, jnp.bfloat16)
  wide = value_and_gradients(plain, [array.astype(jnp.float32) for array in arrays])
  for got, expected in zip(value_and_gradients(ours, arrays), wide, strict=True):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0.03,
                               atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("name", PAIRS)
def test_backward_passes_work_under_vmap_scan_and_remat(name):
  ours, _, (shape, *rest) = PAIRS[name]
  x, *params = drawn([(3, *shape), *rest])
  expected = np.stack([value_and_gradients(ours, [part, *params])[1] for part in x])

  def gradient(x):
    return value_and_gradients(jax.checkpoint(ours), [x, *params])[1]

  together, scanned = jax.jit(lambda x: (jax.vmap(gradient)(x), jax.lax.map(gradient, x)))(x)
  np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)


def test_a_linear_layer_needs_no_bias():
  x, kernel, bias = drawn([(2, 5, 4), (4, 6), (6,)])
  y, dx, dkernel = value_and_gradients(layers.linear, [x, kernel])
  expected, *grads = value_and_gradients(plain_linear, [x, kernel, np.zeros_like(bias)])
  for got, want in zip((y, dx, dkernel), (expected, *grads[:2]), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_an_ffn_step_has_three_products_per_forward_product():
  mlp = layers.Mlp(layers.dense(16, dtype="float32"), layers.dense(4, dtype="float32"))
  x = np.ones((2, 3, 4), np.float32)
  params = jax.eval_shape(mlp.init, jax.random.key(0), x)

  def loss(params, x):
    return jnp.sum(mlp.apply(params, x) ** 2)

  assert macs_of(mlp.apply, params, x).total == 2 * 3 * 4 * 16 * 2
  assert macs_of(jax.grad(loss, argnums=(0, 1)), params, x).total == 3 * 2 * 3 * 4 * 16 * 2


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("groups, features, stride", [(2, 6, 1), (8, 8, 2), (8, 16, 1)])
def test_gradients_of_grouped_convolutions_are_right_on_several_devices(
    mesh, groups, features, stride):
  x, kernel = drawn([(8, 5, 6, 8), (3, 3, 8 // groups, features)])

  def gradients(conv, placed=lambda x: x):
    layer = nn.Conv(features, (3, 3), stride, padding=1, feature_group_count=groups,
                    use_bias=False, conv_general_dilated=conv)

    def total(kernel, x):
      return jnp.sum(jnp.sin(layer.apply({"params": {"kernel": kernel}}, x)))

    return jax.jit(jax.grad(total, argnums=(0, 1)))(kernel, placed(x))

  expected = gradients(None)
  if mesh is None:
    got = gradients(convolution.grouped_conv)
  else:
    mesh = sharding.make_mesh(mesh)
    got = gradients(convolution.grouped_conv, lambda x: jax.device_put(x, sharding.batches(mesh)))
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_dense_layer_and_its_norm_fold_into_one_layer_and_unfold():
  x, = drawn([(4, 3, 6)])
  layer = layers.DenseNorm(5)
  stats, params = tiny.randomised(jax.eval_shape(layer.init, jax.random.key(0), x)).values()

  @jax.jit
  def run(params, stats):
    folded = layers.fold_dense_norm(params, stats)
    again = layers.unfold_dense_norm(params, stats, **folded)
    outputs = [layer.apply({"params": own, "batch_stats": stats}, x) for own in (params, again)]
    return folded, *outputs, layers.DenseNorm(5, deploy=True).apply({"params": folded}, x)

  folded, expected, again, deployed = run(params, stats)
  np.testing.assert_allclose(deployed, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-5)
  assert layers.fold_dense_norm(folded, {}) is folded
