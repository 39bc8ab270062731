"""Layers every backbone shares: maths as functions, modules thin."""
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.lax import optimization_barrier

from vitcompact.convolution import grouped_conv
from vitcompact.tracing import param, traced_once
from vitcompact.trees import Leaf

# Truncated at +-2 absolute, a normal of this spread is never cut (timm's trunc_normal_).
weight_init = nn.initializers.normal(0.02)

BATCH_EPSILON = 1e-5
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=BATCH_EPSILON,
                              use_fast_variance=False)

RULES = [
    (r".*/(query|key|value)/kernel", Leaf(("embed", "heads", None), decay=True)),
    (r".*/out/kernel", Leaf(("heads", None, "embed"), decay=True)),
    (r".*/fc1/kernel", Leaf(("embed", "mlp"), decay=True)),
    (r".*/fc2/kernel", Leaf(("mlp", "embed"), decay=True)),
    (r"(.*/)?(bias|scale|gamma)", Leaf()),
]


def nonzero(leaf: str):
  """A name scope: of the products inside, the method needs the share of entries of a parameter that
  are not 0. leaf: its name in the block, with dots, such as "links.up"; `count` reads it."""
  return jax.named_scope(f"vitcompact.nonzero({leaf})")


# The backward passes below are written out, because XLA:CPU fuses what autodiff gives it into every
# consumer: a pointwise chain, back to the last product or sum, then runs once for each of them, and
# through the residual stream that chain grows with depth. A barrier makes it run once. They have no
# forward-mode derivative.


@jax.custom_vjp
def gelu(x):
  """x Phi(x), the exact form: through erf, which XLA:CPU runs faster than jax.nn's erfc."""
  return 0.5 * x * (1 + jax.lax.erf(x * 2 ** -0.5))


def _gelu_backward(x, dy):
  # Not the forward pass' erf: keeping it costs more memory, and time, than computing it.
  wide = optimization_barrier(x).astype(jnp.float32)
  density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
  slope = 0.5 * (1 + jax.lax.erf(wide * 2 ** -0.5)) + wide * density
  return (dy * slope.astype(dy.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
gelu = traced_once(gelu)


def gelu_tanh(x):
  """GELU's approximation by a tanh, as some SigLIP models were trained with."""
  return jax.nn.gelu(x, approximate=True)


def quick_gelu(x):
  """x sigmoid(1.702 x): GELU as OpenAI's CLIP was trained with."""
  return x * jax.nn.sigmoid(1.702 * x)


def _gated(act: Callable, x):
  gate, value = jnp.split(x, 2, axis=-1)
  return act(gate) * value


def glu(x):
  """sigmoid(gate) * value of (..., 2 m), the gate first: (..., m). Dauphin et al., 1612.08083."""
  return _gated(jax.nn.sigmoid, x)


def geglu(x):
  """gelu(gate) * value. Shazeer, arXiv 2002.05202."""
  return _gated(gelu, x)


def swiglu(x):
  """silu(gate) * value. Shazeer, arXiv 2002.05202."""
  return _gated(jax.nn.silu, x)


def reglu(x):
  """relu(gate) * value. Shazeer, arXiv 2002.05202."""
  return _gated(nn.relu, x)


def bilinear(x):
  """gate * value. Shazeer, arXiv 2002.05202."""
  return _gated(lambda gate: gate, x)


# Of an FFN's hidden layer, by name. Gated ones take twice as many inputs as they give.
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "swiglu": swiglu}
# Gated ones by the activation of the gate.
GATES = {"sigmoid": glu, "gelu": geglu, "silu": swiglu, "relu": reglu, "identity": bilinear}
GATED = tuple(GATES.values())


@jax.custom_vjp
def linear(x, kernel_mk, bias_k=None):
  """x W + b over the last axis: (..., m) -> (..., k), as one product of two matrices."""
  y_nk = x.reshape(-1, x.shape[-1]) @ kernel_mk
  y_nk = y_nk if bias_k is None else y_nk + bias_k[None]
  return y_nk.reshape(*x.shape[:-1], kernel_mk.shape[1])


def _linear_forward(x, kernel_mk, bias_k=None):
  return linear(x, kernel_mk, bias_k), (x, kernel_mk, bias_k)


def _linear_backward(saved, dy):
  x, kernel_mk, bias_k = saved
  dy_nk = optimization_barrier(dy).reshape(-1, dy.shape[-1])
  x_nm = x.reshape(-1, x.shape[-1])
  if kernel_mk.shape[0] > kernel_mk.shape[1]:
    # XLA:CPU multiplies faster when it is the narrow matrix that it has to transpose.
    dkernel_mk = optimization_barrier(dy_nk.T @ x_nm).T
  else:
    dkernel_mk = x_nm.T @ dy_nk
  dbias_k = None if bias_k is None else dy_nk.sum(axis=0)
  return (dy_nk @ kernel_mk.T).reshape(x.shape), dkernel_mk, dbias_k


linear.defvjp(_linear_forward, _linear_backward)
linear = traced_once(linear)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale_c, bias_c, epsilon: float):
  """(x - mean) / sqrt(var + epsilon) * scale + bias over the last axis, computed in float32.

  The variance is E[(x - E x)^2]: E[x^2] - (E x)^2 loses digits when the mean is large.
  """
  return _layer_norm_forward(x, scale_c, bias_c, epsilon)[0]


