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
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, use_fast_variance=False)

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
