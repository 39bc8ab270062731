"""The parts of BiFormer: strided convolutions with batch norms, and the routed block."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention, block, layers
from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.routing import regions as regions_of
from vitcompact.attention.block_sparse.routing import route
from vitcompact.depthwise import LocalConv
from vitcompact.layers import BatchNorm, DropPath, LayerNorm, batch_affine, fan_in_uniform
from vitcompact.methods.protocol import Site
from vitcompact.plan import BlockMethods

EPSILON = 1e-6       # of the layer norms
POSITION_SIZE, ENHANCEMENT_SIZE = 3, 5    # sides of the depthwise kernels


class Embed(nn.Module):
  """Strided convolution with a bias, and a batch norm after or before it: (B, H, W, C) -> (B, h, w,
  width). A 3 x 3 kernel is padded by 1 on every side, an even one not at all. When deployed, it is
  the convolution alone."""
  width: int
  size: int
  stride: int
  norm_first: bool = False
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    init = fan_in_uniform(self.size ** 2 * x_bhwc.shape[-1])
    conv = nn.Conv(self.width, (self.size,) * 2, strides=self.stride, padding=self.size % 2,
                   kernel_init=init, bias_init=init, dtype=self.dtype, name="conv")
    if self.deploy:
      return conv(x_bhwc)
    norm = BatchNorm(dtype=self.dtype, use_running_average=not train, name="norm")
    return conv(norm(x_bhwc)) if self.norm_first else norm(conv(x_bhwc))

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, {}) of the deployed convolution."""
    if self.deploy:
      return params, stats
    scale_c, shift_c = batch_affine(params["norm"], stats["norm"])
    kernel, bias = params["conv"]["kernel"], params["conv"]["bias"]
    if self.norm_first:   # exact at the edges, too, as there is no padding
      bias = bias + jnp.einsum("hwco,c->o", kernel, shift_c, precision=jax.lax.Precision.HIGHEST)
      return {"conv": {"kernel": kernel * scale_c[None, None, :, None], "bias": bias}}, {}
    return {"conv": {"kernel": kernel * scale_c[None, None, None],
                     "bias": bias * scale_c + shift_c}}, {}


class Stem(nn.Module):
  """Embeds images as the map of the first stage, at a quarter of the resolution: two 3 x 3
  convolutions with a GELU in between, or one 4 x 4 convolution."""
  width: int
  swin_layout: bool = False
  deploy: bool = False
  dtype: str = "float32"

  def setup(self):
    for name, module in self.convolutions().items():
      setattr(self, name, module)

  @nn.nowrap
  def convolutions(self) -> dict[str, Embed]:
    make = functools.partial(Embed, deploy=self.deploy, dtype=self.dtype, parent=None)
    if self.swin_layout:
      return {"conv0": make(self.width, 4, 4)}
    return {"conv0": make(self.width // 2, 3, 2), "conv1": make(self.width, 3, 2)}

  def __call__(self, x_bhwc, train: bool = False):
    x_bhwc = self.conv0(x_bhwc, train)
    return x_bhwc if self.swin_layout else self.conv1(layers.gelu(x_bhwc), train)

  @nn.nowrap
  def fold(self, params, stats):
    return {name: conv.fold(params[name], stats.get(name))[0]
            for name, conv in self.convolutions().items()}, {}


class RoutedBlock(nn.Module):
  """x = x + position(x), then x + attn(norm1 x), then x + mlp(norm2 x), of tokens (B, N, C).

  regions: number per side of the grid; top_k: how many of them a region attends to, 0: dense
  attention. Local enhancement acts on the values, in dense attention on the normed input.
  position: whether there is a position convolution.
  """
  site: Site
  methods: BlockMethods
  regions: int
  top_k: int
  position: bool = True
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_bnw, train: bool = False):
    site = self.site
    norm = functools.partial(LayerNorm, epsilon=EPSILON, dtype=site.dtype)
    drop = functools.partial(DropPath, self.drop_path)
    if self.position:
      x_bnw = x_bnw + LocalConv(site.query_grid, POSITION_SIZE,
                                fan_in_uniform(POSITION_SIZE ** 2), dtype=site.dtype,
                                name="position")(x_bnw)
    attn = block.Attention(site, self.methods.heads, name="attn")
    normed_bnw = norm(name="norm1")(x_bnw)
    query, key = attn.queries_and_keys(normed_bnw, normed_bnw)
    core = attention.DENSE._replace(local=self._local())
    if self.top_k:
      windows = regions_of(site.query_grid, self.regions)
      core = core._replace(layout=route(BlockLayout(None, windows, windows), query, key,
                                        self.top_k))
    else:
      core = block.restrict(site, self.methods.attention, core, query, key)
    y_bnw = attn.attend(query, key, attn.value(normed_bnw), core, normed_bnw)
    x_bnw = x_bnw + drop(name="drop1")(y_bnw, train)
    mlp = block.make_ffn(site, self.methods.ffn, name="mlp")
    return x_bnw + drop(name="drop2")(mlp(norm(name="norm2")(x_bnw), train), train)

  @nn.nowrap
  def _local(self):
    enhance = LocalConv(self.site.query_grid, ENHANCEMENT_SIZE,
                        fan_in_uniform(ENHANCEMENT_SIZE ** 2), dtype=self.site.dtype, name="lce")
    if self.top_k:
      return enhance.filter_heads
    return lambda value_bnhd, x_bnw: enhance(x_bnw).reshape(value_bnhd.shape)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, stats) of the deployed block."""
    return block.fold(self.site, self.methods, params, stats)