def _along_last_axis(vector_c, x):
  """A float32 vector over the last axis, shaped to go with x."""
  return vector_c.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def _layer_norm_forward(x, scale_c, bias_c, epsilon):
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  centred = wide - mean
  inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
  y = centred * (inverse * _along_last_axis(scale_c, x)) + _along_last_axis(bias_c, x)
  return y.astype(x.dtype), (x, scale_c, mean, inverse)


def _layer_norm_backward(epsilon, saved, dy):
  del epsilon
  x, scale_c, mean, inverse = saved
  normed, dy_wide = (x.astype(jnp.float32) - mean) * inverse, dy.astype(jnp.float32)
  dnormed = dy_wide * _along_last_axis(scale_c, x)
  dx = inverse * (dnormed - dnormed.mean(axis=-1, keepdims=True) -
                  normed * (dnormed * normed).mean(axis=-1, keepdims=True))
  tokens = tuple(range(x.ndim - 1))
  return (dx.astype(x.dtype), (dy_wide * normed).sum(axis=tokens).astype(scale_c.dtype),
          dy_wide.sum(axis=tokens).astype(scale_c.dtype))


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
layer_norm = traced_once(layer_norm, static_argnames="epsilon")


def fan_in_uniform(fan_in: int):
  """torch's default for convolutions, weight and bias alike: uniform in +-1/sqrt(fan_in)."""
  bound = fan_in ** -0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
      key, shape, dtype, minval=-bound, maxval=bound)


