"""What a method is: everything that the library asks of one, and what it does where a method is
silent.

A method makes one axis of a transformer block smaller. It is a frozen dataclass of settings, listed
once in `methods.METHODS` under its axis and name; plans, blocks, models, counting, conversion and
training loop over these members and know no method by name. Only `axis` and the makers are
required.

    axis                                  "heads", "attention", "tokens" or "ffn"

What it computes
    make(site, **kwargs) -> nn.Module     the module of one block; kwargs are Linen's name and
                                          parent. By axis it is called as
      heads      (query, key, value, core, x) -> (B, N, heads, e); queries and keys are those of
                 `scored_heads` heads, x (B, N, width) is the input of the attention; where maps are
                 to be looked at (`attention.wants_maps`) it sows its own as "maps"
      attention  (core, query, key, source, fused) -> core, the attention of this call restricted,
                 or with another operator or a local term, see `attention.Core`
      ffn        (x, train) -> y; takes the place of the whole FFN. Where a method of the tokens
                 axis gives it some of the tokens only, a `layers.Mlp` is told how to mix these
    reduction(block, depth) -> Reduction  tokens: what happens in a block, see `token_state`
    scored_heads(site) -> int             heads: how many have queries and keys (default: all)
    active_heads(site) -> int             heads: how many serve a token, of those with values
                                          (default: all); what others compute is not needed
    value_heads(site) -> int              heads: how many have values and outputs (default: all)
    scope                                 name of its parameters: attn/SCOPE for heads, SCOPE in the
                                          block for attention (default: the method's name)
    heads, ffn                            a field of this name, the axis' own, holds None or another
                                          method of the axis that it is made around (`inner`). Where
                                          it says nothing itself of check, heads, needs, removes,
                                          mergeable and fold, that one is asked
    inside(site) -> Site                  the block as the method inside sees it (default: the same)
    acts(site) -> bool                    whether it does anything in this block (default: yes)
    check(site)                           raises ValueError or warns where it does not fit a block

Which plans are legal
    needs(site) -> {what: way out}        of CAPABILITIES; the way out ends the error's sentence;
                                          the attention axis needs "full attention" besides
    removes(site) -> (what, ...)          what others in this block no longer have; of a method of
                                          the tokens axis, nor in the blocks after it

Its parameters
    rules                                 [(pattern, trees.Leaf)]: sharding and weight decay
                                          (default: those that all models share, else neither)
    from_dense(site, params, stats, data) -> (params, stats)
                                          a block's trees from a dense block's (default: what has
                                          the same name and shape is kept, the rest freshly drawn);
                                          data: the block on calibration images, see
                                          `calibration.Calibration`, or None
    to_dense(site, params, stats, data) -> (params, stats)
                                          the dense block that comes closest, from which `compact`
                                          may start; data: a `calibration.Calibration` (default: it
                                          has none)
    options(site) -> [method, ...]        from which `measure` and a report's plan choose; of the
                                          tokens axis, for the whole model, from its first block
                                          (a class method; default: none, it is not proposed)
    statistics(params) -> (function, arguments)
                                          sums over calibration images that an estimate is made of,
                                          see `calibration.Calibration.sums` (a class method)
    estimate(options, site, sums) -> ([error, ...], {name: table})
                                          what each option loses here, in proportion, without any
                                          training; and tables for a report (a class method;
                                          default: each is tried)
    fold(site, params, stats) -> (params, stats)
                                          the deployed block's (default: unchanged)
    torch_entries(site, torch, ours) -> [Entry]
                                          names and layouts in PyTorch files (default: our own); a
                                          method of the ffn axis lists fc1 and fc2 as well
    mergeable(site) -> (layer, ...)       ffn: layers that may be deployed as one matrix, see
                                          `Site.merged`
    at_size(site) -> method               itself with sizes that would follow the image written out

How it trains; `settings` are a config's keys, absent ones have these defaults
    settings                              {key: Setting}
    losses                                {name: function(Pass) -> () or (B,)}; the weight of a loss
                                          is the setting loss.NAME
    losses_across                         names of those in which the images of a batch meet
    collections                           Linen collections that its losses or facts read
    at_step(config, step) -> method       what trains at a step of the main phase
    second_pass(config, step) -> method   of a second forward pass with the same weights, or None
    first_phase                           a FirstPhase (default: None)
    check_training(config)                raises ValueError where settings do not go together
    facts(collections) -> {name: number}  for the receipt, from one batch of inference
"""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from vitcompact.layers import GATED, LayerNorm, gelu

# What a block may have and a method may need or remove.
CAPABILITIES = {
    "attention": "attention",
    "maps": "attention maps over tokens",
    "softmax": "attention by a softmax over scores",
    "all scores": "the scores of all pairs of tokens",
    "full attention": "every token to attend to all",
    "all heads": "the values of all heads",
    "grid": "the whole grid of tokens",
    "token order": "tokens in the order of their positions",
    "token line": "keys in one line of tokens",
    "class token": "a class token",
    "free tokens": "tokens that may be dropped or merged",
    "paths": "an FFN that some tokens may pass by",
}


