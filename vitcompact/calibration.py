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

from vitcompact import attention, regression
from vitcompact.block import reduction
from vitcompact.execution import Execution
from vitcompact.token_state import NOTHING

NORMS = {"norm1": "before_attention", "norm2": "before_ffn", "norm": "before_ffn"}
_innermost = contextvars.ContextVar("the walk through a model that is under way", default=None)

ROWS = 8           # times the hidden channels: rows that a regression is made of
TOKENS = 8192      # that sums of few numbers, such as the costs of heads, are taken over
VALUES = 2 ** 22   # of the residual stream in one chunk of images: about 50 of DeiT-S


class Seen(NamedTuple):
  """What a block computes for a few images; None where it has no such part.

  before_attention, before_ffn: the residual stream (B, N, width) that each branch is added to.
  queries, keys: (B, N, width), (B, M, width), the inputs of attention; query, key (B, N, h, d), of
    which scores are made; maps (B, h, N, M).
  attended: (B, N, width), what attention adds to the stream.
  inputs, hidden: of the FFN's two layers, after norm and activation; fc1: what the first one gives,
    ffn: what it adds.
  wanted_attention, wanted_ffn: what the outputs should be, see `Teacher`.
  step: from one token to the next that a regression takes.
  image_step: from one image to the next that sums of few numbers take, see `of_fewer_images`.
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
  step: int = 1
  image_step: int = 1

  def of_fewer_images(self) -> "Seen":
    """The same of every image_step-th image: enough for sums of few numbers."""
    return Seen(*(leaf if isinstance(leaf, int) or leaf is None else leaf[::self.image_step]
                  for leaf in self))


class Teacher(NamedTuple):
  """The stream of the dense model after each branch of a block, before a residual factor divides
  it: NumPy arrays (images, values), or None where there is no such branch. What a branch of the
  compact block should add is this without its own stream: it makes good what was lost."""
  after_attention: Any = None
  after_ffn: Any = None


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Calibration images at one block: what `from_dense` of a method may fit itself to.

  module: the block as it is so far, not bound: the methods of other axes are in place already.
  params, stats: its variables.
  x: its input, a tree of NumPy arrays (images, ...), from the compact blocks before it.
  teacher: the dense block on the dense model's own stream, or on x where the compact model has
    other tokens by now; None: what the block itself adds is wanted.
  held: how many of the images, the last ones, are held out: fits are chosen by them.
  notes: what fits tell, {axis: {...}}.
  """
  module: nn.Module
  params: Any
  stats: Any
  x: Any
  teacher: Teacher | None
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
    run = _summed(Function(self.module), function, outputs, self._step(), self._image_step())
    variables = everywhere({"params": self.params, "batch_stats": self.stats})
    images = len(jax.tree.leaves(self.x)[0])
    fitted = images - self.held
    outs, parts = [], []
    for start, stop in ((0, fitted), (fitted, images)):
      total = None
      for at in chunks(self.x, start, stop):
        x, teacher = split((take(self.x, at), take(self.teacher, at)))
        out, sums = run(variables, x, teacher, *arguments)
        outs.append(jax.tree.map(np.asarray, out))
        sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
      parts.append(total)
    return (jax.tree.map(lambda *few: np.concatenate(few), *outs),
            (parts[0], parts[1] if self.held else parts[0]))

  def _size(self) -> tuple[int, int]:
    """(images, tokens of each)."""
    images, *grid = max(jax.tree.leaves(self.x), key=np.size).shape[:-1]
    return images, math.prod(grid)

  def _step(self) -> int:
    """Of many channels, whose sums are dear, so that enough rows are left; without a divisor in
    common with the number of tokens, so that they are of all columns of the grid."""
    site, (images, tokens) = self.module.site, self._size()
    if site.hidden < regression.WIDE:
      return 1
    step = max(images * tokens // (ROWS * site.hidden), 1)
    while math.gcd(step, tokens - site.prefix) > 1:
      step -= 1
    return step

  def _image_step(self) -> int:
    """So that about `TOKENS` tokens of the images to fit to are left."""
    images, tokens = self._size()
    return max((images - self.held) * tokens // TOKENS, 1)

  def fewer(self) -> "Calibration":
    """About `TOKENS` tokens of images chosen evenly, none of them held out: enough for sums of few
    numbers."""
    at = slice(0, len(jax.tree.leaves(self.x)[0]) - self.held, self._image_step())
    return dataclasses.replace(self, x=take(self.x, at), teacher=take(self.teacher, at), held=0)

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
  return _in_chunks(_forward(Function(block)), variables, x)


def _in_chunks(forward, variables, x):
  variables, images = everywhere(variables), len(jax.tree.leaves(x)[0])
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
    if path == ("attn",) and context.method_name == "queries_and_keys":
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
def _summed(module: Function, function: Callable, outputs: bool, step: int, image_step: int):
  """(output, None unless asked for; sums) of a chunk, jitted; what is not used is not computed."""
  module = module.block
  skip = getattr(module, "skip_lam", 1.0)

  def apply(seen, *arguments):
    if isinstance(function, tuple):
      return tuple(one(seen, *few) for one, few in zip(function, arguments, strict=True))
    return function(seen, *arguments)

  def wanted(after, before, adds):
    """Where a reducer has left other tokens, and without a teacher, what the branch adds."""
    if after is None or module.methods.tokens is not None or after.size != before.size:
      return adds
    return after.reshape(before.shape) - skip * before

  def run(variables, x, teacher, *arguments):
    out, seen = _look(module, variables, x, maps=True)
    teacher = teacher or Teacher()
    seen = seen._replace(
        wanted_attention=wanted(teacher.after_attention, seen.before_attention, seen.attended),
        wanted_ffn=wanted(teacher.after_ffn, seen.before_ffn, seen.ffn), step=step,
        image_step=image_step)
    return out if outputs else None, apply(seen, *arguments)

  return jax.jit(run)


def taught(block: nn.Module, variables, x) -> tuple[Any, Teacher]:
  """(output, `Teacher`) of a dense block, not bound, for a tree of NumPy arrays."""
  return _in_chunks(_teaching(Function(block)), variables, x)


@functools.lru_cache(maxsize=64)
def _teaching(block: Function):
  skip = getattr(block.block, "skip_lam", 1.0)

  def run(variables, x):
    out, seen = _look(block.block, variables, x, maps=False)
    images = len(jax.tree.leaves(x)[0])

    def after(before, adds):   # of whole images, whatever windows they are cut into
      return None if adds is None else (adds + skip * before).reshape(images, -1)

    return out, Teacher(after(seen.before_attention, seen.attended),
                        after(seen.before_ffn, seen.ffn))

  return jax.jit(run)
