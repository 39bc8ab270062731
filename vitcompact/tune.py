"""tune: choices between forms of one function, made by measuring them on this device."""
import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import bench
from vitcompact.ffn.cffn import CompactDense, merge_factors
from vitcompact.layers import dense

# A form that is chosen is at least this much faster than the one that fold gives: less is noise.
MARGIN = 1.02


class Layer(NamedTuple):
  """A factorised layer as a model calls it; layers that are equal in this take equally long."""
  features: int
  rank: int
  shape: tuple[int, ...]   # of its input
  dtype: str


def tune(deploy: nn.Module, variables, images, *, rounds: int = 5):
  """Returns (deployed model, its variables): the same function in the forms that run fastest here.

  For every factorised layer of an FFN, on inputs of the size that these images cause: two factors,
  or one matrix A B. What is chosen is recorded in the model's plan (`CFFN.merged`), so files of it
  carry it and `fold` repeats it without measuring. A layer that is merged has lost its factors and
  stays so. The outputs are equal to rounding in float32.

  Args:
    deploy: a folded model; images: (B, H, W, C), normalised, in the batch size that is to be fast.
    rounds: of measurement, in turn.
  """
  if not deploy.deploy:
    raise ValueError("tune chooses between deployed forms, and this model is not folded; "
                     "give it what vc.fold returns")
  layers = factorised(deploy, variables, images)
  faster = {layer: merging_is_faster(layer, rounds) for layer in dict.fromkeys(layers.values())}
  chosen = [path for path, layer in layers.items() if faster[layer]]
  return merged(deploy, variables, chosen)


def factorised(deploy: nn.Module, variables, images) -> dict[tuple[str, ...], Layer]:
  """{path: layer} of every factor pair that inference calls; nothing is run."""
  found = {}

  def watch(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, CompactDense) and context.method_name == "__call__":
      found[module.path] = Layer(module.features, module.rank, args[0].shape, module.dtype)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    jax.eval_shape(deploy.apply, variables, images)
  return found


def merging_is_faster(layer: Layer, rounds: int) -> bool:
  """Whether one matrix takes less time than the two factors."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal(layer.shape, np.float32), layer.dtype)
  forms = {"factors": CompactDense(layer.features, layer.rank, deploy=True, dtype=layer.dtype),
           "matrix": dense(layer.features, dtype=layer.dtype)}
  calls = {}
  for name, form in forms.items():
    shapes = jax.eval_shape(form.init, jax.random.key(0), x)
    weights = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), shapes)
    calls[name] = bench.compiled(form.apply, weights, x).call
  return bench.paired(calls, rounds=rounds, least=0.05)["matrix"].speedup > MARGIN


def merged(deploy: nn.Module, variables, chosen):
  """(model, variables) in which layers, by their paths (block, "mlp", layer), are one matrix."""
  plan, params = deploy.plan, dict(variables["params"])
  blocks = {block: dict(axes) for block, axes in plan.blocks.items()}
  for name, _, layer in chosen:
    index = int(name.removeprefix("blocks_"))
    axes = blocks.setdefault(index, {})
    spec = axes.get("ffn", plan.ffn)
    axes["ffn"] = dataclasses.replace(spec, merged=tuple(sorted({*spec.merged, layer})))
    mlp = params[name]["mlp"]
    params[name] = {**params[name], "mlp": {**mlp, layer: merge_factors(mlp[layer])}}
  plan = dataclasses.replace(plan, blocks=blocks)
  return deploy.clone(plan=plan), {**variables, "params": params}
