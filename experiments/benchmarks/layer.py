"""Times one attention layer with projections and predictors: dense, hallucinated, block-sparse."""
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

import vitcompact as vc
from experiments.attention_layer import attention_layer
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Setting
from vitcompact.count import macs_of

FORMS = {"cpu": ("einsum", "tiled"), "gpu": ("einsum", "cudnn"), "tpu": ("einsum", "splash")}
# (patches on a side, batch): 197, 577, 1025 and 4097 tokens with the class token.
HOST_SHAPES = ((14, 8), (24, 2), (32, 1), (64, 1))
DEVICE_SHAPES = ((14, 256), (24, 64), (32, 32), (64, 8))
VARIANTS = {"hMHSA": "heads", "block-sparse 25%": "block"}   # see model.VARIANTS


class Layer(NamedTuple):
  """A function run(params, x) -> output, and its params: arrays or their shapes."""
  run: Callable
  params: Any


def layers(side: int, width: int, heads: int, dtype: str, platform: str) -> dict[str, Layer]:
  """Returns the candidates for one input shape; their params are shapes."""
  x = jax.ShapeDtypeStruct((1, side * side + 1, width), dtype)

  def make(form: str | None = None, **plan) -> Layer:
    execution = vc.Execution({0: form} if form else {})
    layer = attention_layer(side, vc.Plan(**plan), execution=execution, width=width, heads=heads,
                            dtype=dtype)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    return Layer(lambda params, x: layer.apply({"params": params}, x), params)

  sparse = vc.Sparsifiner(keep=0.25, granularity="block", min_tokens=0)
  # "dense" is the form that the library chooses by default.
  forced = {f"dense, {name}": make(name) for name in FORMS[platform]}
  return {"dense": make(), **forced, "hMHSA": make(heads=vc.HMHSA()),
          "hMHSA, logits site": make(heads=vc.HMHSA(site="logits")),
          "block-sparse 25%": make(attention=sparse)}


def run(setting: Setting, shapes=None, width: int = 384, heads: int = 6) -> Iterator[dict]:
  for side, batch in shapes or (HOST_SHAPES if setting.on_host else DEVICE_SHAPES):
    x = measure.normal((batch, side * side + 1, width), setting.dtype)
    # A random cotangent: the compiler could simplify away the ones of a sum's gradient.
    cotangent = measure.normal(x.shape, setting.dtype, seed=1)
    for backward in (False, True):
      candidates = {}
      by_name = layers(side, width, heads, setting.dtype, setting.platform)
      for name, layer in by_name.items():
        params = measure.random_weights(layer.params)
        facts = {"macs": macs_of(layer.run, params, x).total // batch}
        if x.shape[1] > 2000 and name == "hMHSA, logits site":
          candidates[name] = measure.Candidate(None, {"reason": "no goal at this length"})
        else:
          call = _with_gradients(layer.run) if backward else layer.run
          arrays = (params, x, cotangent) if backward else (params, x)
          candidates[name] = measure.compiled(call, *arrays, **facts)
      case = {"tokens": x.shape[1], "batch": batch, "width": width, "heads": heads,
              "pass": "forward and backward" if backward else "forward",
              "inputs_and_outputs_bytes": 2 * x.nbytes}
      yield from measure.rows(case, candidates, setting)


def _with_gradients(layer):
  def gradients(params, x, cotangent):
    y, back = jax.vjp(layer, params, x)
    return y, back(cotangent)
  return gradients
