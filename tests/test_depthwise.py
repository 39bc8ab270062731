"""The depthwise convolution of tokens equals a convolution, and so do its gradients."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitcompact import attention
from vitcompact.attention import Device
from vitcompact.count import macs_of
from vitcompact.depthwise import Depthwise, GateConv, LocalConv, depthwise, over_grid


def convolution(map_bhwc, kernel_kk1c):
  around = kernel_kk1c.shape[0] // 2
  return jax.lax.conv_general_dilated(
      map_bhwc, kernel_kk1c, (1, 1), [(around, around)] * 2,
      feature_group_count=map_bhwc.shape[-1], dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("device", [Device("cpu"), Device("gpu")])
@pytest.mark.parametrize("size", [3, 5])
def test_outputs_and_gradients_are_those_of_a_convolution(size, device):
  arrays = tiny.normal(2, 4, 7, 3), tiny.normal(size, size, 1, 3, seed=1)

  def run(function):
    def loss(*arrays):
      out = function(*arrays)
      return jnp.sum(jnp.sin(out)), out
    with attention.on(device):
      return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*arrays)

  jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=1e-5),
               run(depthwise), run(convolution))


def test_in_exported_graphs_it_is_one_convolution_of_the_same_cost():
  arrays = tiny.normal(1, 4, 6, 3), tiny.normal(5, 5, 1, 3, seed=1)
  with attention.using("plain"):
    out = jax.jit(lambda *arrays: depthwise(*arrays))(*arrays)
    graph = str(jax.make_jaxpr(depthwise)(*arrays))
  assert graph.count("conv_general_dilated[") == 1 and "scan" not in graph
  np.testing.assert_allclose(out, jax.jit(lambda *arrays: depthwise(*arrays))(*arrays),
                             atol=1e-5)
  assert macs_of(depthwise, *arrays).total == macs_of(convolution, *arrays).total == 25 * 72


def test_prefix_tokens_are_outside_the_grid_and_get_zeros():
  layer = LocalConv((4, 6), 3, nn.initializers.normal(1.0), prefix=2)
  tokens = tiny.normal(2, 26, 3, seed=1)
  variables = jax.device_get(jax.jit(layer.init)(jax.random.key(0), tokens))
  out = np.asarray(jax.jit(layer.apply)(variables, tokens))
  assert not out[:, :2].any()
  kernel, bias = (variables["params"][name] for name in ("kernel", "bias"))
  expected = np.asarray(jax.jit(convolution)(tokens[:, 2:].reshape(2, 4, 6, 3), kernel)) + bias
  np.testing.assert_allclose(out[:, 2:].reshape(2, 4, 6, 3), expected, atol=1e-6)
  half = jax.jit(layer.clone(dtype="bfloat16").apply)(variables, tokens)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(half, np.float32), out, atol=0.05)


def test_missing_tokens_count_as_zeros():
  conv = Depthwise(3, nn.initializers.normal(1.0))
  tokens, places = tiny.normal(2, 5, 3), np.array([[0, 7, 23, 4, 5], [9, 1, 2, 3, 11]])
  variables = jax.jit(conv.init)(jax.random.key(0), tiny.normal(2, 4, 6, 3))
  apply = functools.partial(conv.apply, variables)
  got = jax.jit(lambda tokens, places: over_grid(apply, tokens, (4, 6), places))(tokens, places)
  whole = np.zeros((2, 24, 3), np.float32)
  for image in range(2):
    whole[image, places[image]] = tokens[image]
  expected = np.reshape(jax.jit(apply)(whole.reshape(2, 4, 6, 3)), (2, 24, 3))
  for image in range(2):
    np.testing.assert_allclose(np.asarray(got)[image], expected[image, places[image]], atol=1e-6)


def test_only_the_gate_of_patch_tokens_is_convolved():
  layer = GateConv((2, 3), prefix=1)
  x = tiny.normal(2, 7, 8)
  variables = tiny.randomised(jax.eval_shape(layer.init, jax.random.key(0), x))
  apply = jax.jit(layer.apply)
  out = np.asarray(apply(variables, x))
  np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
  np.testing.assert_array_equal(out[:, :1], x[:, :1])
  conv = jax.device_get(variables["params"]["conv"])
  expected = np.asarray(jax.jit(convolution)(
      x[:, 1:, :4].reshape(2, 2, 3, 4), conv["kernel"])).reshape(2, 6, 4)
  np.testing.assert_allclose(out[:, 1:, :4], expected + conv["bias"], atol=1e-5)
  places = np.array([[0, 2, 5], [0, 1, 3]])
  kept = np.take_along_axis(x, places[..., None], axis=1)
  whole = np.zeros_like(x)
  np.put_along_axis(whole, places[..., None], kept, axis=1)
  np.testing.assert_allclose(
      apply(variables, kept, places),
      np.take_along_axis(np.asarray(apply(variables, whole)), places[..., None], axis=1),
      atol=1e-5)
