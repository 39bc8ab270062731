"""One transformer block, composed as its plan says."""
import contextlib
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax

from vitcompact import attention, token_state
from vitcompact.attention import Core
from vitcompact.layers import DropPath, FromHeads, LayerNorm, Mlp, ToHeads, dense, gelu
from vitcompact.methods.attention.block_predictor import BlockPredictor
from vitcompact.methods.attention.sparsifiner import TokenLinks
from vitcompact.methods.ffn.cffn import CompactDense, hidden_rms, warn_above_break_even
from vitcompact.methods.heads import hmhsa
from vitcompact.plan import BlockPlan
from vitcompact.token_state import Reduction, Tokens


class Attention(nn.Module):
  """Multi-head attention of x over `keys` (default: x itself), all heads real or some hallucinated.

  Leaves: query/key/value/out kernels (width, heads, head width) and (heads, head width, width);
  hallucinate/... where `spec` leaves heads to hallucinate. Queries and keys exist for real heads
  only. backend: see `attention.using`; None leaves it to the core.
  """
  width: int
  heads: int
  spec: hmhsa.HMHSA | None = None
  qkv_bias: bool = True
  query_grid: tuple[int, int] | None = None
  key_grid: tuple[int, int] | None = None
  prefix: int = 0
  dtype: str = "float32"
  backend: str | None = None

  @property
  def real_heads(self) -> int:
    return self.heads if self.spec is None else self.spec.count_real(self.heads)

  @nn.nowrap
  def check(self):
    """Raises ValueError where the spec wants more real heads than there are."""
    if self.spec is not None:
      self.spec.count_real(self.heads)

  def setup(self):
    def project(heads):
      return ToHeads(heads, self.width // self.heads, use_bias=self.qkv_bias, dtype=self.dtype)
    self.query, self.key = project(self.real_heads), project(self.real_heads)
    self.value = project(self.heads)
    if self.real_heads < self.heads:
      self.hallucinate = self._hallucinate()
    self.out = FromHeads(self.width, dtype=self.dtype)

  def __call__(self, x_bnw, keys_bmw=None):
    keys_bmw = x_bnw if keys_bmw is None else keys_bmw
    return self.attend(self.query(x_bnw), self.key(keys_bmw), self.value(keys_bmw))

  def attend(self, query_bnfd, key_bmfd, value_bmhd, core: Core = attention.DENSE):
    """The output from queries and keys of the real heads, and values of all."""
    # Not `using(None)`, which would undo what a caller asked for.
    asked = attention.using(self.backend) if self.backend else contextlib.nullcontext()
    with asked:
      return self.out(self._mixed(query_bnfd, key_bmfd, value_bmhd, core))

  def _mixed(self, query_bnfd, key_bmfd, value_bmhd, core: Core):
    """Values averaged by all heads."""
    if self.real_heads < self.heads:
      return self.hallucinate(query_bnfd, key_bmfd, value_bmhd, core)
    if attention.wants_maps(self):
      self.sow("maps", "maps", core.merged(core.maps(query_bnfd, key_bmfd)))
    return core(query_bnfd, key_bmfd, value_bmhd)

  @nn.nowrap
  def _hallucinate(self, **kwargs):
    return hmhsa.Hallucinate(self.spec, self.query_grid, self.key_grid, self.prefix, **kwargs)

  @nn.nowrap
  def from_dense(self, params):
    """Parameters of this module from those of a dense attention of the same size."""
    if self.real_heads == self.heads:
      return params
    return {**hmhsa.from_dense(self.spec, params, self.heads), "hallucinate": self._fresh_taps()}

  @nn.nowrap
  def _fresh_taps(self):
    """Freshly initialised taps, with which a hallucinated head copies its source."""
    def tokens(grid):
      return self.prefix + (grid[0] * grid[1] if grid else 1)
    width = self.width // self.heads
    query, key, value = [
        jax.ShapeDtypeStruct((1, tokens(grid), heads, width), "float32")
        for grid, heads in ((self.query_grid, self.real_heads), (self.key_grid, self.real_heads),
                            (self.key_grid, self.heads))]
    module = self._hallucinate(parent=None)
    return module.lazy_init(jax.random.key(0), query, key, value)["params"]


class Block(nn.Module):
  """Pre-norm residual block: x + attn(norm1 x) / skip_lam, then x + mlp(norm2 x) / skip_lam.

  `reduce` makes fewer keys and values of the normed tokens (pyramids); None: attention over all.
  `reduce_tokens`: where and how tokens become fewer.
  `links`: chooses which pairs of tokens are scored; None: all.
  """
  attn: nn.Module
  mlp: nn.Module
  drop_path: float = 0.0
  epsilon: float = 1e-6
  dtype: str = "float32"
  reduce: nn.Module | None = None
  skip_lam: float = 1.0
  reduce_tokens: Reduction = token_state.NOTHING
  links: nn.Module | None = None

  @nn.compact
  def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
    norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
    # Two modules, so that the two branches of a block are dropped independently.
    drop = functools.partial(DropPath, self.drop_path)
    norm1, fewer, prefix = norm(name="norm1"), self.reduce_tokens, self.attn.prefix
    if fewer.predict is not None:
      tokens = fewer.predict(dtype=self.dtype, name="predict_tokens")(tokens, prefix, train)
    y_bnw = norm1(tokens.x)
    keys_bmw = y_bnw if self.reduce is None else self.reduce(y_bnw)
    query, key = self.attn.query(y_bnw), self.attn.key(keys_bmw)
    if fewer.fuse is None:
      core = self._core(tokens, query, key)
    else:
      fused, ahead = fewer.fuse(tokens, query, key, prefix)
      keys_bmw = norm1(fused.x)
      if ahead is None:
        query, key = self.attn.query(keys_bmw), self.attn.key(keys_bmw)
        core = self._core(fused, query, key)
      else:
        core = ahead(self._core(tokens, query, key))
      tokens = fused
    y_bnw = self.attn.attend(query, key, self.attn.value(keys_bmw), core)
    tokens = tokens.replace(x=tokens.x + drop(name="drop1")(y_bnw, train) / self.skip_lam)
    if fewer.after_attention is not None:
      tokens = fewer.after_attention(tokens, query, key, prefix)
    y_bnw = self.mlp(norm(name="norm2")(tokens.x), train)
    tokens = tokens.replace(x=tokens.x + drop(name="drop2")(y_bnw, train) / self.skip_lam)
    if fewer.after_block is not None:
      tokens = fewer.after_block(tokens, query, key, prefix)
    return tokens

  @nn.nowrap
  def _core(self, tokens: Tokens, query, key) -> Core:
    """The attention over these tokens: sizes, which tokens are kept, and which links there are."""
    core = tokens.core()
    if self.links is None:
      return core
    return self.links(core, query, key, tokens.source, tokens.fused)

  @nn.nowrap
  def from_dense(self, params, stats, moments):
    """(params, stats) of this block from a dense one's; see `compact`."""
    mlp, mlp_stats = mlp_from_dense(self.mlp, params["mlp"], moments.get("mlp", {}))
    return ({**params, "attn": self.attn.from_dense(params["attn"]), "mlp": mlp,
             **token_state.fresh_predictor(self.reduce_tokens, self.attn.width),
             **fresh_links(self.links, self.attn)}, {"mlp": mlp_stats} if mlp_stats else stats)

  @nn.nowrap
  def fold(self, params, stats):
    """(params, stats) of the deployed block."""
    mlp = mlp_fold(self.mlp, params["mlp"], stats.get("mlp", {}))
    return {**fold_links(self.links, params), "mlp": mlp}, {}


def make_links(plan: BlockPlan, attn: Attention, *, keys: int, left: int | None = None,
               deploy: bool) -> nn.Module | None:
  """The predictor of a block's links, or None where the plan has none or too few keys are left.

  keys: the tokens attended to before any was reduced; left: when the block begins, if fewer.
  """
  spec = plan.links
  if spec is None or (keys if left is None else left) < spec.least_tokens:
    return None
  if spec.granularity == "block":
    return BlockPredictor(spec, keys, attn.prefix, attn.query_grid, attn.key_grid, deploy=deploy,
                          parent=None)
  return TokenLinks(spec, keys, attn.prefix, deploy=deploy, parent=None)


def fresh_links(links: nn.Module | None, attn: Attention):
  """{"links": freshly initialised parameters}, or {} where a block has none."""
  if links is None:
    return {}
  grid = attn.query_grid
  counts = attn.prefix + math.prod(grid) if grid else links.tokens, links.tokens
  query, key = [jax.ShapeDtypeStruct((1, n, attn.real_heads, attn.width // attn.heads), "float32")
                for n in counts]
  return {"links": links.lazy_init(jax.random.key(0), attention.DENSE, query, key)["params"]}


def fold_links(links: nn.Module | None, params):
  """Parameters of a block with its predictor folded, or gone where it has none."""
  rest = {name: leaf for name, leaf in params.items() if name != "links"}
  return rest if links is None else {**rest, "links": links.fold(params["links"])}


def make_mlp(plan: BlockPlan, *, width: int, hidden: int, deploy: bool, dtype: str, name: str,
             act: Callable = gelu, mixer: nn.Module | None = None, mixer_gain: int = 1) -> Mlp:
  """The FFN of a block: dense layers, or factorised ones where the plan says so.

  name: of the block, for the warning about ranks that save nothing.
  mixer: see `Mlp`; mixer_gain: by how much it multiplies a fresh hidden layer's variance.
  """
  spec = plan.ffn
  layers = {"fc1": dense(hidden, dtype=dtype), "fc2": dense(width, dtype=dtype)}
  compacted = {} if spec is None else {"fc2": (hidden, width, hidden_rms(act, mixer_gain * width))}
  if spec is not None and spec.factor == "both":
    compacted["fc1"] = (width, hidden, 1.0)
  for layer, (m, features, input_rms) in compacted.items():
    rank = spec.rank(width)
    warn_above_break_even(f"{name}/mlp/{layer}", m, features, rank)
    merged = layer in spec.merged
    if deploy and merged:
      continue   # as one matrix
    layers[layer] = CompactDense(
        features, rank, branches=spec.branches, rep=spec.rep, avg_skip=spec.avg_skip,
        deploy=deploy, merged=merged, input_rms=input_rms, dtype=dtype, parent=None)
  return Mlp(act=act, mixer=mixer, parent=None, **layers)


def mlp_from_dense(mlp: Mlp, params, moments):
  """(params, stats) of `mlp` from the parameters of the dense one; moments: {layer: ...}."""
  stats = {}
  for layer in ("fc1", "fc2"):
    module = getattr(mlp, layer)
    if isinstance(module, CompactDense):
      new, stats[layer] = module.from_dense(params[layer], moments.get(layer))
      params = {**params, layer: new}
  return params, {layer: leaf for layer, leaf in stats.items() if leaf}


def mlp_fold(mlp: Mlp, params, stats):
  """Parameters of the deployed `mlp`, which has no statistics."""
  for layer in ("fc1", "fc2"):
    module = getattr(mlp, layer)
    if isinstance(module, CompactDense):
      params = {**params, layer: module.fold(params[layer], stats.get(layer, {}))[0]}
  return params