# The same for the weights of layers without a bias, whatever their fan-in.
torch_conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LayerNorm(nn.Module):
  """`layer_norm` with its scale and bias; the result has `dtype`."""
  epsilon: float
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    scale = param(self, "scale", nn.initializers.ones, (x.shape[-1],))
    bias = param(self, "bias", nn.initializers.zeros, (x.shape[-1],))
    return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class LayerScale(nn.Module):
  """x * gamma: a residual branch's output, each channel by a factor that is learned.

  Touvron et al., arXiv 2103.17239.
  """
  initial: float

  @nn.compact
  def __call__(self, x):
    gamma = param(self, "gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
    return x * _along_last_axis(gamma, x).astype(x.dtype)


class Dense(nn.Dense):
  """nn.Dense with the backward pass of `linear`."""

  @nn.compact
  def __call__(self, x):
    kernel = param(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
    bias = param(self, "bias", self.bias_init, (self.features,), self.param_dtype) \
        if self.use_bias else None
    return linear(*promote_dtype(x, kernel, bias, dtype=self.dtype))


def dense(features: int, *, dtype, use_bias: bool = True) -> Dense:
  """A Dense with the ViT's init, not yet bound to a parent."""
  return Dense(features, use_bias=use_bias, kernel_init=weight_init, dtype=dtype, parent=None)


class ToHeads(nn.Module):
  """nn.DenseGeneral to heads, with the backward pass of `linear`: (..., w) -> (..., heads, d)."""
  heads: int
  head_width: int
  use_bias: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    shape = (self.heads, self.head_width)
    kernel = param(self, "kernel", weight_init, (x.shape[-1], *shape))
    bias = param(self, "bias", nn.initializers.zeros, shape) if self.use_bias else None
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    bias = None if bias is None else bias.reshape(-1)
    return linear(x, kernel.reshape(x.shape[-1], -1), bias).reshape(*x.shape[:-1], *shape)


class FromHeads(nn.Module):
  """nn.DenseGeneral over heads, with the backward pass of `linear`: (..., heads, d) -> (..., w)."""
  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    kernel = param(self, "kernel", weight_init, (*x.shape[-2:], self.width))
    bias = param(self, "bias", nn.initializers.zeros, (self.width,))
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    return linear(jax.lax.collapse(x, x.ndim - 2), kernel.reshape(-1, self.width), bias)


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
  use_bias: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, images_bhwc):
    init = fan_in_uniform(self.patch_size ** 2 * images_bhwc.shape[-1])
    size = (self.patch_size, self.patch_size)
    return nn.Conv(self.width, size, strides=size, padding="VALID", use_bias=self.use_bias,
                   kernel_init=init, bias_init=init, dtype=self.dtype, name="proj")(images_bhwc)


class ConvNorm(nn.Module):
  """k x k convolution and batch norm; deployed, one convolution with a bias: see `fold_conv_norm`.

  Padded by k // 2 on every side, as PyTorch does; "SAME" would not be symmetric at stride 2.
  """
  features: int
  kernel_size: int
  stride: int = 1
  groups: int = 1
  kernel_init: Callable = weight_init
  scale_init: Callable = nn.initializers.ones
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    x_bhwc = nn.Conv(
        self.features, (self.kernel_size,) * 2, strides=self.stride, padding=self.kernel_size // 2,
        feature_group_count=self.groups, use_bias=self.deploy, kernel_init=self.kernel_init,
        conv_general_dilated=grouped_conv if self.groups > 1 else None, dtype=self.dtype,
        name="conv")(x_bhwc)
    if self.deploy:
      return x_bhwc
    norm = BatchNorm(scale_init=self.scale_init, dtype=self.dtype, name="norm")
    return norm(x_bhwc, use_running_average=not train)


class DenseNorm(nn.Module):
  """x W and batch norm, as a 1x1 `ConvNorm` computes it; deployed, x W + b: see `fold_dense_norm`.

  Leaves: kernel (m, features) and those of norm; deployed, kernel and bias.
  """
  features: int
  kernel_init: Callable = weight_init
  scale_init: Callable = nn.initializers.ones
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, train: bool = False):
    kernel, bias = param(self, "kernel", self.kernel_init, (x.shape[-1], self.features)), None
    if self.deploy:
      bias = param(self, "bias", nn.initializers.zeros, (self.features,))
    y = linear(*promote_dtype(x, kernel, bias, dtype=self.dtype))
    if self.deploy:
      return y
    norm = BatchNorm(scale_init=self.scale_init, dtype=self.dtype, name="norm")
    return norm(y, use_running_average=not train)


def batch_affine(params, stats):
  """scale, shift (C,) of the affine map that a batch norm is in inference."""
  scale = params["scale"] / jnp.sqrt(stats["var"] + BATCH_EPSILON)
  return scale, params["bias"] - stats["mean"] * scale


