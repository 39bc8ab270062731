"""tune: chooses between equivalent forms of a model by timing them on this device."""
import dataclasses
import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention, bench
from vitcompact.attention import Core
from vitcompact.block import Attention
from vitcompact.checks import check_fitting, check_model, describe_value
from vitcompact.execution import Execution
from vitcompact.layers import dense
from vitcompact.methods import protocol

# A form is chosen only if it is at least this much faster than fold's: less is noise.
MARGIN = 1.02
# Chunk sizes to try, on devices where chunks have ever been faster.
CHUNKS = {"cpu": (4, 8, 16)}
FORMS = {"cpu": ("einsum", "images", "tiled"), "gpu": ("einsum", "tiled", "cudnn"),
         "tpu": ("einsum", "tiled", "splash")}
MATRIX = "one matrix"


class FactorisedCall(NamedTuple):
  """A call of a factorised layer: the module without its position in the model, the shape of its
  input, and the width and dtype of its output. Equal calls take equally long."""
  module: nn.Module
  shape: tuple[int, ...]
  features: int
  dtype: str


class AttentionCall(NamedTuple):
  """A call of `Attention.attend`: the module without its position in the model, and the shapes of
  queries, keys and values."""
  module: Attention
  shapes: tuple[tuple[int, ...], ...]
  sized: bool              # whether keys have sizes (a key may stand for several tokens)


def tune(deploy: nn.Module, variables, images, *, rounds: int = 5, runtime: str | None = None):
  """Returns (deployed model, its variables): the same function in the forms that run fastest here.

  It chooses for the batch (on a CPU): all at once, or in chunks; for each factorised FFN layer: two
  factors, or one matrix A B; for each block that attends to all tokens: how attention is computed.
  The choices are the model's `execution`: they are saved with it, and `fold` keeps them without
  measuring. A merged layer has lost its factors and stays merged. The outputs are equal up to
  rounding in float32.

  Args:
    deploy: a folded model. images: (B, H, W, C), normalised, in the batch size to optimise for.
    rounds: of measurement; each times every form once.
    runtime: None: XLA on this device. "ort" or "openvino": only chooses between two factors and one
      matrix for factorised layers, by time in that runtime, for `vc.export`.
  """
  check_model(deploy)
  if not deploy.deploy:
    raise ValueError("tune chooses between deployed forms, and this model is not folded; "
                     "give it what vc.fold returns")
  if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
    raise ValueError(f"rounds={describe_value(rounds)}: must be a whole number of at least 1; a "
                     "median needs about 5")
  check_fitting(deploy, variables, images)
  # Ignores earlier choices, which may be for another device.
  deploy = deploy.clone(execution=Execution(merged=deploy.execution.merged))
  if runtime not in (None, "xla"):
    return with_forms(deploy, variables, merged_in(runtime, deploy, variables, images, rounds))
  deploy = with_chunk(deploy, best_chunk(deploy, variables, images, rounds))
  calls = calls_with_forms(deploy, variables, images)
  best = {call: best_form(call, rounds) for call in dict.fromkeys(calls.values())}
  chosen = {path: best[call] for path, call in calls.items() if best[call]}
  return with_forms(deploy, variables, chosen)


def merged_in(runtime: str, deploy: nn.Module, variables, images, rounds: int):
  """{path: MATRIX} of the factorised layers that are faster as one matrix in a runtime.

  Layers of the same size are tried together, in the whole model, as a runtime fuses a layer with
  its neighbours.
  """
  from vitcompact import runtimes
  from vitcompact.export import onnx_file
  from vitcompact.export.program import Program
  from vitcompact.preprocess import preprocess

  paths_by_call: dict[FactorisedCall, list] = {}
  for path, call in calls_with_forms(deploy, variables, images).items():
    if isinstance(call, FactorisedCall):
      paths_by_call.setdefault(call, []).append(path)
  candidates = {None: {}, **{call: dict.fromkeys(paths, MATRIX)
                             for call, paths in paths_by_call.items()}}
  inputs, calls = np.asarray(images, np.float32), {}
  with tempfile.TemporaryDirectory() as folder:
    for i, (call, chosen) in enumerate(candidates.items()):
      path = pathlib.Path(folder, f"{i}.onnx")
      model, own = with_forms(deploy, variables, chosen)
      onnx_file.write(Program(model, own, preprocess(model)), path)
      calls[call] = functools.partial(runtimes.load(path, runtime), inputs)
    timing = bench.paired(calls, rounds=rounds, min_seconds=0.05)
  # No MARGIN: in a whole model the gain of one kind of layer is small, so all rounds must agree.
  return {path: MATRIX for call, paths in paths_by_call.items() if timing[call].low > 1
          for path in paths}


def with_chunk(model: nn.Module, chunk: int | None) -> nn.Module:
  """The model that computes a batch in chunks of `chunk` images."""
  return model.clone(execution=dataclasses.replace(model.execution, chunk=chunk))


