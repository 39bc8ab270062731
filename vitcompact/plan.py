"""Plan: which method each axis of a block uses, for all blocks or block by block."""
import dataclasses
import difflib
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax.core import FrozenDict

from vitcompact import token_state
from vitcompact.methods import METHODS, check_class, protocol
from vitcompact.methods.protocol import CAPABILITIES, Site
from vitcompact.trees import Leaf

# The tokens axis has no per-block entry: a reducer names the blocks that it acts in.
BY_BLOCK = ("heads", "attention", "ffn")


class BlockMethods(NamedTuple):
  """The methods of one block; None means dense."""
  heads: Any = None
  attention: Any = None
  tokens: Any = None
  ffn: Any = None

  def present(self) -> list:
    return [method for method in self if method is not None]

  def reduction(self, site: Site) -> token_state.Reduction:
    """What the tokens axis does in the block."""
    return (token_state.NOTHING if self.tokens is None else
            self.tokens.reduction(site.block, site.depth))


@dataclasses.dataclass(frozen=True)
class Plan:
  """A method for each axis; `Plan()` is the dense model.

  heads, attention, ffn: the default for every block; None means dense.
  tokens: a reducer, which names the blocks that it acts in; None keeps every token.
  blocks: {block: {axis: method or None}}, overrides for single blocks; an absent axis has the
    default. Blocks are numbered 0..depth-1 over all stages in order.

  >>> Plan(heads=HMHSA(), ffn=CFFN(rank_ratio=0.5), blocks={0: {"heads": None}})
  """
  heads: Any = None
  attention: Any = None
  tokens: Any = None
  ffn: Any = None
  blocks: Mapping[int, Mapping[str, Any]] = FrozenDict()

  def __post_init__(self):
    _check_axes({axis: getattr(self, axis) for axis in METHODS}, "Plan")
    if not isinstance(self.blocks, Mapping):
      raise ValueError(f"Plan(blocks={self.blocks!r}): must be a dict such as "
                       "{7: {'heads': None}}")
    blocks = {}
    for block, axes in self.blocks.items():
      if not isinstance(block, int) or isinstance(block, bool) or block < 0:
        raise ValueError(f"Plan(blocks={{{block!r}: ...}}): blocks are numbered 0, 1, 2, ...")
      if not isinstance(axes, Mapping):
        raise ValueError(f"Plan(blocks={{{block}: {axes!r}}}): must be a dict of axes, such as "
                         "{'heads': None}")
      _check_names(axes, BY_BLOCK, f"Plan, block {block}")
      _check_axes(axes, f"Plan, block {block}")
      blocks[block] = FrozenDict(axes)
    object.__setattr__(self, "blocks", FrozenDict(sorted(blocks.items())))

  def methods(self) -> list:
    """The distinct methods of the plan, in the order of the axes; a wrapping method comes first."""
    methods = [getattr(self, axis) for axis in METHODS]
    methods += [method for axes in self.blocks.values() for method in axes.values()]
    return list(dict.fromkeys(nested for method in methods for nested in with_inner(method)))

  def parameter_rules(self, shared: list[tuple[str, Leaf]]) -> list[tuple[str, Leaf]]:
    """[(pattern, Leaf)]: the methods' rules, `shared`, and a default for methods without rules."""
    methods, default = self.methods(), ((r"(.*/)?kernel", Leaf(decay=True)), (".*", Leaf()))
    return [*(rule for method in methods for rule in getattr(method, "rules", ())), *shared,
            *((rf"(.*/)?{protocol.scope_of(method)}/{pattern}", leaf) for method in methods
              for pattern, leaf in default if not hasattr(method, "rules"))]

  def planned(self, block: int) -> BlockMethods:
    """The methods that the plan names for a block, whether or not they act there."""
    axes = {axis: getattr(self, axis) for axis in METHODS}
    return BlockMethods(**{**axes, **self.blocks.get(block, {})})

  def at(self, site: Site) -> BlockMethods:
    """The methods that act in a block."""
    methods = self.planned(site.block)
    if "attention" not in site.provides:
      methods = methods._replace(heads=None, attention=None)
    return BlockMethods(*(None if method is None or not protocol.acts(method, site) else method
                          for method in methods))

  def check(self, sites: Sequence[Site], model: str):
    """Raises ValueError, with the reason, if the plan does not fit a model with these blocks."""
    depth = len(sites)
    named_blocks = [*self.blocks, *(getattr(self.tokens, "blocks", None) or ())]
    if missing := [block for block in named_blocks if block >= depth]:
      raise ValueError(f"the plan names block {missing[0]}, but the model has blocks 0 to "
                       f"{depth - 1}")
    removed = {}   # by reducers in earlier blocks: {capability: (method, first block)}
    for site in sites:
      self._check_attends(site, sites)
      methods = self.at(site)
      if methods.reduction(site) == token_state.NOTHING:
        methods = methods._replace(tokens=None)
      for method in methods.present():
        protocol.check(method, site)
      removed_here = {what: (method, site.block) for method in methods.present()
                      for what in protocol.removes(method, site)}
      for method in methods.present():
        _check_needs(method, site, {**removed_here, **removed}, model)
      if methods.tokens is not None:
        removed = {**{what: by for what, by in removed_here.items() if by[0] is methods.tokens},
                   **removed}

  def mergeable(self, sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """The layers of each block's FFN that may be deployed as one matrix."""
    methods = [self.at(site).ffn for site in sites]
    return [() if method is None else protocol.mergeable(method, site)
            for method, site in zip(methods, sites, strict=True)]

  def _check_attends(self, site: Site, sites):
    """Raises ValueError if `blocks` gives an attention method to a block without attention; a
    default of the plan is simply not used there."""
    given = [axis for axis in ("heads", "attention")
             if self.blocks.get(site.block, {}).get(axis) is not None]
    if given and "attention" not in site.provides:
      attending = [other.block for other in sites if "attention" in other.provides]
      raise ValueError(f"the plan gives block {site.block} a method of {given[0]}, but it has no "
                       f"attention between tokens; blocks with attention: {attending}")

  def map(self, change: Callable[[Any], Any]) -> "Plan":
    """The plan with `change(method)` in place of each method."""
    def changed(method):
      return None if method is None else change(method)
    blocks = {block: {axis: changed(method) for axis, method in axes.items()}
              for block, axes in self.blocks.items()}
    return Plan(**{axis: changed(getattr(self, axis)) for axis in METHODS}, blocks=blocks)

  def written_out(self, sites: Sequence[Site]) -> "Plan":
    """The plan with an explicit None in each block where a method does not act: these blocks then
    stay dense even if more tokens reach them."""
    blocks = {block: dict(axes) for block, axes in self.blocks.items()}
    for site in sites:
      planned, acting = self.planned(site.block), self.at(site)
      for axis in BY_BLOCK:
        if getattr(planned, axis) is not None and getattr(acting, axis) is None:
          blocks.setdefault(site.block, {})[axis] = None
    return dataclasses.replace(self, blocks=blocks)

  def at_size(self, sites: Sequence[Site]) -> "Plan":
    """The plan with sizes that depend on the image size, such as ranks, fixed for these blocks."""
    blocks = {site.block: dict(self.blocks.get(site.block, {})) for site in sites}
    for site in sites:
      for axis in BY_BLOCK:
        if (method := getattr(self.at(site), axis)) is not None:
          blocks[site.block][axis] = protocol.at_size(method, site)
    plan, defaults = dataclasses.replace(self, blocks=blocks), {}
    for axis in BY_BLOCK:
      kinds = {getattr(plan.planned(block), axis) for block in blocks}
      if len(kinds) == 1:   # the same method in all blocks becomes the default
        defaults[axis] = kinds.pop()
    blocks = {block: {axis: method for axis, method in axes.items()
                      if axis not in defaults} for block, axes in blocks.items()}
    return dataclasses.replace(self, **defaults, blocks={
        block: axes for block, axes in blocks.items() if axes})

  def reduction(self, block: int, depth: int) -> token_state.Reduction:
    """What the tokens axis does in a block."""
    return token_state.NOTHING if self.tokens is None else self.tokens.reduction(block, depth)

  def tokens_left(self, block: int, depth: int, tokens: int, prefix: int) -> int:
    """How many of `tokens` tokens are left at the start of a block."""
    return tokens if self.tokens is None else _lengths(self.tokens, depth, tokens, prefix)[block]

  def to_json(self) -> str:
    blocks = {str(block): {axis: _to_dict(axis, spec) for axis, spec in axes.items()}
              for block, axes in self.blocks.items()}
    out = {**{axis: _to_dict(axis, getattr(self, axis)) for axis in METHODS}, "blocks": blocks}
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
    return cls.from_dict(tree)

  @classmethod
  def from_dict(cls, tree: Mapping[str, Any]) -> "Plan":
    """A plan from parsed JSON; {} or None in place of a method means dense."""
    if not isinstance(tree, Mapping):
      raise ValueError(f"a plan must be a dict of axes, got {tree!r}")
    tree, _ = upgraded(tree)
    _check_names(tree, {*METHODS, "blocks"}, "plan")
    blocks = tree.pop("blocks", {})
    if not isinstance(blocks, dict) or not all(isinstance(axes, dict) for axes in blocks.values()):
      raise ValueError(f'plan, blocks={blocks!r}: must be an object such as '
                       '{"7": {"heads": null}}')
    for block, axes in blocks.items():
      if not str(block).isdecimal():
        raise ValueError(f"plan: {block!r} is not a block number; blocks are 0, 1, 2, ...")
      _check_names(axes, BY_BLOCK, f"plan, block {block}")
    return cls(**{axis: _from_dict(axis, spec) for axis, spec in tree.items()},
               blocks={int(block): {axis: _from_dict(axis, spec) for axis, spec in axes.items()}
                       for block, axes in blocks.items()})

  @classmethod
  def parse(cls, value: str | Mapping[str, Any]) -> "Plan":
    """A plan from a config value: a dict, JSON, a path that ends in .json, or "" (dense)."""
    if isinstance(value, Mapping):
      return cls.from_dict(value)
    if not isinstance(value, str):
      raise ValueError(f"plan={value!r}: must be a dict of axes, JSON, or a path to a .json file")
    if not value.strip():
      return cls()
    if value.endswith(".json"):
      try:
        return cls.from_json(pathlib.Path(value).read_text())
      except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        advice = "; give a path to a JSON plan, or JSON" if isinstance(error, OSError) else ""
        raise ValueError(f"plan={value!r}: {reason}{advice}") from None
    return cls.from_json(value)


def upgraded(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(a plan's dict in the current format, the execution settings that were in it). Older files
  call the attention axis "links", and keep execution settings in the plan."""
  tree, execution = dict(tree), {}
  for old, new in (("backends", "attention"), ("at_a_time", "chunk")):
    if tree.get(old):
      execution[new] = tree[old]
    tree.pop(old, None)
  merged = {}

  def axes(where, block):
    out = {}
    for axis, spec in where.items():
      if axis == "ffn" and isinstance(spec, Mapping) and "merged" in spec:
        spec = dict(spec)
        merged[block] = spec.pop("merged")
      out["attention" if axis == "links" else axis] = spec
    return out

  if isinstance(blocks := tree.pop("blocks", {}), Mapping):
    blocks = {block: axes(inner, block) if isinstance(inner, Mapping) else inner
              for block, inner in blocks.items()}
  tree = axes(tree, None)
  if merged:
    execution["merged"] = merged
  return tree | ({"blocks": blocks} if blocks else {}), execution


@functools.lru_cache
def _lengths(reducer, depth: int, tokens: int, prefix: int) -> list[int]:
  """Number of tokens before each block and after the last, computed from shapes only."""
  state, lengths = token_state.Tokens(jax.ShapeDtypeStruct((1, tokens, 8), "float32")), [tokens]
  for i in range(depth):
    state = token_state.shapes_after(reducer.reduction(i, depth), state, prefix)
    lengths.append(state.x.shape[1])
  return lengths


def _check_needs(method, site: Site, removed, model: str):
  needs = protocol.needs(method, site)
  if method.axis == "attention":   # selects among all pairs: two such methods cannot combine
    needs = {"full attention": "use attention=None there", **needs}
  for what, hint in needs.items():
    remover, first = removed.get(what, (method, 0))
    where = f"{describe_method(method)} in block {site.block} needs {CAPABILITIES[what]}, which"
    if what not in site.provides:
      raise ValueError(f"{where} {model or 'this model'} does not have; {hint}")
    if remover is not method:
      since = f" from block {first} onward" if remover.axis == "tokens" else ""
      raise ValueError(f"{where} {describe_method(remover)} removes{since}; {hint}")


def with_inner(method) -> list:
  """[method, the method it wraps, ...]; [] for None."""
  return [] if method is None else [method, *with_inner(protocol.inner(method))]


def describe_method(method) -> str:
  """A method's name and the fields that differ from their defaults: "HMHSA(layout='grid')"."""
  fields = [f"{field.name}={value!r}" for field in dataclasses.fields(method)
            if (value := getattr(method, field.name)) != field.default]
  return f"{type(method).__name__}({', '.join(fields)})"


def _check_axes(axes: Mapping, where: str):
  _check_names(axes, METHODS, where)
  for axis, spec in axes.items():
    if spec is not None and type(spec) not in METHODS[axis].values():
      known = ", ".join(kind.__name__ for kind in METHODS[axis].values())
      raise ValueError(f"{where}: {axis}={spec!r} is not a method of this axis; use {known}(...) "
                       "or None (to use your own method, list it first: "
                       f"vitcompact.METHODS[{axis!r}][NAME] = CLASS)")
    if spec is not None:
      check_class(type(spec), axis)
      _check_axes({axis: protocol.inner(spec)}, f"{where}, {type(spec).__name__}")


def _check_names(got, known, where: str):
  for name in got:
    if name not in known:
      close = difflib.get_close_matches(str(name), known, n=1)
      hint = f"did you mean {close[0]!r}?" if close else f"use one of {sorted(known)}"
      raise ValueError(f"{where}: unknown name {name!r}; {hint}")


def _to_dict(axis: str, spec):
  if spec is None:
    return None
  name = next(name for name, kind in METHODS[axis].items() if type(spec) is kind)
  fields = {**dataclasses.asdict(spec), axis: _to_dict(axis, protocol.inner(spec))}
  return {"method": name, **{field.name: fields[field.name] for field in dataclasses.fields(spec)}}


def _from_dict(axis: str, spec):
  if spec is None or spec == {}:
    return None
  methods = METHODS[axis]
  if not isinstance(spec, Mapping) or not isinstance(spec.get("method"), str):
    raise ValueError(f'plan, {axis}={spec!r}: must be null or an object such as '
                     f'{{"method": "{next(iter(methods))}"}}')
  _check_names([spec["method"]], methods, f"plan, {axis}, method")
  kind = methods[spec["method"]]
  fields = {key: value for key, value in spec.items() if key != "method"}
  _check_names(fields, [field.name for field in dataclasses.fields(kind)], f"plan, {axis}")
  try:
    method = kind(**{key: _from_dict(axis, value) if key == axis else _tuples(value)
                     for key, value in fields.items()})
    hash(method)   # models are compared by their plans
  # A user's own method may not check for what a file contains.
  except (TypeError, AttributeError, ArithmeticError) as error:
    raise ValueError(f"plan, {axis}: {kind.__name__} does not accept these values: {fields}: "
                     f"{error}") from None
  return method


def _tuples(value):
  return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
