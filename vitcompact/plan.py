"""Plan: which method each axis of a block uses, for all blocks or block by block."""
import dataclasses
import difflib
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax.core import FrozenDict

from vitcompact import token_state
from vitcompact.attention import FORMS
from vitcompact.methods.attention.sparsifiner import Sparsifiner
from vitcompact.methods.ffn.cffn import CFFN
from vitcompact.methods.heads.hmhsa import HMHSA
from vitcompact.methods.tokens.dynamicvit import DynamicViT
from vitcompact.methods.tokens.evit import EViT
from vitcompact.methods.tokens.mctf import MCTF
from vitcompact.methods.tokens.tome import ToMe

# axis -> {name in JSON: the method's spec}
METHODS = {"heads": {"hmhsa": HMHSA}, "links": {"sparsifiner": Sparsifiner},
           "tokens": {"evit": EViT, "dynamicvit": DynamicViT, "tome": ToMe, "mctf": MCTF},
           "ffn": {"cffn": CFFN}}
# A method of the tokens axis acts on the whole sequence of blocks, and names its own.
BY_BLOCK = ("heads", "links", "ffn")


class BlockPlan(NamedTuple):
  """The methods of one block; None is dense. backend: how its attention is computed, see `Plan`."""
  heads: HMHSA | None = None
  links: Sparsifiner | None = None
  ffn: CFFN | None = None
  backend: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """A method for each axis; `Plan()` is the dense model.

  heads, links, ffn: the default of every block; None is dense.
  tokens: a reducer, which carries the blocks that it acts in; None keeps every token.
  blocks: {block: {axis: method or None}}, overrides; an axis that is absent has the default.
    Blocks are numbered 0..depth-1 over all stages in order.
  backends: {block: attention backend}, one of `attention.FORMS`: the same function, computed in
    another way. `tune` chooses them by measuring; a block that is absent leaves it to the core.
  at_a_time: inference computes so many images of a batch after another; None: all at once. Chosen
    by `tune` likewise.

  >>> Plan(heads=HMHSA(), ffn=CFFN(rank_ratio=0.5), blocks={0: {"heads": None}})
  """
  heads: HMHSA | None = None
  links: Sparsifiner | None = None
  tokens: EViT | DynamicViT | ToMe | MCTF | None = None
  ffn: CFFN | None = None
  blocks: Mapping[int, Mapping[str, Any]] = FrozenDict()
  backends: Mapping[int, str] = FrozenDict()
  at_a_time: int | None = None

  def __post_init__(self):
    _check_axes({axis: getattr(self, axis) for axis in METHODS}, "Plan")
    if not isinstance(self.blocks, Mapping):
      raise ValueError(f"Plan(blocks={self.blocks!r}): must be a dict such as "
                       "{7: {'heads': None}}")
    blocks = {}
    for block, axes in self.blocks.items():
      _check_block("blocks", block)
      if not isinstance(axes, Mapping):
        raise ValueError(f"Plan(blocks={{{block}: {axes!r}}}): must be a dict of axes, such as "
                         "{'heads': None}")
      _check_names(axes, BY_BLOCK, f"Plan, block {block}")
      _check_axes(axes, f"Plan, block {block}")
      blocks[block] = FrozenDict(axes)
    object.__setattr__(self, "blocks", FrozenDict(sorted(blocks.items())))
    for block, name in self.backends.items():
      _check_block("backends", block)
      if name not in FORMS:
        raise ValueError(f"Plan(backends={{{block}: {name!r}}}): must be one of "
                         f"{', '.join(FORMS)}")
    object.__setattr__(self, "backends", FrozenDict(sorted(self.backends.items())))
    if self.at_a_time is not None and not (type(self.at_a_time) is int and self.at_a_time > 0):
      raise ValueError(f"Plan(at_a_time={self.at_a_time!r}): must be a whole number of images, at "
                       "least 1, or None")

  def at(self, block: int) -> BlockPlan:
    """The methods of one block."""
    default = {axis: getattr(self, axis) for axis in BY_BLOCK}
    return BlockPlan(**{**default, **self.blocks.get(block, {})}, backend=self.backends.get(block))

  def check_depth(self, depth: int):
    """Raises ValueError when the plan does not fit a model of this many blocks."""
    named = [*self.blocks, *self.backends, *(getattr(self.tokens, "blocks", None) or ())]
    missing = [block for block in named if block >= depth]
    if missing:
      raise ValueError(f"the plan names block {missing[0]}, but the model has blocks 0 to "
                       f"{depth - 1}")
    for block in range(depth):
      heads, links, *_ = self.at(block)
      if heads and links and heads.site == "logits" and links.granularity == "block":
        raise ValueError(f"HMHSA(site='logits') and Sparsifiner(granularity='block') in block "
                         f"{block}: a filter over scores needs them all; use site='probs', or "
                         "granularity='token'")
    first = next((i for i in range(depth) if self.reduction(i, depth) != token_state.NOTHING), depth)
    for block in range(first, depth):
      heads = self.at(block).heads
      if heads is not None and heads.layout == "grid":
        raise ValueError(f"HMHSA(layout='grid') in block {block}: from block {first} on, where "
                         f"{type(self.tokens).__name__} reduces tokens, there is no grid; use "
                         "layout='map' there")
      if heads is not None and getattr(self.tokens, "order", "position") == "code":
        raise ValueError(f"HMHSA in block {block} filters along positions, and {self.tokens} puts "
                         "tokens in another order; use order='position'")
      if self.at(block).links is not None and isinstance(self.tokens, MCTF):
        raise ValueError(f"Sparsifiner in block {block}: from block {first} on, MCTF fuses tokens "
                         "by the attention that each receives from all, which linked attention "
                         f"does not compute; use blocks={{{block}: {{'links': None}}}}, or ToMe")

  def check_grid(self, depth: int, model: str):
    """`check_depth`, for a model whose blocks need the whole grid of tokens."""
    if self.tokens is not None:
      raise ValueError(f"tokens={self.tokens}: {model or 'this model'} is hierarchical and needs "
                       "its whole grid; token reducers are for DeiT and LV-ViT")
    self.check_depth(depth)

  def with_links(self, **fields) -> "Plan":
    """The plan with these fields in each of its Sparsifiners, such as masked=False."""
    def changed(spec):
      return None if spec is None else dataclasses.replace(spec, **fields)
    blocks = {block: {axis: changed(spec) if axis == "links" else spec
                      for axis, spec in axes.items()} for block, axes in self.blocks.items()}
    return dataclasses.replace(self, links=changed(self.links), blocks=blocks)

  def reduction(self, block: int, depth: int) -> token_state.Reduction:
    """What the tokens axis does in a block."""
    return token_state.NOTHING if self.tokens is None else self.tokens.reduction(block, depth)

  def tokens_left(self, block: int, depth: int, tokens: int, prefix: int) -> int:
    """How many of so many tokens are left when a block begins."""
    return tokens if self.tokens is None else _lengths(self, depth, tokens, prefix)[block]

  def to_json(self) -> str:
    blocks = {str(block): {axis: _to_dict(spec) for axis, spec in axes.items()}
              for block, axes in self.blocks.items()}
    out = {**{axis: _to_dict(getattr(self, axis)) for axis in METHODS}, "blocks": blocks,
           "backends": {str(block): name for block, name in self.backends.items()},
           "at_a_time": self.at_a_time}
    return json.dumps({key: value for key, value in out.items() if value})

  @classmethod
  def from_json(cls, text: str) -> "Plan":
    """Inverse of `to_json`: {"heads": {"method": "hmhsa", ...}, "blocks": {"7": {...}}}."""
    try:
      tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
      raise ValueError(f"a plan must be JSON: {error}; got {text[:60]!r}") from None
    if not isinstance(tree, dict):
      raise ValueError(f"a plan must be a JSON object, got {text[:60]!r}")
    _check_names(tree, {*METHODS, "blocks", "backends", "at_a_time"}, "plan")
    blocks, backends = tree.pop("blocks", {}), tree.pop("backends", {})
    at_a_time = tree.pop("at_a_time", None)
    if not isinstance(blocks, dict) or not all(isinstance(axes, dict) for axes in blocks.values()):
      raise ValueError(f'plan, blocks={blocks!r}: must be an object such as '
                       '{"7": {"heads": null}}')
    if not isinstance(backends, dict):
      raise ValueError(f'plan, backends={backends!r}: must be an object such as {{"7": "tiled"}}')
    for block in (*blocks, *backends):
      if not block.isdecimal():
        raise ValueError(f"plan: {block!r} is not a block number; blocks are 0, 1, 2, ...")
    for block, axes in blocks.items():
      _check_names(axes, BY_BLOCK, f"plan, block {block}")
    return cls(**{axis: _from_dict(axis, spec) for axis, spec in tree.items()},
               blocks={int(block): {axis: _from_dict(axis, spec) for axis, spec in axes.items()}
                       for block, axes in blocks.items()},
               backends={int(block): name for block, name in backends.items()},
               at_a_time=at_a_time)

  @classmethod
  def parse(cls, text: str) -> "Plan":
    """A plan from a config's string: "" is dense; a path that ends in .json; or JSON itself."""
    if not text.strip():
      return cls()
    if text.endswith(".json"):
      path = pathlib.Path(text)
      if not path.is_file():
        raise ValueError(f"plan={text!r}: no such file; give a path to a JSON plan, or JSON itself")
      text = path.read_text()
    return cls.from_json(text)