def best_chunk(deploy: nn.Module, variables, images, rounds: int) -> int | None:
  """The fastest chunk size; None: all at once."""
  sizes = [chunk for chunk in CHUNKS.get(jax.default_backend(), ()) if chunk < len(images)]
  if not sizes:
    return None
  return fastest_of({chunk: bench.compiled(with_chunk(deploy, chunk).apply, variables, images).call
                   for chunk in (None, *sizes)}, rounds)


def fastest_of(calls: Mapping[Any, Callable], rounds: int):
  """The name of the fastest call, or None (the first) if its gain may be noise."""
  timing = bench.paired(calls, rounds=rounds, min_seconds=0.05)
  best = max(timing, key=lambda name: timing[name].speedup)
  return best if timing[best].speedup > MARGIN else None


def calls_with_forms(deploy: nn.Module, variables, images
                     ) -> dict[tuple[str, ...], FactorisedCall | AttentionCall]:
  """{path: call} for every part of inference that has several forms; nothing is run.

  If a part is called several times, the first call counts: the last chunk may be smaller.
  """
  found, sites = {}, deploy.sites()
  factorised = {(f"blocks_{site.block}", "mlp", layer)
                for site, layers in zip(sites, deploy.plan.mergeable(sites), strict=True)
                for layer in set(layers) - set(site.merged)}

  def watch(next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if module.path in factorised and method == "__call__":
      out = next_fun(*args, **kwargs)
      found.setdefault(module.path, FactorisedCall(module.clone(parent=None, name=None),
                                                   args[0].shape, out.shape[-1], str(out.dtype)))
      return out
    if isinstance(module, Attention) and method == "attend":
      core = args[3] if len(args) > 3 else kwargs.get("core", attention.DENSE)
      if core.is_plain() and core.spread is attention.DENSE.spread:
        found.setdefault(module.path, AttentionCall(
            timing_key(module), tuple(x.shape for x in args[:3]), core.size is not None))
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    jax.eval_shape(deploy.apply, variables, images)
  return found


def timing_key(module: Attention) -> Attention:
  """The module without its position and other fields that do not affect its time."""
  site = module.site._replace(block=0, tokens_left=0, act=None, mixer=None, merged=())
  return module.clone(parent=None, name=None, site=site)


def best_form(call: FactorisedCall | AttentionCall, rounds: int) -> str | None:
  """The name of the fastest form; None: fold's."""
  compiled = {}
  for name, make in forms(call).items():
    try:
      compiled[name] = bench.compiled(*make()).call
    except Exception:   # this device or dtype does not support the form
      if name is None:
        raise
  return fastest_of(compiled, rounds)


def forms(call: FactorisedCall | AttentionCall) -> Mapping[str | None, Callable[[], tuple]]:
  """{name: a function that returns (what to compile, *its arguments)}; the first is fold's form."""
  if isinstance(call, FactorisedCall):
    x = random_arrays(jax.ShapeDtypeStruct(call.shape, call.dtype))
    return {None: lambda: _call(call.module, "__call__", x),
            MATRIX: lambda: _call(dense(call.features, dtype=call.dtype), "__call__", x)}
  names = FORMS[jax.default_backend()]
  names += ("tokamax",) * (importlib.util.find_spec("tokamax") is not None)
  query, key, value = (random_arrays(jax.ShapeDtypeStruct(shape, call.module.site.dtype))
                       for shape in call.shapes)
  x = random_arrays(jax.ShapeDtypeStruct((*query.shape[:2], call.module.site.width), query.dtype))
  core = Core(size=jnp.ones(key.shape[:2])) if call.sized else attention.DENSE

  def attend(name):
    module = call.module.clone(site=call.module.site._replace(form=name))
    return lambda: _call(module, "attend", query, key, value, core=core, x_bnw=x)

  return {name: attend(name) for name in (None, *names)}


def _call(module: nn.Module, method: str, *arrays, **fixed) -> tuple[Any, ...]:
  """(function, *its arguments): a method of a module, with random parameters."""
  def init(*arrays):
    return module.init(jax.random.key(0), *arrays, method=method, **fixed)

  def apply(variables, *arrays):
    return module.apply(variables, *arrays, method=method, **fixed)

  return apply, random_arrays(jax.eval_shape(init, *arrays)), *arrays


def random_arrays(shapes):
  """Arrays of small normal numbers in these shapes."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype),
      shapes)


def with_forms(deploy: nn.Module, variables, chosen: Mapping[tuple[str, ...], str]):
  """(model, variables) with {path: form} applied, and recorded in the model's execution."""
  params, forms, merged = dict(variables["params"]), {}, set(deploy.execution.merged)
  blocks = deploy.submodules()
  for (name, *path), form in chosen.items():
    if form != MATRIX:
      forms[int(name.removeprefix("blocks_"))] = form
      continue
    layer, mlp, block = path[-1], params[name]["mlp"], blocks[name]
    merged.add(f"{name}/mlp/{layer}")
    one = protocol.merge(block.methods.ffn, block.site, mlp[layer])
    params[name] = {**params[name], "mlp": {**mlp, layer: one}}
  execution = dataclasses.replace(deploy.execution, attention=forms, merged=tuple(merged))
  return deploy.clone(execution=execution), {**variables, "params": params}
