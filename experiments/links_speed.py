"""Block-sparse attention layers against dense ones, timed in one run, as a Markdown table.

  taskset -c 0 python -m experiments.links_speed
  taskset -c 0 python -m experiments.links_speed --sides 32 --gradients

A layer is projections, the predictor and attention, of a class token and side x side patches, width
384, 6 heads, float32. Dense attention is what the core chooses for its length, see
`experiments.attention_speed`. Shares of time are of the dense layer. Ratios are medians over rounds
that take turns (least to most in brackets).
"""
import argparse
import functools
import os

import jax
import jax.numpy as jnp

import vitcompact as vc
from experiments.attention_layer import attention_layer
from vitcompact import attention
from vitcompact.bench import paired

WIDTH, HEADS = 384, 6


def layers(side: int, keep: float, batch: int, gradients: bool):
  """{name: function of no arguments}: the layers and the predictor, on the same input."""
  spec = vc.Sparsifiner(keep=keep, granularity="block", min_tokens=0)
  x = jax.random.normal(jax.random.key(0), (batch, side * side + 1, WIDTH))
  calls = {}
  for name, plan in {"sparse": vc.Plan(attention=spec), "dense": vc.Plan()}.items():
    layer = attention_layer(side, plan, width=WIDTH, heads=HEADS)
    params, run = jax.jit(layer.init)(jax.random.key(1), x), layer.apply
    if gradients:
      run = jax.grad(lambda *args, run=run: jnp.sum(run(*args)), argnums=(0, 1))
    calls[name] = functools.partial(jax.jit(run), params, x)
    if name == "sparse":
      predictor = spec.make(layer.site, parent=None)
      weights = {"params": params["params"]["links"]}
  shape = (batch, side * side + 1, HEADS, WIDTH // HEADS)
  query, key = (jax.random.normal(jax.random.key(seed), shape) for seed in (2, 3))
  predict = jax.jit(lambda *args: predictor.apply(weights, attention.DENSE, *args).layout.chosen)
  return {**calls, "predictor": lambda: predict(query, key)}


def table(sides: list[int], keep: float, batch: int, gradients: bool, rounds: int) -> str:
  """A row for each side: milliseconds, how much faster sparse ones are, the predictor's share."""
  lines = ["| tokens | sparse, ms | dense, ms | faster than dense | predictor |",
           "|---:|---:|---:|---:|---:|"]
  for side in sides:
    timing = paired(layers(side, keep, batch, gradients), rounds=rounds)
    # `paired` gives (seconds of the first) / (seconds of this one): the first is what is sped up.
    ratio, sparse, dense, predictor = timing["dense"], *(
        timing[name].seconds for name in ("sparse", "dense", "predictor"))
    lines.append(f"| {side * side + 1} | {1e3 * sparse:.2f} | {1e3 * dense:.2f} | "
                 f"{1 / ratio.speedup:.2f}x [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}] | "
                 f"{100 * predictor / dense:.2f}% |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--sides", type=int, nargs="+",
                      default=[7, 9, 10, 12, 14, 16, 19, 24, 32, 64], help="patches on a side")
  parser.add_argument("--keep", type=float, default=0.25)
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--gradients", action="store_true", help="time forward and backward")
  args = parser.parse_args()
  try:
    out = table(args.sides, args.keep, args.batch, args.gradients, args.rounds)
  except ValueError as error:
    raise SystemExit(f"error: {error}") from None
  print(f"{out}\n\nkeep {args.keep}, batch {args.batch}, {jax.devices()[0].device_kind}, load "
        f"{os.getloadavg()[0]:.1f}; default min_tokens: "
        f"{vc.Sparsifiner(granularity='block').least_tokens}")


if __name__ == "__main__":
  main()
