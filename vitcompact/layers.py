"""Layers every backbone shares: maths as functions, modules thin."""
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.trees import Leaf

# Truncated at +-2 absolute, a normal of this spread is never cut (timm's trunc_normal_).
weight_init = nn.initializers.normal(0.02)

# The variance as E[(x - E x)^2]: the fast form loses digits when the mean is large.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)
BATCH_EPSILON = 1e-5
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=BATCH_EPSILON,
                              use_fast_variance=False)

LEAVES = [
    (r".*/(query|key|value)/kernel", Leaf(("embed", "heads", None), decay=True)),
    (r".*/out/kernel", Leaf(("heads", None, "embed"), decay=True)),
    (r".*/fc1/kernel", Leaf(("embed", "mlp"), decay=True)),
    (r".*/fc2/kernel", Leaf(("mlp", "embed"), decay=True)),
    (r"(.*/)?(bias|scale)", Leaf()),
]


def gelu(x):
  """x Phi(x), the exact form: through erf, which XLA:CPU runs faster than jax.nn's erfc."""
  return 0.5 * x * (1 + jax.lax.erf(x * 2 ** -0.5))


def fan_in_uniform(fan_in: int):
  """torch's default for convolutions, weight and bias alike: uniform in +-1/sqrt(fan_in)."""
  bound = fan_in ** -0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
      key, shape, dtype, minval=-bound, maxval=bound)


def dense(features: int, *, dtype, use_bias: bool = True) -> nn.Dense:
  """A Dense with the ViT's init, not yet bound to a parent."""
  return nn.Dense(features, use_bias=use_bias, kernel_init=weight_init, dtype=dtype, parent=None)


class DropPath(nn.Module):
  """Stochastic depth: drops a residual branch for a sample, scales the kept ones by 1/(1-rate)."""
  rate: float

  @nn.compact
  def __call__(self, x, train: bool = False):
    if not train or self.rate == 0:
      return x
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate,
                                (x.shape[0],) + (1,) * (x.ndim - 1))
    return x * (keep / (1 - self.rate)).astype(x.dtype)


class PatchEmbed(nn.Module):
  """Non-overlapping patches to tokens: (B, H, W, C) -> (B, H/p, W/p, width)."""
  width: int
  patch_size: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, images_bhwc):
    init = fan_in_uniform(self.patch_size ** 2 * images_bhwc.shape[-1])
    size = (self.patch_size, self.patch_size)
    return nn.Conv(self.width, size, strides=size, padding="VALID", kernel_init=init,
                   bias_init=init, dtype=self.dtype, name="proj")(images_bhwc)


class ConvNorm(nn.Module):
  """k x k convolution and batch norm; deployed, one convolution with a bias: see `fold_conv_norm`.

  Padded by k // 2 on every side, as PyTorch does; "SAME" would not be symmetric at stride 2.
  """
  features: int
  kernel_size: int
  stride: int = 1
  groups: int = 1
  kernel_init: Callable = weight_init
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    x_bhwc = nn.Conv(
        self.features, (self.kernel_size,) * 2, strides=self.stride, padding=self.kernel_size // 2,
        feature_group_count=self.groups, use_bias=self.deploy, kernel_init=self.kernel_init,
        dtype=self.dtype, name="conv")(x_bhwc)
    if self.deploy:
      return x_bhwc
    return BatchNorm(dtype=self.dtype, name="norm")(x_bhwc, use_running_average=not train)


def batch_affine(params, stats):
  """scale, shift (C,) of the affine map that a batch norm is in inference."""
  scale = params["scale"] / jnp.sqrt(stats["var"] + BATCH_EPSILON)
  return scale, params["bias"] - stats["mean"] * scale


def fold_conv_norm(params, stats):
  """Parameters of the deployed ConvNorm."""
  scale, shift = batch_affine(params["norm"], stats["norm"])
  kernel = params["conv"]["kernel"]
  return {"conv": {"kernel": kernel * scale.reshape((1,) * (kernel.ndim - 1) + (-1,)),
                   "bias": shift}}


def fold_into_linear(params, scale_c, shift_c):
  """Parameters with which a linear layer gives for x what it gave for x * scale + shift.

  params: kernel (C, ...), bias or none; the result always has a bias.
  """
  kernel = params["kernel"]
  bias = jnp.tensordot(shift_c, kernel, axes=1, precision=jax.lax.Precision.HIGHEST)
  return {"kernel": kernel * scale_c.reshape((-1,) + (1,) * (kernel.ndim - 1)),
          "bias": bias + params["bias"] if "bias" in params else bias}


class Mlp(nn.Module):
  """fc2(act(mixer(fc1 x))): each fc a dense layer or a factorised one; no mixer is the identity."""
  fc1: nn.Module
  fc2: nn.Module
  act: Callable = gelu
  mixer: nn.Module | None = None

  def __call__(self, x, train: bool = False):
    hidden = apply_linear(self.fc1, x, train)
    if self.mixer is not None:
      hidden = self.mixer(hidden)
    return apply_linear(self.fc2, self.act(hidden), train)


def apply_linear(linear: nn.Module, x, train: bool):
  """nn.Dense knows no train mode; layers that a plan puts in its place do."""
  return linear(x) if isinstance(linear, nn.Dense) else linear(x, train)
