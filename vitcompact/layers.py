"""Layers that all backbones share: the maths as functions, and thin modules around them."""
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

# timm's trunc_normal_ cuts at +-2 absolute, which a normal with this std practically never reaches.
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
  """Returns a name scope for `count`: of the products inside, the method needs only those with the
  nonzero entries of a parameter. leaf: its name in the block, with dots, such as "links.up"."""
  return jax.named_scope(f"vitcompact.nonzero({leaf})")


# The backward passes below are written by hand, because XLA:CPU fuses what autodiff produces into
# every consumer: a chain of pointwise operations since the last product or sum then runs once per
# consumer, and in the residual stream that chain grows with depth. A barrier makes it run once.
# They have no forward-mode derivative.


@jax.custom_vjp
def gelu(x):
  """x Phi(x), the exact GELU, using erf, which XLA:CPU runs faster than jax.nn's erfc."""
  return 0.5 * x * (1 + jax.lax.erf(x * 2 ** -0.5))


def _gelu_backward(x, dy):
  # Recomputes erf: saving it from the forward pass costs more memory, and more time.
  wide = optimization_barrier(x).astype(jnp.float32)
  density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
  slope = 0.5 * (1 + jax.lax.erf(wide * 2 ** -0.5)) + wide * density
  return (dy * slope.astype(dy.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
gelu = traced_once(gelu)


def gelu_tanh(x):
  """The tanh approximation of GELU, with which some SigLIP models were trained."""
  return jax.nn.gelu(x, approximate=True)


def quick_gelu(x):
  """x sigmoid(1.702 x): the approximate GELU with which OpenAI's CLIP was trained."""
  return x * jax.nn.sigmoid(1.702 * x)


def _gate(act: Callable, x):
  gate, value = jnp.split(x, 2, axis=-1)
  return act(gate) * value


def glu(x):
  """sigmoid(gate) * value: (..., 2 m), gate first -> (..., m). Dauphin et al., arXiv 1612.08083."""
  return _gate(jax.nn.sigmoid, x)


def geglu(x):
  """gelu(gate) * value. Shazeer, arXiv 2002.05202."""
  return _gate(gelu, x)


def swiglu(x):
  """silu(gate) * value. Shazeer, arXiv 2002.05202."""
  return _gate(jax.nn.silu, x)


def reglu(x):
  """relu(gate) * value. Shazeer, arXiv 2002.05202."""
  return _gate(nn.relu, x)


def bilinear(x):
  """gate * value. Shazeer, arXiv 2002.05202."""
  return _gate(lambda gate: gate, x)


# Activations of an FFN's hidden layer. A gated one takes twice as many inputs as it has outputs.
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "swiglu": swiglu}
# The gated ones, by the activation of their gate.
GATES = {"sigmoid": glu, "gelu": geglu, "silu": swiglu, "relu": reglu, "identity": bilinear}
GATED = tuple(GATES.values())


@jax.custom_vjp
def linear(x, kernel_mk, bias_k=None):
  """x W + b over the last axis, as a single matrix product: (..., m) -> (..., k)."""
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
    # XLA:CPU multiplies faster if the matrix that it transposes is the narrow one.
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
  """Returns the vector in float32, with leading axes of size 1 to match the rank of x."""
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
  """Returns PyTorch's default initialiser of convolutions and biases: uniform in +-1/sqrt(fan_in).
  """
  bound = fan_in ** -0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
      key, shape, dtype, minval=-bound, maxval=bound)


# The same for weights alone, with the fan-in taken from their shape.
torch_conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LayerNorm(nn.Module):
  """`layer_norm` with a learned scale and bias; the output has `dtype`."""
  epsilon: float
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    scale = param(self, "scale", nn.initializers.ones, (x.shape[-1],))
    bias = param(self, "bias", nn.initializers.zeros, (x.shape[-1],))
    return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class LayerScale(nn.Module):
  """x * gamma: scales each channel of a residual branch's output by a learned factor.

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
  """Makes a Dense with the ViT's init, not bound to a parent."""
  return Dense(features, use_bias=use_bias, kernel_init=weight_init, dtype=dtype, parent=None)


class ToHeads(nn.Module):
  """Splits into heads, (..., w) -> (..., heads, d): nn.DenseGeneral with `linear`'s backward pass.
  """
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
  """Joins heads, (..., heads, d) -> (..., w): nn.DenseGeneral with `linear`'s backward pass."""
  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    kernel = param(self, "kernel", weight_init, (*x.shape[-2:], self.width))
    bias = param(self, "bias", nn.initializers.zeros, (self.width,))
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    return linear(jax.lax.collapse(x, x.ndim - 2), kernel.reshape(-1, self.width), bias)


