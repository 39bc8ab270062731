"""Depthwise convolution, over maps and over the tokens of a grid."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.lax import optimization_barrier

from vitcompact import attention
from vitcompact.tracing import param

# A name scope in which `count` counts the shifted multiply-adds of filters as MACs.
SHIFT_AND_ADD = "vitcompact.shift_and_add"


@jax.custom_vjp
def depthwise(map_bhwc, kernel_kk1c):
  """k x k correlation of each channel, zero-padded: (B, H, W, C) -> (B, H, W, C).

  On a CPU it is computed by shifted multiply-adds, summed in float32: XLA's depthwise convolution
  takes ten to thirty times as long. Accelerators and other runtimes, which have kernels for it, get
  a convolution.
  """
  return _correlate(map_bhwc, kernel_kk1c)


def _correlate(map_bhwc, kernel_kk1c):
  size, (_, height, width, channels) = kernel_kk1c.shape[0], map_bhwc.shape
  if attention.current().platform != "cpu" or attention.portable():
    return jax.lax.conv_general_dilated(
        map_bhwc, kernel_kk1c.astype(map_bhwc.dtype), (1, 1), [(size // 2, size // 2)] * 2,
        feature_group_count=channels, dimension_numbers=("NHWC", "HWIO", "NHWC"))
  # The barrier makes XLA pad once instead of once for each tap.
  padded = optimization_barrier(_pad(map_bhwc, size // 2))
  kernel_kk1c = kernel_kk1c.astype(jnp.float32)
  with jax.named_scope(SHIFT_AND_ADD):
    out = sum(padded[:, i:i + height, j:j + width] * kernel_kk1c[i, j, 0][None, None, None]
              for i in range(size) for j in range(size))
  return out.astype(map_bhwc.dtype)


def _pad(map_bhwc, margin: int):
  return jnp.pad(map_bhwc, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def _backward(saved, dy_bhwc):
  map_bhwc, kernel_kk1c = saved
  dy_bhwc = optimization_barrier(dy_bhwc)
  dmap_bhwc = _correlate(dy_bhwc, kernel_kk1c[::-1, ::-1])
  dkernel = _kernel_gradient(map_bhwc, dy_bhwc, kernel_kk1c.shape[0])
  return dmap_bhwc, dkernel.reshape(kernel_kk1c.shape).astype(kernel_kk1c.dtype)


def _kernel_gradient(map_bhwc, dy_bhwc, size: int):
  """Returns (k k, C) float32: for each tap, the sum of products of the shifted map and dy."""
  batch, height, width, channels = map_bhwc.shape
  wide, dy_bhwc = (x.astype(jnp.float32) for x in (map_bhwc, dy_bhwc))
  padded, taps = _pad(wide, size // 2), [(i, j) for i in range(size) for j in range(size)]
  if not attention.loops_over_images():
    return jnp.stack([(padded[:, i:i + height, j:j + width] * dy_bhwc).sum(axis=(0, 1, 2))
                      for i, j in taps])

  def line(sums_bwc, row):
    """Line by line, the sums of all taps stay in the cache: it takes a sixth of the time."""
    rows = jax.lax.dynamic_slice_in_dim(padded, row, size, axis=1)
    dy_bwc = jax.lax.dynamic_index_in_dim(dy_bhwc, row, axis=1, keepdims=False)
    return [total + rows[:, i, j:j + width] * dy_bwc
            for total, (i, j) in zip(sums_bwc, taps, strict=True)], None

  zeros = [jnp.zeros((batch, width, channels))] * len(taps)
  sums, _ = jax.lax.scan(line, zeros, jnp.arange(height))
  return jnp.stack([total.sum(axis=(0, 1)) for total in sums])


depthwise.defvjp(lambda map_bhwc, kernel_kk1c: (depthwise(map_bhwc, kernel_kk1c),
                                                (map_bhwc, kernel_kk1c)), _backward)


class Depthwise(nn.Module):
  """Depthwise size x size convolution with a bias, zero-padded: (B, H, W, C) -> (B, H, W, C), the
  same as an nn.Conv. Leaves: kernel (size, size, 1, C) and bias (C,)."""
  size: int
  kernel_init: Callable
  bias_init: Callable = nn.initializers.zeros
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc):
    channels = x_bhwc.shape[-1]
    kernel = param(self, "kernel", self.kernel_init, (self.size, self.size, 1, channels))
    bias = param(self, "bias", self.bias_init, (channels,))
    x_bhwc, kernel, bias = promote_dtype(x_bhwc, kernel, bias, dtype=self.dtype)
    return depthwise(x_bhwc, kernel) + bias[None, None, None]


def over_grid(conv: Callable, tokens_bnc, grid: tuple[int, int], places_bk=None):
  """Applies `conv`, a function of maps, to the tokens (B, N, C) of a grid.

  places_bk: the places of tokens (B, k, C), if these are only some of the grid; the others count as
  0, and only these are returned.
  """
  if places_bk is None:
    map_bhwc = tokens_bnc.reshape(tokens_bnc.shape[0], *grid, tokens_bnc.shape[-1])
    return jax.lax.collapse(conv(map_bhwc), 1, 3)
  all_bnc = scatter(tokens_bnc, grid[0] * grid[1], places_bk)
  return jnp.take_along_axis(over_grid(conv, all_bnc, grid), places_bk[..., None], axis=1)


def scatter(tokens_bkc, count: int, places_bk):
  """Returns (B, count, C): the tokens at their places, zeros elsewhere."""
  empty_bnc = jnp.zeros((tokens_bkc.shape[0], count, tokens_bkc.shape[-1]), tokens_bkc.dtype)
  return empty_bnc.at[jnp.arange(tokens_bkc.shape[0])[:, None], places_bk].set(tokens_bkc)


class LocalConv(nn.Module):
  """A `Depthwise` over tokens (B, N, C); the first `prefix` tokens, outside the grid, get zeros.

  kernel_init: initialises both kernel and bias.
  """
  grid: tuple[int, int]
  size: int
  kernel_init: Callable
  prefix: int = 0
  dtype: str = "float32"

  def setup(self):
    self.conv = Depthwise(self.size, self.kernel_init, self.kernel_init, self.dtype)
    nn.share_scope(self, self.conv)

  def __call__(self, tokens_bnc):
    out_bnc = over_grid(self.conv, tokens_bnc[:, self.prefix:], self.grid)
    return jnp.pad(out_bnc, ((0, 0), (self.prefix, 0), (0, 0)))

  def filter_heads(self, heads_bnhd, x_bnw=None):
    """Filters the channels of all heads, (B, N, h, d) -> (B, N, h, d); an `attention.Core.local`.
    """
    del x_bnw
    return self(jax.lax.collapse(heads_bnhd, 2, 4)).reshape(heads_bnhd.shape)


class GateConv(nn.Module):
  """ConvGLU's mixer: a 3 x 3 depthwise convolution of the gate over the grid, with a bias.

  (B, N, 2 m) or (B, H, W, 2 m), the gate first -> the same shape. The value and the `prefix` tokens
  before the grid are unchanged. Shi, arXiv 2311.17132. places: see `over_grid`, but counted over
  all tokens, including the prefix.
  """
  grid: tuple[int, int]
  prefix: int = 0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, places_bk=None):
    gate, value = jnp.split(x, 2, axis=-1)
    conv = Depthwise(3, nn.initializers.normal((2 / 9) ** 0.5), dtype=self.dtype, name="conv")
    gate_bnm = jax.lax.collapse(gate, 1, gate.ndim - 1)
    if places_bk is not None:
      gate_bnm = scatter(gate_bnm, self.prefix + self.grid[0] * self.grid[1], places_bk)
    mixed_bnm = over_grid(conv, gate_bnm[:, self.prefix:], self.grid)
    mixed_bnm = jnp.concatenate([gate_bnm[:, :self.prefix], mixed_bnm], axis=1)
    if places_bk is not None:
      mixed_bnm = jnp.take_along_axis(mixed_bnm, places_bk[..., None], axis=1)
    return jnp.concatenate([mixed_bnm.reshape(value.shape), value], axis=-1)
