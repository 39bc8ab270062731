"""One transformer block, composed according to its plan."""
import contextlib
import functools
from fractions import Fraction

import flax.linen as nn
import jax.numpy as jnp

from vitcompact import attention, rotary, torch_names
from vitcompact.attention import Core
from vitcompact.layers import (
  DropPath,
  FromHeads,
  LayerNorm,
  LayerScale,
  Mlp,
  ToHeads,
  apply_norm,
  ffn_layer,
)
from vitcompact.methods import METHODS, protocol, surgery
from vitcompact.methods.protocol import Site
from vitcompact.plan import BlockMethods
from vitcompact.token_state import Tokens
from vitcompact.torch_names import Entry


class Attention(nn.Module):
  """Multi-head attention of x over `keys` (default: x itself).

  Parameters: query/key/value kernels (width, heads, head width), out kernel (heads, head width,
  width), query_norm and key_norm over a head's width if the site has them, and those of `method`
  under its scope. It computes the outputs of all heads; its `scored_heads` have queries and keys.
  """
  site: Site
  method: object = None   # of the heads axis

  def setup(self):
    site = self.site
    scored_heads = site.heads if self.method is None else protocol.scored_heads(self.method, site)

    def project(heads, use_bias=site.qkv_bias):
      return ToHeads(heads, site.head_width, use_bias=use_bias, dtype=site.dtype)

    value_heads = site.heads if self.method is None else protocol.value_heads(self.method, site)
    self.query, self.value = project(scored_heads), project(value_heads)
    self.key = project(scored_heads, site.qkv_bias and site.key_bias)
    if self.method is not None:
      setattr(self, protocol.scope_of(self.method), self.method.make(site, parent=None))
    self.out = FromHeads(site.width, dtype=site.dtype)
    if site.qk_norm is not None:
      self.query_norm, self.key_norm = (LayerNorm(site.qk_norm, site.dtype) for _ in range(2))

  def __call__(self, x_bnw, keys_bmw=None):
    keys_bmw = x_bnw if keys_bmw is None else keys_bmw
    query, key = self.queries_and_keys(x_bnw, keys_bmw)
    return self.attend(query, key, self.value(keys_bmw), x_bnw=x_bnw)

  def queries_and_keys(self, x_bnw, keys_bmw, positions=None):
    """Returns queries and keys (B, N, f, d) for the scores, normalised and rotated if the site says
    so. positions: see `rotary.token_positions`; if given, keys must be x itself."""
    with self._active_share():
      query = self.query(x_bnw)
    key = self.key(keys_bmw)
    if self.site.qk_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    if positions is not None:
      reference = self.site.rotary_grid
      angles = rotary.angles(positions, self.site.head_width, self.site.rotary, reference)
      query, key = (rotary.rotate(x, angles, reference is not None) for x in (query, key))
    if self.site.query_scale != 1:
      query = query * self.site.query_scale
    return query, key

  def attend(self, query_bnfd, key_bmfd, value_bmhd, core: Core = attention.DENSE, x_bnw=None):
    """Returns the output, given queries and keys of the scored heads and values of all heads."""
    # `using(None)` would undo the form that a caller asked for.
    form = self.site.form
    with attention.using(form) if form else contextlib.nullcontext():
      heads_bnhd = self._heads(query_bnfd, key_bmfd, value_bmhd, core, x_bnw)
      if core.local is not None:
        heads_bnhd = heads_bnhd + core.local(value_bmhd, x_bnw)
      with self._active_share():
        return self.out(heads_bnhd)

  def _active_share(self):
    """Returns a scope that tells `count` the share of heads a token uses, see `attention.share`."""
    if self.method is None:
      return contextlib.nullcontext()
    active = protocol.active_heads(self.method, self.site)
    total = protocol.value_heads(self.method, self.site)
    return contextlib.nullcontext() if active == total else attention.share(Fraction(active, total))

  def _heads(self, query_bnfd, key_bmfd, value_bmhd, core: Core, x_bnw):
    if self.method is not None:
      module = getattr(self, protocol.scope_of(self.method))
      return module(query_bnfd, key_bmfd, value_bmhd, core, x_bnw)
    if attention.wants_maps(self):
      self.sow("maps", "maps", core.merged(core.maps(query_bnfd, key_bmfd)))
    return core(query_bnfd, key_bmfd, value_bmhd)