class Site(NamedTuple):
  """One block of one model, as a method sees it.

  block: its number, of `depth`, counted over all stages. first: the block from which on tokens
    come here as they are, on the same grid and as wide.
  tokens: keys before any token is reduced, the first `prefix` of which are no patches; tokens_left:
    when the block begins, at the image size that the model was made for.
  query_grid, key_grid: (height, width) of the patches on each side; None where a side has no grid.
  ffn_width: of the FFN's input and output; hidden: of its hidden layer, the input of fc2.
  head_dim: channels of a head; None: width / heads.
  mixer: makes the module between fc1 and its activation, whose output has mixer_gain times the
    variance, of a gated activation the gate. It is called with all tokens of the grid (B, N,
    hidden), or with some (B, k, hidden) and their places (B, k): then the others are 0, and only
    these come out.
  key_bias: whether keys have one, where qkv_bias says that queries and values do.
  qk_norm: epsilon of the norms of queries and keys; rotary: temperature of rotary positions,
    rotary_grid: their reference (see `rotary`); layer_scale: initial factor of what each branch
    gives; ffn_norm: epsilon of the norm of the FFN's hidden layer; None: it has none.
  ffn_batch_norm: whether fc1 and fc2 each end in a batch norm, which is folded into them.
  query_scale: a factor of queries, besides 1 / sqrt(head_width) of scores. local: whether something
    of as many channels is added to what the heads give, so that heads cannot change places.
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
    """Outputs of fc1: twice the hidden layer where its activation is gated."""
    return self.hidden * (2 if self.act in GATED else 1)

  def between(self) -> dict[str, Any]:
    """What an `Mlp` has between its two layers; modules are not bound to a parent."""
    norm = self.ffn_norm and LayerNorm(self.ffn_norm, self.dtype, parent=None)
    return {"act": self.act, "mixer": self.mixer and self.mixer(parent=None), "norm": norm}

  @property
  def queries(self) -> int:
    """Tokens that attend."""
    if self.query_grid is None:
      return self.tokens
    return self.prefix + self.query_grid[0] * self.query_grid[1]


class Pass(NamedTuple):
  """What a loss sees of one forward pass in training.

  collections: what was sown; logits (B, K) of the class guess; labels (B,) int; second: the Pass of
  the second forward pass, None without one.
  """
  collections: Mapping[str, Any]
  logits: jax.Array
  labels: jax.Array
  second: "Pass | None" = None


class FirstPhase(NamedTuple):
  """A phase before the main one, in which a method's own parameters learn and nothing else does.

  section: of the config; it holds `steps`, `weight` and the learning rates. parameters: the method
    trains those that this pattern matches, in this phase only.
  method: maps the method to its form in this phase; every token is kept in it.
  loss: function(collections) -> (B,).
  """
  section: str
  parameters: str
  method: Callable[[Any], Any]
  loss: Callable[[Mapping[str, Any]], jax.Array]


def check_class(kind: type, axis: str):
  """Raises ValueError, one line, where a listed class is no method of this axis."""
  maker = "reduction" if axis == "tokens" else "make"
  faults = {
      "must be a frozen dataclass: @dataclasses.dataclass(frozen=True)":
          not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen,
      f"must have axis = {axis!r}": getattr(kind, "axis", None) != axis,
      f"must have a method {maker}, see vitcompact/methods/protocol.py": not hasattr(kind, maker)}
  if found := [fault for fault, here in faults.items() if here]:
    raise ValueError(f"{kind.__name__}, listed in METHODS[{axis!r}]: {found[0]}")


def scope_of(method) -> str:
  """Where the own parameters of a method, or of its class, lie."""
  if method.axis in ("tokens", "ffn"):
    return {"tokens": "predict_tokens", "ffn": "mlp"}[method.axis]
  kind = method if isinstance(method, type) else type(method)
  return getattr(method, "scope", kind.__name__.lower())


def inner(method):
  """The method of its own axis that a method is made around, or None."""
  return getattr(method, method.axis, None)


def around(method, site: Site):
  """(the method that this one is made around, the block as that one sees it); (None, site) where
  there is none, or none that acts."""
  other, seen = inner(method), inside(method, site)
  return (other, seen) if other is not None and acts(other, seen) else (None, site)


def _asked(member: str, default: Callable):
  """A function (method, ...) that calls a member of a method, or the default where it has none."""
  def ask(method, *arguments):
    if hasattr(method, member):
      return getattr(method, member)(*arguments)
    return default(method, *arguments)
  return ask


def _asked_of_both(member: str, default: Callable):
  """The same of members (site); a method that lacks it answers as the one that it is made around.
  """
  def otherwise(method, site):
    other, seen = around(method, site)
    return default(method, site) if other is None else ask(other, seen)
  ask = _asked(member, otherwise)
  return ask


def _told(member: str, default):
  """A function of a method, or of its class, that reads a member, or gives the default."""
  return lambda method: getattr(method, member, default)


acts = _asked("acts", lambda method, site: True)
inside = _asked("inside", lambda method, site: site)
check = _asked_of_both("check", lambda method, site: None)
scored_heads = _asked_of_both("scored_heads", lambda method, site: site.heads)
value_heads = _asked_of_both("value_heads", lambda method, site: site.heads)
active_heads = _asked("active_heads", lambda method, site: value_heads(method, site))
needs = _asked_of_both("needs", lambda method, site: {})
removes = _asked_of_both("removes", lambda method, site: ())
options = _asked("options", lambda kind, site: [])
statistics = _asked("statistics", lambda kind, params: None)
estimate = _asked("estimate", lambda kind, options, site, sums: (None, {}))
to_dense = _asked("to_dense", lambda method, site, params, stats, data: (params, stats))
mergeable = _asked_of_both("mergeable", lambda method, site: ())
at_size = _asked("at_size", lambda method, site: method)
at_step = _asked("at_step", lambda method, config, step: method)
second_pass = _asked("second_pass", lambda method, config, step: None)
check_training = _asked("check_training", lambda method, config: None)
facts = _asked("facts", lambda method, collections: {})
settings = _told("settings", {})
losses = _told("losses", {})
losses_across = _told("losses_across", ())
collections = _told("collections", ())
first_phase = _told("first_phase", None)