def fold_dense_norm(params, stats):
  """Parameters of the deployed DenseNorm; those of a layer that has no norm stay as they are."""
  if "norm" not in params:
    return params
  scale, shift = batch_affine(params["norm"], stats["norm"])
  kernel = params["kernel"]
  return {"kernel": kernel * scale.reshape((1,) * (kernel.ndim - 1) + (-1,)), "bias": shift}


def unfold_dense_norm(params, stats, kernel, bias):
  """Inverse of `fold_dense_norm`: parameters that compute x W + b with a layer's statistics."""
  if "norm" not in params:
    return {"kernel": kernel, "bias": bias}
  mean, var = stats["norm"]["mean"], stats["norm"]["var"]
  return {"kernel": kernel,
          "norm": {"scale": jnp.sqrt(var + BATCH_EPSILON), "bias": bias + mean}}


def fold_conv_norm(params, stats, skip: bool = False):
  """Parameters of the deployed ConvNorm. skip: of one of odd size, of each channel by itself, whose
  input is added to its output: the centre of its kernel takes that in."""
  conv = fold_dense_norm({**params["conv"], "norm": params["norm"]}, stats)
  if skip:
    centre = conv["kernel"].shape[0] // 2
    conv = {**conv, "kernel": conv["kernel"].at[centre, centre].add(1)}
  return {"conv": conv}


def fold_into_linear(params, scale_c, shift_c):
  """Parameters with which a linear layer gives for x what it gave for x * scale + shift.

  params: kernel (C, ...), bias or none; the result always has a bias.
  """
  kernel = params["kernel"]
  bias = jnp.tensordot(shift_c, kernel, axes=1, precision=jax.lax.Precision.HIGHEST)
  return {"kernel": kernel * scale_c.reshape((-1,) + (1,) * (kernel.ndim - 1)),
          "bias": bias + params["bias"] if "bias" in params else bias}


def ffn_layer(site, name: str) -> nn.Module:
  """The dense layer fc1 or fc2 of the FFN of a `protocol.Site`, not bound to a parent."""
  width = site.fc1_width if name == "fc1" else site.ffn_width
  if site.deploy or not site.ffn_batch_norm:
    return dense(width, dtype=site.dtype)
  # As a residual branch ends in it, it starts as nothing.
  scale_init = nn.initializers.zeros if name == "fc2" else nn.initializers.ones
  return DenseNorm(width, torch_conv_init, scale_init, dtype=site.dtype, parent=None)


class Mlp(nn.Module):
  """fc2(norm(act(mixer(fc1 x)))): each fc a dense layer or a factorised one; no mixer and no norm
  are the identity. A gated act halves what fc1 gives.

  mix: calls the mixer, (mixer, hidden) -> hidden, where x is not all tokens of the grid.
  """
  fc1: nn.Module
  fc2: nn.Module
  act: Callable = gelu
  mixer: nn.Module | None = None
  norm: nn.Module | None = None

  def __call__(self, x, train: bool = False, mix: Callable | None = None):
    hidden = apply_linear(self.fc1, x, train)
    if self.mixer is not None:
      hidden = self.mixer(hidden) if mix is None else mix(self.mixer, hidden)
    hidden = self.act(hidden)
    if self.norm is not None:
      hidden = self.norm(hidden)
    return apply_linear(self.fc2, hidden, train)


def apply_norm(norm: nn.Module | None, x, train: bool):
  """A layer norm knows no train mode; batch norms do. None: x, as the norm is folded."""
  if norm is None:
    return x
  return norm(x, use_running_average=not train) if isinstance(norm, nn.BatchNorm) else norm(x)


def apply_linear(linear: nn.Module, x, train: bool):
  """nn.Dense knows no train mode; layers that a plan puts in its place do."""
  return linear(x) if isinstance(linear, nn.Dense) else linear(x, train)