class DropPath(nn.Module):
  """Stochastic depth: drops a residual branch for random samples, and scales the others by
  1 / (1 - rate)."""
  rate: float

  @nn.compact
  def __call__(self, x, train: bool = False):
    if not train or self.rate == 0:
      return x
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate,
                                (x.shape[0],) + (1,) * (x.ndim - 1))
    return x * (keep / (1 - self.rate)).astype(x.dtype)


class PatchEmbed(nn.Module):
  """Embeds non-overlapping patches as tokens: (B, H, W, C) -> (B, H/p, W/p, width)."""
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
  """k x k convolution and batch norm; when deployed, one convolution with a bias, see
  `fold_conv_norm`.

  Pads by k // 2 on every side, as PyTorch does; "SAME" would not be symmetric at stride 2.
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
  """x W and batch norm, the same as a 1x1 `ConvNorm`; when deployed, x W + b, see
  `fold_dense_norm`.

  Leaves: kernel (m, features) and those of norm; when deployed, kernel and bias.
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
  """Returns scale, shift (C,): the affine map that a batch norm computes in inference."""
  scale = params["scale"] / jnp.sqrt(stats["var"] + BATCH_EPSILON)
  return scale, params["bias"] - stats["mean"] * scale


def fold_dense_norm(params, stats):
  """Returns the parameters of the deployed DenseNorm; those of a layer without a norm unchanged."""
  if "norm" not in params:
    return params
  scale, shift = batch_affine(params["norm"], stats["norm"])
  kernel = params["kernel"]
  return {"kernel": kernel * scale.reshape((1,) * (kernel.ndim - 1) + (-1,)), "bias": shift}


def unfold_dense_norm(params, stats, kernel, bias):
  """Inverse of `fold_dense_norm`: returns parameters that, with a layer's statistics, compute
  x W + b."""
  if "norm" not in params:
    return {"kernel": kernel, "bias": bias}
  mean, var = stats["norm"]["mean"], stats["norm"]["var"]
  return {"kernel": kernel,
          "norm": {"scale": jnp.sqrt(var + BATCH_EPSILON), "bias": bias + mean}}


def fold_conv_norm(params, stats, skip: bool = False):
  """Returns the parameters of the deployed ConvNorm. skip: also folds the addition of the input to
  the output into the centre of the kernel, which must be depthwise and of odd size."""
  conv = fold_dense_norm({**params["conv"], "norm": params["norm"]}, stats)
  if skip:
    centre = conv["kernel"].shape[0] // 2
    conv = {**conv, "kernel": conv["kernel"].at[centre, centre].add(1)}
  return {"conv": conv}


def fold_into_linear(params, scale_c, shift_c):
  """Folds x * scale + shift into the linear layer after it, and returns that layer's parameters.

  params: kernel (C, ...), with or without a bias; the result always has a bias.
  """
  kernel = params["kernel"]
  bias = jnp.tensordot(shift_c, kernel, axes=1, precision=jax.lax.Precision.HIGHEST)
  return {"kernel": kernel * scale_c.reshape((-1,) + (1,) * (kernel.ndim - 1)),
          "bias": bias + params["bias"] if "bias" in params else bias}


def ffn_layer(site, name: str) -> nn.Module:
  """Makes the dense layer fc1 or fc2 of the FFN of a `protocol.Site`, not bound to a parent."""
  width = site.fc1_width if name == "fc1" else site.ffn_width
  if site.deploy or not site.ffn_batch_norm:
    return dense(width, dtype=site.dtype)
  # A residual branch that ends in a batch norm starts at zero.
  scale_init = nn.initializers.zeros if name == "fc2" else nn.initializers.ones
  return DenseNorm(width, torch_conv_init, scale_init, dtype=site.dtype, parent=None)


class Mlp(nn.Module):
  """fc2(norm(act(mixer(fc1 x)))). fc1 and fc2 are dense or factorised; mixer and norm may be None.
  A gated act halves the channels.

  mix: (mixer, hidden) -> hidden, calls the mixer if x holds only some tokens of the grid.
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
  """Applies a norm, of which only a batch norm has a train mode; None returns x: it is folded."""
  if norm is None:
    return x
  return norm(x, use_running_average=not train) if isinstance(norm, nn.BatchNorm) else norm(x)


def apply_linear(linear: nn.Module, x, train: bool):
  """Applies a layer: an nn.Dense has no train mode, layers that replace it in a plan have one."""
  return linear(x) if isinstance(linear, nn.Dense) else linear(x, train)
