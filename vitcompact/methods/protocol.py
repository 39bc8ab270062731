"""The interface of a method: every member that the library looks for, and its default.

A method makes one axis of a transformer block smaller. It is a frozen dataclass of settings, listed
once in `methods.METHODS` under its axis and name. Plans, blocks, models, counting, conversion and
training use only the members below and know no method by name. Only `axis` and `make` (`reduction`
on the tokens axis) are required.

    axis                                  "heads", "attention", "tokens" or "ffn"
    provenance                            (its paper, what of it is ours), for model cards; not
                                          inherited, see docs/provenance.md for the library's own

What it computes
    make(site, **kwargs) -> nn.Module     the module of one block; kwargs are Linen's name and
                                          parent. The block calls it according to the axis:
      heads      (query, key, value, core, x) -> (B, N, heads, e); queries and keys have
                 `scored_heads` heads, x (B, N, width) is the input of the attention; if
                 `attention.wants_maps`, the module sows its attention maps as "maps"
      attention  (core, query, key, source=None, fused=False) -> core: the same attention restricted
                 to some pairs, or with another operator or a local term, see `attention.Core`; its
                 parameters must not depend on the number of heads, which the heads axis changes
      ffn        (x, train) -> y; replaces the whole FFN. If it is a `layers.Mlp` and x holds only
                 some of the tokens, it also gets `mix`
    reduction(block, depth) -> Reduction  tokens: what happens in a block, see `token_state`
    scored_heads(site) -> int             heads: how many have queries and keys (default: all)
    active_heads(site) -> int             heads: how many of the heads with values a token uses
                                          (default: all); see `ideal_macs` of `count`
    value_heads(site) -> int              heads: how many have values and outputs (default: all)
    scope                                 name of its parameters: attn/SCOPE for heads, SCOPE in the
                                          block for attention (default: the method's name)
    heads, ffn                            a field named after the method's own axis holds another
                                          method of that axis that this one wraps (`inner`), or
                                          None. By default check, scored_heads, value_heads, needs,
                                          removes, mergeable, merge and fold are inherited from it
    inner_site(site) -> Site              the block as the inner method sees it (default: the same)
    acts(site) -> bool                    whether it does anything in this block (default: yes)
    check(site)                           raises ValueError or warns if it does not fit a block

Which plans are legal
    needs(site) -> {capability: hint}     keys of CAPABILITIES that the block must have; the hint
                                          ends the error message. Every method of the attention axis
                                          also needs "full attention"
    removes(site) -> (capability, ...)    what it takes from the other methods of this block; on the
                                          tokens axis, also from those of all later blocks

Its parameters
    rules                                 [(pattern, trees.Leaf)]: sharding and weight decay of
                                          parameters by whole name (blocks_0/attn/SCOPE/kernel);
                                          default: those of all models, then: kernels decay
    from_dense(site, params, stats, data) -> (params, stats)
                                          a block's trees from a dense block's (default: keep leaves
                                          of the same name and shape, draw the others at random);
                                          data: the block on calibration images, a
                                          `calibration.Calibration`, or None
    to_dense(site, params, stats, data) -> (params, stats)
                                          the closest dense block, from which `compact` may start;
                                          data: a `calibration.Calibration` (default: unchanged)
    options(site) -> [method, ...]        candidates for `measure` and a report's plan; for the
                                          tokens axis, the candidates for the whole model, given its
                                          first block (a class method; default: none, so that it is
                                          never proposed)
    statistics(params) -> (function, arguments)
                                          sums over calibration images that `estimate` needs, see
                                          `calibration.Calibration.sums` (a class method)
    estimate(options, site, sums) -> ([error, ...], {name: table})
                                          relative error of each option in this block without
                                          training, and tables for a report (a class method;
                                          default: each option is run and measured)
    fold(site, params, stats) -> (params, stats)
                                          those of the deployed block (default: unchanged)
    torch_entries(site, torch, ours) -> [Entry]
                                          names and layouts in PyTorch files (default: our own); a
                                          method of the ffn axis also lists fc1 and fc2
    mergeable(site) -> (layer, ...)       ffn: layers that may be deployed as one matrix, see
                                          `Site.merged`
    merge(site, params) -> params         ffn: those of one dense layer, from the deployed ones of a
                                          mergeable layer (required if any is mergeable)
    at_keep(keep) -> method               attention: the same method with this share of pairs kept
                                          (None: its own), which sows "target" and "kept"
                                          (B, heads, N, M) in "attention", for drawings
    at_size(site) -> method               the same method, with sizes that would otherwise depend on
                                          the image size fixed at those of this site
    explicit(site) -> method              the same, with "half" as a number (default: unchanged)

How it trains; `settings` are config keys, each with a default
    settings                              {key: Setting}
    losses                                {name: function(Pass) -> () or (B,)}; the weight of a loss
                                          is the setting loss.NAME
    losses_across                         names of the losses that mix the images of a batch
    collections                           Linen collections that its losses or facts read
    at_step(config, step) -> method       the method to train with at a step of the main phase
    second_pass(config, step) -> method   method of a second pass with the same weights, or None
    first_phase                           a FirstPhase (default: None)
    check_training(config)                raises ValueError if settings contradict each other
    facts(collections) -> {name: number}  for the receipt, from one batch through the deployed model
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from vitcompact.layers import GATED, LayerNorm, gelu

# {capability: how an error names it}: what a block may provide, and a method may need or remove.
CAPABILITIES = {
    "attention": "attention",
    "maps": "attention maps over tokens",
    "softmax": "attention by a softmax over scores",
    "all scores": "the scores of all pairs of tokens",
    "full attention": "every token to attend to all",
    "all heads": "the values of all heads",
    "grid": "the whole grid of tokens",
    "token order": "tokens in the order of their positions",
    "token line": "keys in one sequence",
    "class token": "a class token",
    "free tokens": "tokens that may be dropped or merged",
    "paths": "an FFN that some tokens may bypass",
}


class Site(NamedTuple):
  """One block of one model, as a method sees it.

  block: its number out of `depth`, over all stages; first: that of the first block of its stage.
  tokens: number of keys before any token reduction, the first `prefix` of which are not patches;
    tokens_left: that number when the block begins, at the model's image size.
  query_grid, key_grid: (height, width) of the patches among queries and keys; None: no grid.
  ffn_width: channels of the FFN's input and output; hidden: of its hidden layer, the input of fc2.
  head_dim: channels of a head; None: width / heads.
  mixer: makes the module between fc1 and its activation, such as a depthwise convolution. It is
    called with all tokens of the grid (B, N, hidden); or with some of them (B, k, hidden) and their
    positions (B, k): then it takes the other tokens as 0, and returns only these. It multiplies the
    variance (of the gate, if the activation is gated) by mixer_gain.
  key_bias: whether keys have a bias, if qkv_bias is set.
  qk_norm: epsilon of the norms of queries and keys; rotary: temperature of rotary positions,
    rotary_grid: their reference (see `rotary`); layer_scale: initial LayerScale of each branch;
    ffn_norm: epsilon of the norm of the FFN's hidden layer. Each may be None: the block has none.
  ffn_batch_norm: whether fc1 and fc2 each end in a batch norm, which is folded into them.
  query_scale: a factor on queries, on top of the scores' 1 / sqrt(head_width). local: whether a
    local term is added to the outputs of the heads, channel by channel: they cannot be reordered.
  merged: layers of the FFN that are deployed as one matrix, see `execution.Execution`.
  batch_norm: whether its norms are batch norms, which folding removes.
  """
  block: int
  depth: int
  width: int
  ffn_width: int
  hidden: int
  first: int = 0
  heads: int = 1
  head_dim: int | None = None
  tokens: int = 0
  tokens_left: int = 0
  prefix: int = 0
  query_grid: tuple[int, int] | None = None
  key_grid: tuple[int, int] | None = None
  provides: frozenset[str] = frozenset()
  act: Callable = gelu
  mixer: Callable[..., nn.Module] | None = None
  mixer_gain: int = 1
  qkv_bias: bool = True
  key_bias: bool = True
  qk_norm: float | None = None
  rotary: float | None = None
  rotary_grid: int | None = None
  layer_scale: float | None = None
  ffn_norm: float | None = None
  ffn_batch_norm: bool = False
  query_scale: float = 1.0
  local: bool = False
  form: str | None = None
  merged: tuple[str, ...] = ()
  batch_norm: bool = False
  deploy: bool = False
  dtype: str = "float32"

  @property
  def head_width(self) -> int:
    return self.head_dim or self.width // self.heads

  @property
  def fc1_width(self) -> int:
    """Outputs of fc1: twice the hidden width if the activation is gated."""
    return self.hidden * (2 if self.act in GATED else 1)

  def mlp_options(self) -> dict[str, Any]:
    """Returns the activation, mixer and norm of an `Mlp`; modules are not bound to a parent."""
    norm = self.ffn_norm and LayerNorm(self.ffn_norm, self.dtype, parent=None)
    return {"act": self.act, "mixer": self.mixer and self.mixer(parent=None), "norm": norm}

  @property
  def queries(self) -> int:
    """Number of tokens that attend."""
    if self.query_grid is None:
      return self.tokens
    return self.prefix + self.query_grid[0] * self.query_grid[1]


class Pass(NamedTuple):
  """The arguments of a loss: one forward pass in training.

  collections: what was sown; logits (B, K); labels (B,) int; second: of the second pass, or None.
  """
  collections: Mapping[str, Any]
  logits: jax.Array
  labels: jax.Array
  second: "Pass | None" = None


class FirstPhase(NamedTuple):
  """A phase before the main one, in which only a method's own parameters are trained.

  section: of the config. `settings` must list its keys: SECTION.steps, .weight, .learning_rate,
    .warmup_steps, .warmup_learning_rate and .final_learning_rate. parameters: a pattern; the
    parameters whose whole name matches it are trained in this phase and in no other.
  method: maps the method to its form in this phase, in which every token is kept.
  loss: function(collections) -> (B,).
  """
  section: str
  parameters: str
  method: Callable[[Any], Any]
  loss: Callable[[Mapping[str, Any]], jax.Array]


def scope_of(method) -> str:
  """Returns the name under which a method, or its class, has its parameters."""
  if method.axis in ("tokens", "ffn"):
    return {"tokens": "predict_tokens", "ffn": "mlp"}[method.axis]
  kind = method if isinstance(method, type) else type(method)
  return getattr(method, "scope", kind.__name__.lower())


def inner(method):
  """Returns the method of the same axis that a method wraps, or None."""
  return getattr(method, method.axis, None)


def inner_and_site(method, site: Site):
  """Returns (the method that this one wraps, the block as the inner method sees it); (None, site)
  if there is no inner method or it does nothing in this block."""
  wrapped, site_inside = inner(method), inner_site(method, site)
  if wrapped is not None and acts(wrapped, site_inside):
    return wrapped, site_inside
  return None, site


def _call_member(member: str, default: Callable):
  """Returns a function (method, ...) that calls this member of the method, or else the default."""
  def call(method, *arguments):
    if hasattr(method, member):
      return getattr(method, member)(*arguments)
    return default(method, *arguments)
  return call


def _call_member_or_inner(member: str, default: Callable):
  """Returns the same for a member (site, ...) that a method inherits from its inner method."""
  def call_inner(method, site, *rest):
    wrapped, inside = inner_and_site(method, site)
    return default(method, site, *rest) if wrapped is None else call(wrapped, inside, *rest)
  call = _call_member(member, call_inner)
  return call


def _read_member(member: str, default):
  """Returns a function that reads this member of a method or its class, or else the default."""
  return lambda method: getattr(method, member, default)


acts = _call_member("acts", lambda method, site: True)
inner_site = _call_member("inner_site", lambda method, site: site)
check = _call_member_or_inner("check", lambda method, site: None)
scored_heads = _call_member_or_inner("scored_heads", lambda method, site: site.heads)
value_heads = _call_member_or_inner("value_heads", lambda method, site: site.heads)
active_heads = _call_member("active_heads", lambda method, site: value_heads(method, site))
needs = _call_member_or_inner("needs", lambda method, site: {})
removes = _call_member_or_inner("removes", lambda method, site: ())
options = _call_member("options", lambda kind, site: [])
statistics = _call_member("statistics", lambda kind, params: None)
estimate = _call_member("estimate", lambda kind, options, site, sums: (None, {}))
to_dense = _call_member("to_dense", lambda method, site, params, stats, data: (params, stats))
mergeable = _call_member_or_inner("mergeable", lambda method, site: ())
merge = _call_member_or_inner("merge", lambda method, site, params: params)
at_size = _call_member("at_size", lambda method, site: method)
explicit = _call_member("explicit", lambda method, site: method)
at_step = _call_member("at_step", lambda method, config, step: method)
second_pass = _call_member("second_pass", lambda method, config, step: None)
check_training = _call_member("check_training", lambda method, config: None)
facts = _call_member("facts", lambda method, collections: {})
at_keep = _read_member("at_keep", None)
settings = _read_member("settings", {})
losses = _read_member("losses", {})
losses_across = _read_member("losses_across", ())
collections = _read_member("collections", ())
first_phase = _read_member("first_phase", None)