class Block(nn.Module):
  """Pre-norm residual block: x + attn(norm1 x) / skip_lam, then x + mlp(norm2 x) / skip_lam. If the
  site has a LayerScale, ls1 and ls2 scale the outputs of the two branches.

  reduce: makes the module that turns normed tokens into fewer keys and values; None: all tokens.
  """
  site: Site
  methods: BlockMethods = BlockMethods()
  drop_path: float = 0.0
  epsilon: float = 1e-6
  reduce: object = None
  skip_lam: float = 1.0

  @nn.compact
  def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
    site, step = self.site, self.methods.reduction(self.site)
    norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=site.dtype)
    # Two modules, so that the two branches are dropped independently.
    drop = functools.partial(DropPath, self.drop_path)
    attn, norm1 = Attention(site, self.methods.heads, name="attn"), norm(name="norm1")
    if step.predict is not None:
      predict = step.predict(dtype=site.dtype, name="predict_tokens")
      tokens = predict(tokens, site.prefix, train)
    x_bnw = norm1(tokens.x)
    keys_bmw = x_bnw if self.reduce is None else self.reduce(name="reduce")(x_bnw)
    query, key = attn.queries_and_keys(x_bnw, keys_bmw, self._positions(tokens))
    if step.fuse is None:
      core = self._core(tokens, query, key)
    else:
      fused, to_fused = step.fuse(tokens, query, key, site.prefix)
      x_bnw = keys_bmw = norm1(fused.x)
      if to_fused is None:
        query, key = attn.queries_and_keys(x_bnw, keys_bmw, self._positions(fused))
        core = self._core(fused, query, key)
      else:
        core = to_fused(self._core(tokens, query, key))
      tokens = fused
    y_bnw = attn.attend(query, key, attn.value(keys_bmw), core, x_bnw)
    y_bnw = y_bnw if site.layer_scale is None else LayerScale(site.layer_scale, name="ls1")(y_bnw)
    tokens = tokens.replace(x=tokens.x + drop(name="drop1")(y_bnw, train) / self.skip_lam)
    if step.after_attention is not None:
      tokens = step.after_attention(tokens, query, key, site.prefix)
    y_bnw = ffn_branch(site, self.methods, norm, tokens.x, tokens.paths, train)
    tokens = tokens.replace(x=tokens.x + drop(name="drop2")(y_bnw, train) / self.skip_lam)
    if step.after_block is not None:
      tokens = step.after_block(tokens, query, key, site.prefix)
    return tokens

  @nn.nowrap
  def _positions(self, tokens: Tokens):
    """Returns positions of the tokens in the image, for rotary positions; None without these."""
    site = self.site
    if site.rotary is None:
      return None
    return rotary.token_positions(
        tokens, rotary.grid_positions(site.query_grid, site.prefix, site.rotary_grid))

  @nn.nowrap
  def _core(self, tokens: Tokens, query, key) -> Core:
    """Returns the attention over these tokens, restricted by the method of the attention axis."""
    return restrict(self.site, self.methods.attention, tokens.core(), query, key, tokens.source,
                    tokens.fused)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, stats) of the deployed block."""
    return fold(self.site, self.methods, params, stats)


def restrict(site: Site, method, core: Core, query, key, source=None, fused: bool = False) -> Core:
  """Returns the attention restricted by `method`. Must be called from an `nn.compact` method."""
  if method is None:
    return core
  return method.make(site, name=protocol.scope_of(method))(core, query, key, source, fused)


def make_ffn(site: Site, method, **kwargs) -> nn.Module:
  """Makes the FFN of a block: the method's, or fc1 and fc2 as dense layers."""
  if method is not None:
    return method.make(site, **kwargs)
  layers = {name: ffn_layer(site, name) for name in ("fc1", "fc2")}
  return Mlp(**layers, **site.mlp_options(), **kwargs)


def ffn_branch(site: Site, methods: BlockMethods, norm, x, paths, train: bool):
  """Returns what the FFN adds to x (B, ..., ffn_width). Call it from an `nn.compact` method.

  norm: makes the block's norms; None: they are folded into the layers after them. paths: which
  tokens take the FFN, see `token_state.Paths`.
  """
  norm2 = norm and norm(name="norm2")
  mlp = make_ffn(site, methods.ffn, name="mlp")
  scale = None if site.layer_scale is None else LayerScale(site.layer_scale, name="ls2")

  def full(x, train, mix=None):
    # Only an Mlp mixes tokens.
    mixes = {} if mix is None or not isinstance(mlp, Mlp) else {"mix": mix}
    y = mlp(apply_norm(norm2, x, train), train, **mixes)
    return y if scale is None else scale(y)

  step = methods.reduction(site)
  if step.ffn is None:
    return full(x, train)
  two_paths = step.ffn(norm and norm(parent=None), dtype=site.dtype, name="fast_path")
  return two_paths(full, x.reshape(x.shape[0], -1, x.shape[-1]), paths, train).reshape(x.shape)


