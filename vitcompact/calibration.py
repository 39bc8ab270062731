"""A block of a dense model on calibration images, as the methods that change it see it."""
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vitcompact import attention
from vitcompact.block import reduction
from vitcompact.execution import Execution
from vitcompact.token_state import NOTHING

NORMS = {"norm1": "before_attention", "norm2": "before_ffn", "norm": "before_ffn"}
_innermost = contextvars.ContextVar("the walk through a model that is under way", default=None)

VALUES = 2 ** 22   # of the residual stream in one chunk of images: about 50 of DeiT-S


class Seen(NamedTuple):
  """What a block computes for a few images; None where it has no such part.

  before_attention, before_ffn: the residual stream (B, N, width) that each branch is added to.
  queries, keys: (B, N, width), (B, M, width), the inputs of attention; query, key (B, N, h, d), of
    which scores are made; maps (B, h, N, M).
  attended: (B, N, width), what attention adds to the stream.
  inputs, hidden: of the FFN's two layers, after norm and activation; fc1: what the first one gives,
    ffn: what it adds.
  wanted_attention, wanted_ffn: what the outputs should be: those of the dense model, and what the
    stream has lost so far, see `Calibration`.
  """
  before_attention: Any = None
  before_ffn: Any = None
  queries: Any = None
  keys: Any = None
  query: Any = None
  key: Any = None
  maps: Any = None
  attended: Any = None
  inputs: Any = None
  hidden: Any = None
  fc1: Any = None
  ffn: Any = None
  wanted_attention: Any = None
  wanted_ffn: Any = None


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Calibration images at one block: what `from_dense` of a method may fit itself to.

  module: the block as it is so far, not bound: the methods of other axes are in place already.
  params, stats: its variables.
  x: its input, a tree of NumPy arrays (images, ...), from the compact blocks before it.
  dense, dense_params: the block of the dense model, its teacher. dense_x: the dense model's own
    input of this block; None where the compact model has other tokens by now: the teacher then sees
    x.
  held: how many of the images, the last ones, are held out: fits are chosen by them.
  notes: what fits tell, {axis: {...}}.
  """
  module: nn.Module
  params: Any
  stats: Any
  x: Any
  dense: nn.Module
  dense_params: Any
  dense_x: Any
  held: int
  notes: dict

  def note(self, axis: str, **facts):
    """Keeps what a fit tells of itself: relative errors of the branch's output, "fitted" and
    "held_out", and others."""
    self.notes[axis] = facts

  def sums(self, function: Callable, *arguments):
    """(of the images to fit to, of those held out): sums over images of function(seen, *arguments),
    a tree of arrays; float64 of NumPy. function: of a module, not a lambda: it is compiled once; or
    a tuple of functions, with a tuple of arguments for each: one pass over the images."""
    return self._pass(False, function, arguments)[1]

  def outputs_and_sums(self, function: Callable, *arguments):
    """(the block's output of all images, as `run` gives it; `sums` of the same pass)."""
    return self._pass(True, function, arguments)

  def _pass(self, outputs: bool, function, arguments):
    module, dense = Function(self.module), Function(self.dense)
    # The dense block on its own stream wants what it gives.
    own = self.dense_x is None and module == dense and self.params is self.dense_params
    run = _summed(module, None if own else dense, function, self.dense_x is not None, outputs)
    variables = everywhere({"params": self.params, "batch_stats": self.stats})
    teacher = everywhere({"params": self.dense_params, "batch_stats": self.stats})
    images = len(jax.tree.leaves(self.x)[0])
    fitted = images - self.held
    outs, parts = [], []
    for start, stop in ((0, fitted), (fitted, images)):
      total = None
      for at in chunks(self.x, start, stop):
        out, sums = run(variables, teacher, split(take(self.x, at)),
                        None if self.dense_x is None else split(take(self.dense_x, at)), *arguments)
        outs.append(jax.tree.map(np.asarray, out))
        sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
      parts.append(total)
    return (jax.tree.map(lambda *few: np.concatenate(few), *outs),
            (parts[0], parts[1] if self.held else parts[0]))

  def with_params(self, params) -> "Calibration":
    """The same with other parameters in the block: what it computes changes."""
    return dataclasses.replace(self, params=params)


def held_last(images) -> tuple[np.ndarray, int]:
  """(images with every fourth put last, how many these are): to be held out. Not the last quarter,
  so that images in the order of their classes do no harm."""
  images = np.asarray(images, np.float32)
  if len(images) < 8:
    return images, 0
  late = np.arange(len(images)) % 4 == 3
  return np.concatenate([images[~late], images[late]]), int(late.sum())


def take(tree, at: slice):
  return jax.tree.map(lambda leaf: leaf[at], tree)


def chunks(x, start: int, stop: int):
  """Slices of images, as many at a time as the memory of all devices likes; of at most two lengths,
  the first of which divides among the devices where there are enough images."""
  leaf, devices = max(jax.tree.leaves(x), key=np.size), jax.local_device_count()
  most = devices * min(max(8, VALUES * len(leaf) // max(leaf.size, 1)), 256)
  if stop > start:
    size = math.ceil((stop - start) / math.ceil((stop - start) / most))
    if size >= devices:
      size = math.ceil(size / devices) * devices
    for first in range(start, stop, size):
      yield slice(first, min(first + size, stop))


def _over_devices(spec: PartitionSpec) -> NamedSharding:
  return NamedSharding(Mesh(np.asarray(jax.local_devices()), ("images",)), spec)


def split(tree):
  """Leaves (images, ...) split among the devices of this process, where their number divides."""
  devices = jax.local_device_count()
  if devices == 1:
    return tree
  even = all(len(leaf) % devices == 0 for leaf in jax.tree.leaves(tree))
  return jax.device_put(tree, _over_devices(PartitionSpec(*["images"] * even)))


def everywhere(tree):
  """A copy on each device of this process."""
  return tree if jax.local_device_count() == 1 else jax.device_put(
      tree, _over_devices(PartitionSpec()))


def anonymous(block: nn.Module) -> nn.Module:
  """The block without what is its own but no part of its function in inference, so that equal
  blocks share one compiled program."""
  site, methods = block.site._replace(form=None, merged=()), block.methods
  if reduction(site, methods) == NOTHING:   # else it acts by the number of the block
    site, methods = site._replace(block=0, tokens_left=site.tokens), methods._replace(tokens=None)
  return block.clone(site=site, methods=methods, drop_path=0.0, parent=None, name=None)


class Function:
  """A block as a key of compiled programs: two blocks are the same where they read the same. Their
  own equality fails where makers of modules, such as partials, are among their fields."""

  def __init__(self, block: nn.Module):
    self.block = anonymous(block)
    self.text = repr(self.block)

  def __eq__(self, other):
    return self.text == other.text

  def __hash__(self):
    return hash(self.text)


def run(block: nn.Module, variables, x):
  """The output of an unbound block for a tree of NumPy arrays, a few images at a time."""
  forward, images = _forward(Function(block)), len(jax.tree.leaves(x)[0])
  variables = everywhere(variables)
  outs = [jax.tree.map(np.asarray, forward(variables, split(take(x, at))))
          for at in chunks(x, 0, images)]
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outs)


@functools.lru_cache(maxsize=64)
def _forward(block: Function):
  return jax.jit(lambda variables, x: _look(block.block, variables, x, maps=False)[0])


def seen_by(block: nn.Module, variables, x) -> Seen:
  """What an unbound block computes for a few images, maps among it; all at once."""
  return _looking(Function(block))(variables, x)


@functools.lru_cache(maxsize=64)
def _looking(block: Function):
  return jax.jit(lambda variables, x: look(block.block, variables, x, maps=True)[1])


def through(model: nn.Module, variables, images, on_block: Callable[[str, nn.Module, Any], Any]):
  """The logits of a model in which on_block(name, unbound block, input) gives the output of each
  block that a plan can change; input and output are trees of NumPy arrays, of all images.

  What stands between the blocks is computed as it is, for as many images as come.
  """
  # No images in chunks, and nothing computed twice.
  model = model.clone(execution=Execution(), remat=False)
  names = {name for name, module in model.submodules().items() if hasattr(module, "methods")}

  def watch(next_fun, args, kwargs, context):
    name = "/".join(context.module.path) if context.method_name == "__call__" else ""
    if name not in names or walk is not _innermost.get():   # on_block may walk through it as well
      return next_fun(*args, **kwargs)
    block = context.module.clone(parent=None, name=None)
    return jax.tree.map(jnp.asarray, on_block(name, block, jax.tree.map(np.asarray, args[0])))

  walk = object()
  outer = _innermost.set(walk)
  try:
    with nn.intercept_methods(watch):
      return model.apply(variables, jnp.asarray(images))
  finally:
    _innermost.reset(outer)


def look(block: nn.Module, variables, x, maps: bool):
  """(output, Seen) of an unbound block; maps: whether attention maps are formed and among it."""
  found = {}

  def watch(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    path = context.module.path
    if path == ("attn",) and context.method_name == "scored":
      found["query"], found["key"] = out
    if context.method_name != "__call__":
      return out
    if len(path) == 1 and path[0] in NORMS:
      found[NORMS[path[0]]] = _tokens(args[0])
    elif path == ("mlp", "fc1"):
      found["inputs"], found["fc1"] = args[0], out
    elif path == ("mlp", "fc2"):
      found["hidden"] = args[0]
    elif path in (("mlp",), ("ls2",)):   # LayerScale, where there is one, comes after
      found["ffn"] = out
      found.setdefault("before_ffn", args[0])      # no norm stands between it and the stream
    elif path == ("attn",):
      found["attended"] = out
      found.setdefault("before_attention", args[0])
    elif path == ("attn", "query"):
      found["queries"] = args[0]
    elif path == ("attn", "value"):
      found["keys"] = args[0]
    elif path in (("attn", "out"), ("ls1",)):
      found["attended"] = out
    return out

  with nn.intercept_methods(watch):
    out, state = block.apply(variables, x, mutable=["maps"] if maps else [])
  if maps and "attn" in state.get("maps", {}):
    attn = state["maps"]["attn"]
    scope = next((attn[name] for name in attn if name != "maps"), attn)
    found["maps"] = scope["maps"][0]
  tokens = {name: _tokens(value) for name, value in found.items()
            if name not in ("maps", "query", "key")}
  return out, Seen(**{**found, **tokens})


def _look(block: nn.Module, variables, x, maps: bool):
  """`look`, at images that lie on all devices of the process."""
  with attention.split_over(jax.local_device_count()):
    return look(block, variables, x, maps)


def _tokens(x):
  """(B, H, W, C) -> (B, H W, C)."""
  return jax.lax.collapse(x, 1, x.ndim - 1) if x.ndim > 3 else x


@functools.lru_cache(maxsize=64)
def _summed(module: Function, dense: Function | None, function: Callable, paired: bool,
            outputs: bool):
  """(output, None unless asked for; sums) of a chunk, jitted; what is not used is not computed."""
  module, dense = module.block, dense and dense.block
  skip = getattr(module, "skip_lam", 1.0)

  def apply(seen, *arguments):
    if isinstance(function, tuple):
      return tuple(one(seen, *few) for one, few in zip(function, arguments, strict=True))
    return function(seen, *arguments)

  def run(variables, teacher, x, dense_x, *arguments):
    out, seen = _look(module, variables, x, maps=True)
    out = out if outputs else None
    if dense is None:
      seen = seen._replace(wanted_attention=seen.attended, wanted_ffn=seen.ffn)
      return out, apply(seen, *arguments)
    target = _look(dense, teacher, dense_x if paired else x, maps=False)[1]

    def wanted(output, stream):
      """The teacher's output, and what the stream lacks: the branch makes good what earlier ones
      lost."""
      lost = getattr(target, stream) - getattr(seen, stream)
      return getattr(target, output) + skip * lost

    if seen.attended is not None:
      alike = (seen.before_attention.shape == target.before_attention.shape
               and module.methods.tokens is None)
      seen = seen._replace(wanted_attention=wanted("attended", "before_attention") if alike
                           else seen.attended)
    # Where tokens go between attention and FFN, the teacher has others.
    same = seen.before_ffn.shape == target.before_ffn.shape and module.methods.tokens is None
    return out, apply(seen._replace(wanted_ffn=wanted("ffn", "before_ffn") if same else seen.ffn),
                      *arguments)

  return jax.jit(run)
