"""TransNeXt's block: aggregated attention, or cosine attention over all tokens, and a ConvGLU."""
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import attention, block, torch_names
from vitcompact.layers import DropPath, LayerNorm, dense, gelu, weight_init
from vitcompact.methods.protocol import Site
from vitcompact.models import pyramid
from vitcompact.models.pvt_v2 import fan_out_init
from vitcompact.models.transnext_attention import NEIGHBOURS, Aggregation, Local, bias, distances
from vitcompact.plan import BlockMethods
from vitcompact.torch_names import Entry
from vitcompact.tracing import param

POSITION_WIDTH = 512   # hidden width of the network that computes position biases
LOCAL_STD = 4e-4
# softplus(x) is 1 / 0.24.
TEMPERATURE = math.log(math.expm1(1 / 0.24))


class Pool(nn.Module):
  """Pools tokens, (B, N, C) -> (B, P, C): norm(mean of cells(gelu(proj x)))."""
  grid: tuple[int, int]
  keys: tuple[int, int]
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bnc):
    batch, _, chans = x_bnc.shape
    kernel_init, bias_init = fan_out_init(1, chans, chans)
    x_bnc = dense(chans, dtype=self.dtype).clone(
        kernel_init=kernel_init, bias_init=bias_init, name="proj", parent=self)(x_bnc)
    (rows, columns), (height, width) = self.keys, self.grid
    cells = gelu(x_bnc).reshape(batch, rows, height // rows, columns, width // columns, chans)
    pooled_bpc = cells.mean(axis=(2, 4)).reshape(batch, rows * columns, chans)
    return LayerNorm(epsilon=pyramid.CONV_EPSILON, dtype=self.dtype, name="norm")(pooled_bpc)


class Cosine(nn.Module):
  """Makes the attention's operator: `Aggregation` over these keys, and if `local` over neighbours.

  Leaves: temperature (h, 1, 1), query_embedding (h, 1, d); position_1 and position_2, the network
  that maps distances to biases; local_bias (h, 9), tokens (h, d, 9), token_bias (h, 1, 9). When
  deployed, `positions` (rows, columns, h) is the output of the network for the grid, which does not
  depend on the image.
  """
  heads: int
  head_width: int
  grid: tuple[int, int]
  keys: tuple[int, int]
  reference: tuple[int, int]
  local: bool
  deploy: bool = False

  @nn.compact
  def __call__(self) -> Aggregation:
    def leaf(name, init, *shape):
      return param(self, name, init, (self.heads, *shape))

    near = None
    if self.local:
      count = len(NEIGHBOURS)
      near = Local(leaf("local_bias", nn.initializers.normal(LOCAL_STD), count),
                   leaf("tokens", weight_init, self.head_width, count),
                   leaf("token_bias", nn.initializers.zeros, 1, count))
    return Aggregation(
        self.grid, leaf("temperature", nn.initializers.constant(TEMPERATURE), 1, 1),
        leaf("query_embedding", weight_init, 1, self.head_width),
        bias(self._table(), self.grid, self.keys), near)

  def _table(self):
    places = distances(self.grid, self.keys, self.reference)
    if self.deploy:
      return param(self, "positions", nn.initializers.zeros, (*places.shape[:2], self.heads))
    hidden = dense(POSITION_WIDTH, dtype="float32").clone(name="position_1", parent=self)(places)
    return dense(self.heads, dtype="float32").clone(name="position_2", parent=self)(
        nn.relu(hidden))

  @nn.nowrap
  def fold(self, params):
    """Returns the parameters of the deployed module."""
    if self.deploy:
      return params
    table = distances(self.grid, self.keys, self.reference)
    for name, act in (("position_1", nn.relu), ("position_2", lambda x: x)):
      table = act(jnp.matmul(table, params[name]["kernel"], precision=jax.lax.Precision.HIGHEST)
                  + params[name]["bias"][None, None])
    kept = {name: leaf for name, leaf in params.items() if not name.startswith("position_")}
    return {**kept, "positions": table}


class TransNeXtBlock(nn.Module):
  """x + attn(norm1 x), then x + mlp(norm2 x), of tokens (B, N, C).

  reference: the grid of this stage at the image size with which positions were trained. pooled: the
  grid of the pooled keys, if tokens attend to these and to their neighbours; None: they attend to
  all tokens.
  """
  site: Site
  methods: BlockMethods
  reference: tuple[int, int]
  pooled: tuple[int, int] | None = None
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_bnc, train: bool = False):
    norm = functools.partial(LayerNorm, epsilon=pyramid.EPSILON, dtype=self.site.dtype)
    drop = functools.partial(DropPath, self.drop_path)
    x_bnc = x_bnc + drop(name="drop1")(self._attend(norm(name="norm1")(x_bnc)), train)
    mlp = block.make_ffn(self.site, self.methods.ffn, name="mlp")
    return x_bnc + drop(name="drop2")(mlp(norm(name="norm2")(x_bnc), train), train)

  @nn.nowrap
  def _attend(self, x_bnc):
    site = self.site
    attn = block.Attention(site, self.methods.heads, name="attn")
    keys_bmc = x_bnc
    if self.pooled is not None:
      pooled = Pool(site.query_grid, self.pooled, site.dtype, name="pool")(x_bnc)
      keys_bmc = jnp.concatenate([x_bnc, pooled], axis=1)
    query, key = attn.queries_and_keys(x_bnc, keys_bmc)
    core = attention.DENSE._replace(operator=self.cosine(name="cosine")())
    return attn.attend(query, key, attn.value(keys_bmc), core, x_bnc)

  @nn.nowrap
  def cosine(self, **kwargs) -> Cosine:
    site = self.site
    return Cosine(site.heads, site.head_width, site.query_grid, self.pooled or site.query_grid,
                  self.reference, local=self.pooled is not None, deploy=site.deploy, **kwargs)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, stats) of the deployed block."""
    params, stats = block.fold(self.site, self.methods, params, stats)
    return {**params, "cosine": self.cosine(parent=None).fold(params["cosine"])}, stats

  @nn.nowrap
  def torch_entries(self, torch: str, ours: str) -> list[Entry]:
    """Returns entries of the tensors of the block under the authors' names."""
    theirs, attn = f"{torch}.attn", f"{ours}/attn"
    leaves = {"temperature": "temperature", "query_embedding": "query_embedding"}
    if self.pooled is None:
      entries = torch_names.heads(f"{theirs}.qkv", attn, ("query", "key", "value"))
    else:
      entries = torch_names.heads(f"{theirs}.q", attn, ("query",))
      entries += torch_names.heads(f"{theirs}.kv", attn, ("key", "value"))
      entries += torch_names.conv(f"{theirs}.sr", f"{ours}/pool/proj")
      entries += torch_names.norm(f"{theirs}.norm", f"{ours}/pool/norm")
      leaves |= {"relative_pos_bias_local": "local_bias", "learnable_tokens": "tokens",
                 "learnable_bias": "token_bias"}
    entries += [Entry(f"{theirs}.{name}", (f"params/{ours}/cosine/{leaf}",))
                for name, leaf in leaves.items()]
    for i in (1, 2):
      entries += torch_names.norm(f"{torch}.norm{i}", f"{ours}/norm{i}")
      entries += torch_names.linear(f"{theirs}.cpb_fc{i}", f"{ours}/cosine/position_{i}")
    entries += torch_names.out(f"{theirs}.proj", f"{attn}/out")
    entries += torch_names.conv(f"{torch}.mlp.dwconv.dwconv", f"{ours}/mlp/mixer/conv")
    return entries + block.method_entries(self.site, self.methods, torch, ours)