def from_dense(site: Site, methods: BlockMethods, params, stats, calibrate=None):
  """Converts (params, stats) of a dense block to a block with these methods, one after the other.

  calibrate: None, or a function (methods applied so far, params, stats) -> `Calibration`. The
  attention axis comes first, then the heads; the input of the FFN depends on both.
  """
  applied = BlockMethods()
  params = without_layer_scale(params, attention=methods.heads is not None,
                               ffn=methods.ffn is not None)
  for axis in ("attention", "heads", "tokens", "ffn"):
    method = getattr(methods, axis)
    if method is not None:
      data = calibrate and calibrate(applied, params, stats)
      params, stats = surgery.from_dense(method, site, params, stats, data)
      applied = applied._replace(**{axis: method})
  return params, stats


def without_layer_scale(params, attention: bool = True, ffn: bool = True):
  """Returns a dense block's parameters with LayerScale 1, folded into the layers before it. A fit
  to the outputs of these layers is then a fit to what the residual stream receives."""
  new = dict(params)
  branches = ("ls1", "attn", "out", attention), ("ls2", "mlp", "fc2", ffn)
  for scale, branch, layer, folded in branches:
    if folded and scale in params:
      gamma = params[scale]["gamma"]
      scaled = {name: leaf * gamma.reshape((1,) * (leaf.ndim - 1) + (-1,))
                for name, leaf in params[branch][layer].items()}
      new |= {branch: {**params[branch], layer: scaled}, scale: {"gamma": jnp.ones_like(gamma)}}
  return new


def fold(site: Site, methods: BlockMethods, params, stats):
  """Returns (params, stats) of a deployed block, folded one method after the other.

  Drops parameters of attention methods that do not act here: they may be left from another plan.
  """
  for method in methods.present():
    params, stats = surgery.fold(method, site, params, stats)
  used = methods.attention and protocol.scope_of(methods.attention)
  absent = {protocol.scope_of(kind) for kind in METHODS["attention"].values()} - {used}
  return {name: leaf for name, leaf in params.items() if name not in absent}, stats


def method_entries(site: Site, methods: BlockMethods, torch: str, ours: str, fc1=("fc1",)):
  """Returns entries of the tensors of a block's methods, and of fc1 and fc2.

  fc1: the names of that layer in the file; several layers hold equal parts of its output.
  """
  inner = torch_names.norm(f"{torch}.mlp.norm", f"{ours}/mlp/norm") if site.ffn_norm else []
  entries = [entry for method in methods.present()
             for entry in surgery.torch_entries(method, site, torch, ours)] + inner
  if methods.ffn is None:
    entries += torch_names.linear_in_parts([f"{torch}.mlp.{name}" for name in fc1],
                                           f"{ours}/mlp/fc1")
    entries += torch_names.linear(f"{torch}.mlp.fc2", f"{ours}/mlp/fc2")
  return entries


def block_entries(block: Block, torch: str, ours: str, layer_scale: str = "ls{}.gamma",
                  fc1=("fc1",), fused: bool = True):
  """Returns entries of the tensors of a `Block` under timm's names; those of methods have our own.
  layer_scale: timm's name of LayerScale, {} being its number; fc1: see `method_entries`; fused:
  whether queries, keys and values are one tensor."""
  site, entries = block.site, []
  if site.qk_norm is not None:
    for name, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
      entries += torch_names.norm(f"{torch}.attn.{theirs}", f"{ours}/attn/{name}")
  if site.layer_scale is not None:
    entries += [Entry(f"{torch}.{layer_scale.format(i)}", (f"params/{ours}/ls{i}/gamma",))
                for i in (1, 2)]
  return [*entries, *torch_names.norm(f"{torch}.norm1", f"{ours}/norm1"),
          *torch_names.qkv(f"{torch}.attn", f"{ours}/attn", fused=fused, use_bias=site.qkv_bias,
                           key_bias=site.key_bias),
          *torch_names.out(f"{torch}.attn.proj", f"{ours}/attn/out"),
          *torch_names.norm(f"{torch}.norm2", f"{ours}/norm2"),
          *method_entries(site, block.methods, torch, ours, fc1)]
