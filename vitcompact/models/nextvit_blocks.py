"""The two blocks of Next-ViT: convolutional, and transformer with a convolutional branch.

Maps are (B, H, W, C). All norms are batch norms; folding removes both those after a convolution and
those before a linear layer.
"""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention, block
from vitcompact.layers import (
    BatchNorm,
    ConvNorm,
    DropPath,
    batch_affine,
    fold_conv_norm,
    fold_into_linear,
    weight_init,
)
from vitcompact.methods.protocol import Site
from vitcompact.plan import BlockMethods
from vitcompact.token_state import Tokens

# Norms before a linear layer, into which they are folded.
FOLDED = ("norm1", "norm2", "key_norm")


def halve(x_bhwc):
  """Averages 2x2 cells at stride 2; at an odd edge, only the existing ones."""
  _, height, width, _ = x_bhwc.shape
  return nn.avg_pool(x_bhwc, (2, 2), strides=(2, 2), count_include_pad=False,
                     padding=((0, height % 2), (0, width % 2)))


def pool_tokens(x_bnc, window: int):
  """Averages `window` consecutive tokens, and drops the remainder: (B, N // window, C).

  In row-major order, so windows run along the rows of the grid and wrap; they are not squares.
  """
  batch, tokens, width = x_bnc.shape
  kept = tokens // window
  return x_bnc[:, :kept * window].reshape(batch, kept, window, width).mean(axis=2)


class ConvAttention(nn.Module):
  """MHCA: a 3x3 convolution within each head, batch norm, ReLU, and a projection over heads."""
  head_dim: int
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    width = x_bhwc.shape[-1]
    out = ConvNorm(width, 3, groups=width // self.head_dim, deploy=self.deploy, dtype=self.dtype,
                   name="group_conv")(x_bhwc, train)
    return nn.Dense(width, use_bias=False, kernel_init=weight_init, dtype=self.dtype,
                    name="projection")(nn.relu(out))


class ConvBlock(nn.Module):
  """NCB: x = embed(x), then x + mhca(x), then x + mlp(norm x)."""
  site: Site
  methods: BlockMethods
  stride: int
  head_dim: int
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    x = patch_embed(self, x_bhwc, train)
    drop = functools.partial(DropPath, self.drop_path)
    mhca = ConvAttention(self.head_dim, self.site.deploy, self.site.dtype, name="mhca")
    x = x + drop(name="drop1")(mhca(x, train), train)
    mlp = block.make_ffn(self.site, self.methods.ffn, name="mlp")
    return x + drop(name="drop2")(mlp(norm(self, "norm", x, train), train), train)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, {}) of the deployed block."""
    affine = batch_affine(params["norm"], stats["norm"])
    params, _ = block.fold(self.site, self.methods, params, stats)
    mlp = fold_norm_into_mlp(affine, params["mlp"])
    return {**fold_convolutions(params, stats), "mlp": mlp}, {}


class TransformerBlock(nn.Module):
  """NTB: attention on `width` channels, convolution on `ffn_width - width` more, then the MLP.

      x = embed(x);  x = x + attn(norm1 x);  y = proj(x);  y = y + mhca(y);
      z = [x, y];  z + mlp(norm2 z)

  Keys and values are means of `pool` tokens each, normalised again if pool > 1. The stochastic
  depth rate is split like the channels: 3/4 for attention, 1/4 for the convolution.
  """
  site: Site
  methods: BlockMethods
  stride: int
  head_dim: int
  pool: int
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    site = self.site
    x = patch_embed(self, x_bhwc, train)
    paths, step = None, self.methods.reduction(site)
    if step.predict is not None:
      predict = step.predict(dtype=site.dtype, name="predict_tokens")
      paths = predict(Tokens(jax.lax.collapse(x, 1, 3)), site.prefix, train).paths
    x = x + DropPath(0.75 * self.drop_path, name="drop1")(self._attend(x, train), train)
    y = ConvNorm(site.ffn_width - site.width, 1, deploy=site.deploy, dtype=site.dtype,
                 name="projection")(x, train)
    mhca = ConvAttention(self.head_dim, site.deploy, site.dtype, name="mhca")
    y = y + DropPath(0.25 * self.drop_path, name="drop2")(mhca(y, train), train)
    z = jnp.concatenate([x, y], axis=-1)
    norms = None if site.deploy else functools.partial(BatchNorm, dtype=site.dtype)
    out = block.ffn_branch(site, self.methods, norms, z, paths, train)
    return z + DropPath(self.drop_path, name="drop3")(out, train)

  @nn.nowrap
  def _attend(self, x_bhwc, train: bool):
    attn = block.Attention(self.site, self.methods.heads, name="attn")
    tokens = jax.lax.collapse(norm(self, "norm1", x_bhwc, train), 1, 3)
    keys = tokens
    if self.pool > 1:
      keys = norm(self, "key_norm", pool_tokens(tokens, self.pool), train)
    query, key, value = attn.query(tokens), attn.key(keys), attn.value(keys)
    core = block.restrict(self.site, self.methods.attention, attention.DENSE, query, key)
    return attn.attend(query, key, value, core, tokens).reshape(x_bhwc.shape)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, {}) of the deployed block."""
    scale, shift = batch_affine(params["norm1"], stats["norm1"])
    params, _ = block.fold(self.site, self.methods, params, stats)
    attn = {**params["attn"], "query": fold_into_linear(params["attn"]["query"], scale, shift)}
    if "key_norm" in params:
      # Means commute with an affine map, so norm1 moves past the pool, onto key_norm.
      key_scale, key_shift = batch_affine(params["key_norm"], stats["key_norm"])
      scale, shift = scale * key_scale, shift * key_scale + key_shift
    for name in ("key", "value"):
      attn[name] = fold_into_linear(attn[name], scale, shift)
    mlp = fold_norm_into_mlp(batch_affine(params["norm2"], stats["norm2"]), params["mlp"])
    kept = {name: leaf for name, leaf in params.items() if name not in FOLDED}
    return {**kept, **fold_convolutions(params, stats), "attn": attn, "mlp": mlp}, {}


