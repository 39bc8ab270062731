"""The parts of SHViT: its block, single-head attention, and the downsampling between stages.

Maps are (B, H, W, C). Each convolution ends in a batch norm. Folding puts it, and the skip around a
depthwise convolution, into the convolution. 1x1 convolutions are dense layers.
"""
import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention, block
from vitcompact.layers import (
    BATCH_EPSILON,
    ConvNorm,
    Dense,
    DenseNorm,
    DropPath,
    Mlp,
    fan_in_uniform,
    fold_conv_norm,
    fold_dense_norm,
    torch_conv_init,
)
from vitcompact.methods.protocol import Site
from vitcompact.plan import BlockMethods

GROUP_EPSILON = BATCH_EPSILON
zeros, ones = nn.initializers.zeros, nn.initializers.ones


class SingleHeadAttention(nn.Module):
  """SHSA: single-head attention over some of the channels, and a projection of all channels.

      x1, x2 = split(x);  q, k, v = qkv(norm(x1));  y = proj(relu([softmax(q k^T / sqrt(d)) v, x2]))

  x1: the first site.width channels; d: qk_width. norm: over all places and channels of an image
  (GroupNorm with one group), so it does not fold. Yun and Ro, arXiv 2401.16456, section 3.2.
  """
  site: Site
  qk_width: int

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    site, d = self.site, self.qk_width
    layer = functools.partial(DenseNorm, kernel_init=torch_conv_init, deploy=site.deploy,
                              dtype=site.dtype)
    part, rest = jnp.split(x_bhwc, [site.width], axis=-1)
    normed = nn.GroupNorm(num_groups=1, epsilon=GROUP_EPSILON, use_fast_variance=False,
                          dtype=site.dtype, name="norm")(part)
    qkv = jax.lax.collapse(layer(2 * d + site.width, name="qkv")(normed, train), 1, 3)
    query, key, value = (x[:, :, None] for x in jnp.split(qkv, [d, 2 * d], axis=-1))
    if attention.wants_maps(self):
      self.sow("maps", "maps", attention.DENSE.maps(query, key))
    # `using(None)` would undo the form that a caller asked for.
    with attention.using(site.form) if site.form else contextlib.nullcontext():
      attended = attention.DENSE(query, key, value).reshape(part.shape)
    joined = nn.relu(jnp.concatenate([attended, rest], axis=-1))
    return layer(x_bhwc.shape[-1], scale_init=zeros, name="proj")(joined, train)


class SHViTBlock(nn.Module):
  """x + conv(x), then x + attn(x) in stages with attention, then x + mlp(x); conv is 3x3 depthwise.

  Each branch ends in a batch norm whose scale starts at 0.
  """
  site: Site
  methods: BlockMethods
  qk_width: int
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    site, drop = self.site, functools.partial(DropPath, self.drop_path)
    conv = depthwise(x_bhwc, site.deploy, site.dtype, scale_init=zeros, name="conv")(x_bhwc, train)
    x = conv if site.deploy else x_bhwc + drop(name="drop1")(conv, train)
    if "attention" in site.provides:
      attn = SingleHeadAttention(site, self.qk_width, name="attn")
      x = x + drop(name="drop2")(attn(x, train), train)
    mlp = block.make_ffn(site, self.methods.ffn, name="mlp")
    return x + drop(name="drop3")(mlp(x, train), train)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, {}) of the deployed block."""
    folded, _ = block.fold(self.site, self.methods, params, stats)
    out = {"conv": fold_conv_norm(params["conv"], stats["conv"], skip=True),
           "mlp": fold_layers(folded["mlp"], stats.get("mlp", {}))}
    if "attn" in params:
      out["attn"] = fold_layers(params["attn"], stats["attn"])
    return out, {}


class Downsample(nn.Module):
  """The downsampling between two stages: (B, H, W, C) -> (B, H/2, W/2, features), rounded up.

      x = x + conv1(x);  x = x + mlp1(x);  x = merge(x);  x = x + conv2(x);  x + mlp2(x)
  """
  features: int
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    x = self._conv_and_mlp(1, x_bhwc, train)
    x = PatchMerging(self.features, self.deploy, self.dtype, name="merge")(x, train)
    return self._conv_and_mlp(2, x, train)

  @nn.nowrap
  def _conv_and_mlp(self, i: int, x_bhwc, train: bool):
    conv = depthwise(x_bhwc, self.deploy, self.dtype, name=f"conv{i}")(x_bhwc, train)
    x = conv if self.deploy else x_bhwc + conv
    width = x.shape[-1]
    layer = functools.partial(DenseNorm, kernel_init=torch_conv_init, deploy=self.deploy,
                              dtype=self.dtype, parent=None)
    mlp = Mlp(fc1=layer(2 * width), fc2=layer(width, scale_init=zeros), act=nn.relu,
              name=f"mlp{i}")
    return x + mlp(x, train)

  @nn.nowrap
  def fold(self, params, stats):
    out = {name: fold_conv_norm(params[name], stats[name], skip=True)
           for name in ("conv1", "conv2")}
    out |= {name: fold_layers(params[name], stats[name]) for name in ("mlp1", "merge", "mlp2")}
    return out, {}


class PatchMerging(nn.Module):
  """conv3(se(relu(conv2(relu(conv1(x)))))) at 4 times the width; conv2: 3x3 depthwise, stride 2."""
  features: int
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    fields = {"kernel_init": torch_conv_init, "deploy": self.deploy, "dtype": self.dtype}
    hidden = 4 * x_bhwc.shape[-1]
    x = nn.relu(DenseNorm(hidden, name="conv1", **fields)(x_bhwc, train))
    x = nn.relu(ConvNorm(hidden, 3, 2, groups=hidden, name="conv2", **fields)(x, train))
    x = SqueezeExcite(self.dtype, name="se")(x)
    return DenseNorm(self.features, name="conv3", **fields)(x, train)


class SqueezeExcite(nn.Module):
  """x sigmoid(fc2(relu(fc1(mean x)))), with the mean over the map. Hu et al., arXiv 1709.01507."""
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc):
    width = x_bhwc.shape[-1]
    hidden = squeezed_width(width)

    def dense(features, fan_in, name):
      init = fan_in_uniform(fan_in)
      return Dense(features, kernel_init=init, bias_init=init, dtype=self.dtype, name=name)

    gate = nn.relu(dense(hidden, width, "fc1")(x_bhwc.mean(axis=(1, 2))))
    return x_bhwc * nn.sigmoid(dense(width, hidden, "fc2")(gate))[:, None, None]


def squeezed_width(width: int) -> int:
  """Returns a quarter of the width, rounded to the nearest multiple of 8, as in timm."""
  return max(8, (width // 4 + 4) // 8 * 8)


def depthwise(x_bhwc, deploy: bool, dtype: str, scale_init=ones, **kwargs) -> ConvNorm:
  """Makes a 3x3 depthwise convolution of x, which also adds x when deployed."""
  width = x_bhwc.shape[-1]
  return ConvNorm(width, 3, groups=width, kernel_init=torch_conv_init, scale_init=scale_init,
                  deploy=deploy, dtype=dtype, **kwargs)


def fold_layers(params, stats):
  """Returns the parameters with all norms folded into their layers; other layers are unchanged."""
  return {name: fold_conv_norm(leaf, stats[name]) if "conv" in leaf
          else fold_dense_norm(leaf, stats.get(name, {})) for name, leaf in params.items()}
