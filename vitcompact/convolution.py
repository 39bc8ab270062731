"""Grouped convolutions whose gradients are correct on every mesh of devices."""
import jax
import jax.numpy as jnp

from vitcompact.depthwise import depthwise


def grouped_conv(x_bhwc, kernel, strides, padding, **fields):
  """Grouped `jax.lax.conv_general_dilated`, with the arguments that flax's Conv passes.

  The kernel's gradient is computed tap by tap: if several devices compute the same images (mesh
  axis "tensor"), the partitioner of jax 0.10 adds XLA's own gradient once for each of them. On a
  CPU it is also faster.
  """
  groups, (height, width, inner, features) = fields["feature_group_count"], kernel.shape
  centred = [(side // 2, side // 2) for side in (height, width)]
  if (inner == 1 and groups == features and height == width and height % 2 and
      set(strides) == {1} and list(map(tuple, padding)) == centred):
    return depthwise(x_bhwc, kernel)

  def plain(x_bhwc, kernel):
    return jax.lax.conv_general_dilated(x_bhwc, kernel, strides, padding, **fields)

  def backward(saved, dy):
    x_bhwc, kernel = saved
    dx = jax.linear_transpose(lambda x: plain(x, kernel), x_bhwc)(dy)[0]
    dkernel = _kernel_gradient(x_bhwc, dy, kernel.shape, strides, padding, groups)
    return dx, dkernel.astype(kernel.dtype)

  conv = jax.custom_vjp(plain)
  conv.defvjp(lambda x, kernel: (plain(x, kernel), (x, kernel)), backward)
  return conv(x_bhwc, kernel)


def _kernel_gradient(x_bhwc, dy, shape, strides, padding, groups: int):
  """Returns the gradient of a convolution's kernel of this shape, float32."""
  height, width, _, features = shape
  x_bhwc = jnp.pad(x_bhwc, ((0, 0), *padding, (0, 0)))
  (batch, rows, columns, _), (down, right) = dy.shape, strides
  taps = []
  for i in range(height):
    for j in range(width):
      stop = (batch, i + (rows - 1) * down + 1, j + (columns - 1) * right + 1, x_bhwc.shape[-1])
      inputs = jax.lax.slice(x_bhwc, (0, i, j, 0), stop, (1, down, right, 1))
      if groups == features == x_bhwc.shape[-1]:   # a product of matrices this small costs more
        taps.append((inputs.astype(jnp.float32) * dy.astype(jnp.float32)).sum(axis=(0, 1, 2)))
      else:
        inputs, grouped_dy = (z.reshape(*z.shape[:3], groups, -1) for z in (inputs, dy))
        taps.append(jnp.einsum("bhwgi,bhwgo->igo", inputs, grouped_dy,
                               preferred_element_type=jnp.float32))
  return jnp.stack(taps).reshape(shape)