@functools.lru_cache
def _lengths(plan: Plan, depth: int, tokens: int, prefix: int) -> list[int]:
  """Tokens before each block and behind the last: the reductions followed, shapes only."""
  state, lengths = token_state.Tokens(jax.ShapeDtypeStruct((1, tokens, 8), "float32")), [tokens]
  for i in range(depth):
    state = token_state.shapes_after(plan.reduction(i, depth), state, prefix)
    lengths.append(state.x.shape[1])
  return lengths


def _check_block(field: str, block):
  if not isinstance(block, int) or isinstance(block, bool) or block < 0:
    raise ValueError(f"Plan({field}={{{block!r}: ...}}): blocks are numbered 0, 1, 2, ...")


def _check_axes(axes: Mapping, where: str):
  _check_names(axes, METHODS, where)
  for axis, spec in axes.items():
    if spec is not None and not isinstance(spec, tuple(METHODS[axis].values())):
      known = ", ".join(kind.__name__ for kind in METHODS[axis].values())
      raise ValueError(f"{where}: {axis}={spec!r} is not a method of this axis; use {known}(...) "
                       "or None")


def _check_names(got, known, where: str):
  for name in got:
    if name not in known:
      close = difflib.get_close_matches(str(name), known, n=1)
      hint = f"did you mean {close[0]!r}?" if close else f"use one of {sorted(known)}"
      raise ValueError(f"{where}: unknown name {name!r}; {hint}")


def _to_dict(spec):
  if spec is None:
    return None
  # Fields that are empty until something is chosen are left out while they are.
  empty = {field.name for field in dataclasses.fields(spec) if field.default == ()}
  return {"method": type(spec).__name__.lower(),
          **{name: value for name, value in dataclasses.asdict(spec).items()
             if value != () or name not in empty}}


def _from_dict(axis: str, spec):
  if spec is None:
    return None
  methods = METHODS[axis]
  if not isinstance(spec, dict) or not isinstance(spec.get("method"), str):
    raise ValueError(f'plan, {axis}={spec!r}: must be null or an object such as '
                     f'{{"method": "{next(iter(methods))}"}}')
  _check_names([spec["method"]], methods, f"plan, {axis}, method")
  kind = methods[spec["method"]]
  fields = {key: value for key, value in spec.items() if key != "method"}
  _check_names(fields, [field.name for field in dataclasses.fields(kind)], f"plan, {axis}")
  return kind(**{key: tuple(value) if isinstance(value, list) else value
                 for key, value in fields.items()})