def patch_embed(module: nn.Module, x_bhwc, train: bool):
  """Brings the map to the block's stride and width; without parameters if it has these already."""
  site = module.site
  if module.stride == 1 and x_bhwc.shape[-1] == site.width:
    return x_bhwc
  if module.stride == 2:
    x_bhwc = halve(x_bhwc)
  return ConvNorm(site.width, 1, deploy=site.deploy, dtype=site.dtype, parent=module,
                  name="patch_embed")(x_bhwc, train)


def norm(module: nn.Module, name: str, x, train: bool):
  """Applies the batch norm before a linear layer; when deployed, it is folded into that layer."""
  if module.site.deploy:
    return x
  return BatchNorm(dtype=module.site.dtype, parent=module, name=name)(
      x, use_running_average=not train)


def fold_convolutions(params, stats):
  """Returns the parameters of the block's convolutions, with their norms folded in."""
  out = {name: fold_conv_norm(params[name], stats[name])
         for name in ("patch_embed", "projection") if name in params}
  mhca = params["mhca"]
  group_conv = fold_conv_norm(mhca["group_conv"], stats["mhca"]["group_conv"])
  return {**out, "mhca": {**mhca, "group_conv": group_conv}}


def fold_norm_into_mlp(affine, folded):
  """Folds the (scale, shift) before a deployed MLP into its parameters, and returns these."""
  fc1 = folded["fc1"]
  if "a" not in fc1:
    return {**folded, "fc1": fold_into_linear(fc1, *affine)}
  # Two factors: the first takes the scale, the bias of the second takes the shift.
  first = fold_into_linear(fc1["a"], *affine)
  bias = fc1["b"]["bias"] + jnp.matmul(first["bias"], fc1["b"]["kernel"],
                                       precision=jax.lax.Precision.HIGHEST)
  fc1 = {"a": {"kernel": first["kernel"]}, "b": {**fc1["b"], "bias": bias}}
  return {**folded, "fc1": fc1}
