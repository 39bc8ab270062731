"""One block of a model on calibration images: what a method fits its parameters to."""
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vitcompact import attention, batches, regression
from vitcompact.execution import Execution
from vitcompact.token_state import NOTHING

NORMS = {"norm1": "before_attention", "norm2": "before_ffn", "norm": "before_ffn"}
_innermost = contextvars.ContextVar("the innermost run_blocks", default=None)

ROWS_PER_CHANNEL = 8     # rows of a regression for each hidden channel
SUM_TOKENS = 8192        # tokens for small sums, such as the costs of heads
KEPT_VALUES = 2 ** 27    # most values of a layer that are kept, see `Calibration.sums`: 512 MiB


class Activations(NamedTuple):
  """The activations of a block for a chunk of images; None for parts that it does not have.

  before_attention, before_ffn: the residual stream (B, N, width) that each branch is added to.
  queries, keys: (B, N, width), (B, M, width), the inputs of attention; query, key (B, N, h, d), the
    factors of the scores; maps (B, h, N, M).
  attended: (B, N, width), what attention adds to the stream.
  inputs, hidden: inputs of the FFN's first and second layer; fc1: output of the first layer; ffn:
    what the FFN adds to the stream.
  target_attention, target_ffn: what the two branches should add, see `Teacher`.
  step: a regression uses every `step`-th token.
  image_step: small sums use every `image_step`-th image, see `with_fewer_images`.
  images: how many images these are; B is larger where a block works on windows.
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
  target_attention: Any = None
  target_ffn: Any = None
  step: int = 1
  image_step: int = 1
  images: int = 1

  def with_fewer_images(self) -> "Activations":
    """Returns the activations of every image_step-th image: enough for small sums."""
    if self.image_step == 1:
      return self

    def choose(leaf):
      if leaf is None or isinstance(leaf, int):
        return leaf
      by_image = leaf.reshape(self.images, -1, *leaf.shape[1:])   # all windows of an image
      return by_image[::self.image_step].reshape(-1, *leaf.shape[1:])

    return Activations(*map(choose, self))


class Teacher(NamedTuple):
  """The dense model's residual stream after each branch of a block, before division by a residual
  factor: NumPy arrays (images, values), or None if there is no such branch.

  The target of a compact branch is this minus the compact model's own stream, so each branch also
  corrects the error left by the blocks before it.
  """
  after_attention: Any = None
  after_ffn: Any = None


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Calibration images at one block, to which `from_dense` of a method may fit parameters.

  module: the unbound block, with the methods of those axes that were fitted before.
  params, stats: its variables.
  x: its input from the compact blocks before it, a tree of NumPy arrays (images, ...).
  teacher: the dense block on the dense model's own stream, or on x once the compact model has fewer
    tokens; None: the target is the block's own output.
  held_out: how many images, the last ones, are held out to choose between fits.
  notes: the errors that fits report, {axis: {...}}.
  kept: {layer: {first image of a chunk: its output}}, see `sums`.
  """
  module: nn.Module
  params: Any
  stats: Any
  x: Any
  teacher: Teacher | None
  held_out: int
  notes: dict
  kept: dict = dataclasses.field(default_factory=dict)

  def note(self, axis: str, **facts):
    """Records facts about a fit: the relative errors "fitted" and "held_out" of the branch's
    output, and others."""
    self.notes[axis] = facts

  def sums(self, function: Callable, *arguments, final: tuple[str, ...] = ()):
    """Returns sums over images of function(seen, *arguments), a tree of float64 NumPy arrays, as
    (those of the images to fit, those of the images held out).

    function: defined in a module, not a lambda, so that it is compiled once; or a tuple of
    functions, each with a tuple of arguments, for a single pass over the images.
    final: layers such as "attn/out" whose outputs no later fit of this block changes. They are kept
    in memory if they fit, and later passes over the block do not compute them again.
    """
    return self._pass(False, function, arguments, final)[1]

  def outputs_and_sums(self, function: Callable, *arguments):
    """Returns (the block's output for all images, as `run` does; `sums` of the same pass)."""
    return self._pass(True, function, arguments, ())

  def run(self, block: nn.Module, variables):
    """Returns the output of this block with other methods or variables."""
    return _in_chunks(_jitted_forward(BlockKey(block)), variables, self.x,
                      itertools.chain(*self._chunks()), self._known)

  def _pass(self, outputs: bool, function, arguments, final):
    final = tuple(name for name in final if name not in self.kept)
    run = _jitted_sums(BlockKey(self.module), function, outputs, self._step(), self._image_step(),
                       final, KEPT_VALUES // self._size()[0])
    variables = batches.replicate({"params": self.params, "batch_stats": self.stats})
    outs, parts, kept = [], [], {}
    for slices in self._chunks():
      total = None
      for at in slices:
        given = (*batches.take_images((self.x, self.teacher), at), self._known(at))
        x, teacher, known = batches.shard_images(given)
        out, layers, sums = run(variables, x, teacher, known, *arguments)
        outs.append(jax.tree.map(np.asarray, out))
        for name, leaf in layers.items():
          kept.setdefault(name, {})[at.start] = leaf
        if total is None:
          total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), sums)
        total = jax.tree.map(np.add, total, sums, total)   # in place: large sums take time to copy
      parts.append(total)
    self.kept.update(kept)
    return (jax.tree.map(lambda *leaves: np.concatenate(leaves), *outs),
            (parts[0], parts[1] if self.held_out else parts[0]))

  def _chunks(self) -> tuple[list[slice], list[slice]]:
    """Returns the chunks of the images to fit, and of those held out."""
    images = self._size()[0]
    fitted = images - self.held_out
    return list(batches.chunks(self.x, 0, fitted)), list(batches.chunks(self.x, fitted, images))

  def _known(self, at: slice) -> dict[str, Any]:
    """Returns the outputs of layers that were kept for a chunk."""
    return {name: chunks[at.start] for name, chunks in self.kept.items()}

  def _size(self) -> tuple[int, int]:
    """Returns (number of images, tokens of an image)."""
    images, *grid = max(jax.tree.leaves(self.x), key=np.size).shape[:-1]
    return images, math.prod(grid)

  def _step(self) -> int:
    """Returns the step between the tokens that a regression uses: above 1 for wide layers, whose
    sums are expensive. It shares no divisor with the number of patches, so that all columns of the
    grid are used."""
    site, (images, tokens) = self.module.site, self._size()
    if site.hidden < regression.WIDE:
      return 1
    step = max(images * tokens // (ROWS_PER_CHANNEL * site.hidden), 1)
    while math.gcd(step, tokens - site.prefix) > 1:
      step -= 1
    return step

  def _image_step(self) -> int:
    """Returns the step that leaves about `SUM_TOKENS` tokens of the images to fit."""
    images, tokens = self._size()
    return max((images - self.held_out) * tokens // SUM_TOKENS, 1)

  def with_fewer_images(self) -> "Calibration":
    """Returns the calibration on evenly spaced images with about `SUM_TOKENS` tokens, enough for
    small sums. None are held out."""
    at = slice(0, len(jax.tree.leaves(self.x)[0]) - self.held_out, self._image_step())
    x, teacher = (batches.take_images(tree, at) for tree in (self.x, self.teacher))
    return dataclasses.replace(self, x=x, teacher=teacher, held_out=0, kept={})

  def with_params(self, params) -> "Calibration":
    """Returns the calibration of the same block with other parameters."""
    return dataclasses.replace(self, params=params)


def anonymous(block: nn.Module) -> nn.Module:
  """Returns the block without its name, number and other fields that inference does not depend on,
  so that equal blocks share one compiled program."""
  site, methods = block.site._replace(form=None, merged=()), block.methods
  if methods.reduction(site) == NOTHING:   # a reducer depends on the number of the block
    site, methods = site._replace(block=0, tokens_left=site.tokens), methods._replace(tokens=None)
  return block.clone(site=site, methods=methods, drop_path=0.0, parent=None, name=None)


class BlockKey:
  """Wraps a block so that its compiled program can be cached. Blocks are compared by their repr: ==
  would fail for fields that are functions that make modules, such as partials."""

  def __init__(self, block: nn.Module):
    self.block = anonymous(block)
    self.text = repr(self.block)

  def __eq__(self, other):
    return self.text == other.text

  def __hash__(self):
    return hash(self.text)


def run(block: nn.Module, variables, x):
  """Returns the output of an unbound block for a tree of NumPy arrays, computed in chunks."""
  return _in_chunks(_jitted_forward(BlockKey(block)), variables, x, batches.all_chunks(x))


def _in_chunks(forward, variables, x, slices, known=lambda at: {}):
  variables = batches.replicate(variables)
  inputs = (batches.shard_images((batches.take_images(x, at), known(at))) for at in slices)
  outs = [jax.tree.map(np.asarray, forward(variables, *given)) for given in inputs]
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outs)


@functools.lru_cache(maxsize=64)
def _jitted_forward(block: BlockKey):
  return jax.jit(
      lambda variables, x, known: _observe(block.block, variables, x, maps=False, known=known)[0])


def observe_jitted(block: nn.Module, variables, x) -> Activations:
  """Returns the activations of an unbound block, with maps, for images that fit in one chunk."""
  return _jitted_observe(BlockKey(block))(variables, x)


@functools.lru_cache(maxsize=64)
def _jitted_observe(block: BlockKey):
  return jax.jit(lambda variables, x: observe(block.block, variables, x, maps=True)[1])


def run_blocks(model: nn.Module, variables, images, on_block: Callable[[str, nn.Module, Any], Any]):
  """Returns the logits of a model in which on_block(name, unbound block, input) computes the output
  of each block that a plan can change. Input and output are trees of NumPy arrays of all images.

  The layers between blocks are computed for all images at once.
  """
  # on_block must be called once for each block, with all images.
  model = model.clone(execution=Execution(), remat=False)
  names = model.compactable_blocks().keys()

  def watch(next_fun, args, kwargs, context):
    name = "/".join(context.module.path) if context.method_name == "__call__" else ""
    if name not in names or walk is not _innermost.get():   # on_block may call run_blocks itself
      return next_fun(*args, **kwargs)
    block = context.module.clone(parent=None, name=None)
    # jnp.asarray would compile a program for each shape.
    return jax.device_put(on_block(name, block, jax.tree.map(np.asarray, args[0])))

  walk = object()
  outer = _innermost.set(walk)
  try:
    with nn.intercept_methods(watch):
      return model.apply(variables, jax.device_put(images))
  finally:
    _innermost.reset(outer)


def observe(block: nn.Module, variables, x, maps: bool, known=None, final=None):
  """Returns (output, Activations) of an unbound block.

  maps: whether to form attention maps. known: outputs of layers by path, (images, values), that are
  used instead of being computed. final: a dict whose keys are paths of layers; gets the outputs of
  those that are called once.
  """
  found, called, known, final = {}, set(), known or {}, {} if final is None else final
  images = len(jax.tree.leaves(x)[0])

  def watch(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    path = context.module.path
    name = "/".join(path) if context.method_name == "__call__" else ""
    if name in known:     # XLA removes the computations that only `out` depends on
      out = known[name].reshape(out.shape)
    elif name in final:
      final[name] = None if name in called else out.reshape(images, -1)
      called.add(name)
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
    elif path in (("mlp",), ("ls2",)):   # a LayerScale comes after the branch
      found["ffn"] = out
      found.setdefault("before_ffn", args[0])      # for blocks without a norm there
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
  return out, Activations(**{**found, **tokens})


def _observe(block: nn.Module, variables, x, maps: bool, **layers):
  """Calls `observe` for images that are split among the devices of the process."""
  with attention.split_over(jax.local_device_count()):
    return observe(block, variables, x, maps, **layers)


def _tokens(x):
  """Flattens the grid: (B, H, W, C) -> (B, H W, C)."""
  return jax.lax.collapse(x, 1, x.ndim - 1) if x.ndim > 3 else x


@functools.lru_cache(maxsize=64)
def _jitted_sums(module: BlockKey, function: Callable, outputs: bool, step: int, image_step: int,
                 final: tuple[str, ...], most: int):
  """Returns the jitted function that computes (output or None, outputs of the final layers with at
  most `most` values per image, sums) of a chunk. XLA removes unused computations."""
  module = module.block
  skip = getattr(module, "skip_lam", 1.0)

  def apply(seen, *arguments):
    if isinstance(function, tuple):
      return tuple(f(seen, *args) for f, args in zip(function, arguments, strict=True))
    return function(seen, *arguments)

  def target(after, before, output):
    """The target of a branch: its own output if tokens were removed or there is no teacher."""
    if after is None or module.methods.tokens is not None or after.size != before.size:
      return output
    return after.reshape(before.shape) - skip * before

  def run(variables, x, teacher, known, *arguments):
    layers = dict.fromkeys(final)
    out, seen = _observe(module, variables, x, maps=True, known=known, final=layers)
    teacher = teacher or Teacher()
    seen = seen._replace(
        target_attention=target(teacher.after_attention, seen.before_attention, seen.attended),
        target_ffn=target(teacher.after_ffn, seen.before_ffn, seen.ffn), step=step,
        image_step=image_step, images=len(jax.tree.leaves(x)[0]))
    layers = {name: leaf for name, leaf in layers.items()
              if leaf is not None and leaf.shape[1] <= most}
    return out if outputs else None, layers, apply(seen, *arguments)

  return jax.jit(run)


def run_teacher(block: nn.Module, variables, x) -> tuple[Any, Teacher]:
  """Returns (output, `Teacher`) of an unbound dense block for a tree of NumPy arrays."""
  return _in_chunks(_jitted_teacher(BlockKey(block)), variables, x, batches.all_chunks(x))


@functools.lru_cache(maxsize=64)
def _jitted_teacher(block: BlockKey):
  skip = getattr(block.block, "skip_lam", 1.0)

  def run(variables, x, known):
    out, seen = _observe(block.block, variables, x, maps=False, known=known)
    images = len(jax.tree.leaves(x)[0])

    def after(before, output):   # by image: the block may work on windows
      return None if output is None else (output + skip * before).reshape(images, -1)

    return out, Teacher(after(seen.before_attention, seen.attended),
                        after(seen.before_ffn, seen.ffn))

  return jax.jit(run)
