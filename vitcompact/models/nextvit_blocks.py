"""The two blocks of Next-ViT: convolutional, and transformer with a convolutional branch.

Maps are (B, H, W, C). Everything is normalised by batch norms; folding removes each of them, those
behind a convolution and those in front of a linear layer alike.
"""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention
from vitcompact.block import fold_links, fresh_links, mlp_fold, mlp_from_dense
from vitcompact.layers import (
    BatchNorm,
    ConvNorm,
    DropPath,
    batch_affine,
    fold_conv_norm,
    fold_into_linear,
    weight_init,
)


def halve(x_bhwc):
  """2x2 means at stride 2; at an odd edge, of the cells that exist."""
  _, height, width, _ = x_bhwc.shape
  return nn.avg_pool(x_bhwc, (2, 2), strides=(2, 2), count_include_pad=False,
                     padding=((0, height % 2), (0, width % 2)))


def pool_tokens(x_bnc, window: int):
  """Means of `window` tokens one after another, a remainder dropped: (B, N // window, C).

  Row-major order, so windows run along the rows of the grid and wrap: not a pool over squares.
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
  mlp: nn.Module
  width: int
  stride: int
  head_dim: int
  drop_path: float = 0.0
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    x = patch_embed(self, x_bhwc, train)
    drop = functools.partial(DropPath, self.drop_path)
    mhca = ConvAttention(self.head_dim, self.deploy, self.dtype, name="mhca")
    x = x + drop(name="drop1")(mhca(x, train), train)
    return x + drop(name="drop2")(self.mlp(norm(self, "norm", x, train), train), train)

  @nn.nowrap
  def from_dense(self, params, stats, moments):
    return block_from_dense(self, params, stats, moments)

  @nn.nowrap
  def fold(self, params, stats):
    """(params, {}) of the deployed block."""
    mlp = fold_norm_and_mlp(self.mlp, batch_affine(params["norm"], stats["norm"]), params, stats)
    return {**fold_convolutions(params, stats), "mlp": mlp}, {}


class TransformerBlock(nn.Module):
  """NTB: attention on `width` channels beside convolution on `side_width` more, then the MLP.

      x = embed(x);  x = x + attn(norm1 x);  y = proj(x);  y = y + mhca(y);
      z = [x, y];  z + mlp(norm2 z)

  Keys and values are means of `pool` tokens each, normalised once more where pool > 1. The rate of
  stochastic depth is split as the channels are: 3/4 on attention, 1/4 on the convolution.
  """
  attn: nn.Module
  mlp: nn.Module
  width: int
  side_width: int
  stride: int
  head_dim: int
  pool: int
  drop_path: float = 0.0
  deploy: bool = False
  dtype: str = "float32"
  links: nn.Module | None = None

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    x = patch_embed(self, x_bhwc, train)
    x = x + DropPath(0.75 * self.drop_path, name="drop1")(self._attend(x, train), train)
    y = ConvNorm(self.side_width, 1, deploy=self.deploy, dtype=self.dtype,
                 name="projection")(x, train)
    mhca = ConvAttention(self.head_dim, self.deploy, self.dtype, name="mhca")
    y = y + DropPath(0.25 * self.drop_path, name="drop2")(mhca(y, train), train)
    z = jnp.concatenate([x, y], axis=-1)
    out = self.mlp(norm(self, "norm2", z, train), train)
    return z + DropPath(self.drop_path, name="drop3")(out, train)

  def _attend(self, x_bhwc, train: bool):
    tokens = jax.lax.collapse(norm(self, "norm1", x_bhwc, train), 1, 3)
    keys = tokens
    if self.pool > 1:
      keys = norm(self, "key_norm", pool_tokens(tokens, self.pool), train)
    query, key, value = self.attn.query(tokens), self.attn.key(keys), self.attn.value(keys)
    core = attention.DENSE
    if self.links is not None:
      core = self.links(core, query, key)
    return self.attn.attend(query, key, value, core).reshape(x_bhwc.shape)

  @nn.nowrap
  def from_dense(self, params, stats, moments):
    params = {**params, "attn": self.attn.from_dense(params["attn"]),
              **fresh_links(self.links, self.attn)}
    return block_from_dense(self, params, stats, moments)

  @nn.nowrap
  def fold(self, params, stats):
    """(params, {}) of the deployed block."""
    params = fold_links(self.links, params)
    scale, shift = batch_affine(params["norm1"], stats["norm1"])
    attn = {**params["attn"], "query": fold_into_linear(params["attn"]["query"], scale, shift)}
    if "key_norm" in params:
      # Means commute with an affine map, so norm1 moves behind the pool, onto key_norm.
      key_scale, key_shift = batch_affine(params["key_norm"], stats["key_norm"])
      scale, shift = scale * key_scale, shift * key_scale + key_shift
    for name in ("key", "value"):
      attn[name] = fold_into_linear(attn[name], scale, shift)
    mlp = fold_norm_and_mlp(self.mlp, batch_affine(params["norm2"], stats["norm2"]), params, stats)
    return {**fold_convolutions(params, stats), "attn": attn, "mlp": mlp}, {}


def patch_embed(block: nn.Module, x_bhwc, train: bool):
  """The map at the block's stride and width; nothing, without parameters, where it is already."""
  if block.stride == 1 and x_bhwc.shape[-1] == block.width:
    return x_bhwc
  if block.stride == 2:
    x_bhwc = halve(x_bhwc)
  return ConvNorm(block.width, 1, deploy=block.deploy, dtype=block.dtype, parent=block,
                  name="patch_embed")(x_bhwc, train)


def norm(block: nn.Module, name: str, x, train: bool):
  """Batch norm in front of a linear layer, which has taken it in once deployed."""
  if block.deploy:
    return x
  return BatchNorm(dtype=block.dtype, parent=block, name=name)(x, use_running_average=not train)


def block_from_dense(block: nn.Module, params, stats, moments):
  """(params, stats) of a block from a dense one's; see `compact`."""
  mlp, mlp_stats = mlp_from_dense(block.mlp, params["mlp"], moments.get("mlp", {}))
  return {**params, "mlp": mlp}, {**stats, **({"mlp": mlp_stats} if mlp_stats else {})}


def fold_convolutions(params, stats):
  """The block's convolutions, each with its norm folded in; without the norms before linears."""
  out = {name: fold_conv_norm(params[name], stats[name])
         for name in ("patch_embed", "projection") if name in params}
  mhca = params["mhca"]
  group_conv = fold_conv_norm(mhca["group_conv"], stats["mhca"]["group_conv"])
  return {**out, "mhca": {**mhca, "group_conv": group_conv}}


def fold_norm_and_mlp(mlp: nn.Module, affine, params, stats):
  """Parameters of the deployed MLP that has taken in the (scale, shift) in front of it."""
  folded = mlp_fold(mlp, params["mlp"], stats.get("mlp", {}))
  fc1 = folded["fc1"]
  if "a" not in fc1:
    return {**folded, "fc1": fold_into_linear(fc1, *affine)}
  # Two factors: the first takes the scale, and hands its share of the shift on to the second.
  first = fold_into_linear(fc1["a"], *affine)
  bias = fc1["b"]["bias"] + jnp.matmul(first["bias"], fc1["b"]["kernel"],
                                       precision=jax.lax.Precision.HIGHEST)
  fc1 = {"a": {"kernel": first["kernel"]}, "b": {**fc1["b"], "bias": bias}}
  return {**folded, "fc1": fc1}
