"""Attention layers with linked blocks against dense ones, timed in one run, as a Markdown table.

  taskset -c 0 python -m experiments.links_speed
  taskset -c 0 python -m experiments.links_speed --sides 32 --gradients

A layer is projections, the predictor and attention, of a class token and side x side patches, width
384, 6 heads, float32. Dense attention is what the core chooses for its length, see
`experiments.attention_speed`. Shares of time are of the dense layer. Ratios are medians over rounds
that take turns (least to most in brackets).
"""
import argparse
import os

import jax
import jax.numpy as jnp

import vitcompact as vc
from vitcompact.attention import Core
from vitcompact.bench import paired
from vitcompact.block import Attention, fresh_links, make_links
from vitcompact.plan import BlockPlan

WIDTH, HEADS = 384, 6


def layers(side: int, keep: float, batch: int, gradients: bool):
  """{name: function of no arguments}: the layers and the predictor, on the same input."""
  grid, tokens = (side, side), side * side + 1
  attn = Attention(WIDTH, HEADS, query_grid=grid, key_grid=grid, prefix=1)
  spec = vc.Sparsifiner(keep=keep, granularity="block", min_tokens=0)
  links = make_links(BlockPlan(links=spec), attn, keys=tokens, deploy=True)
  x = jax.random.normal(jax.random.key(0), (batch, tokens, WIDTH))
  params = {"attn": jax.jit(attn.init)(jax.random.key(1), x)["params"], **fresh_links(links, attn)}

  def run(attend):
    def layer(params, x):
      bound = attn.bind({"params": params["attn"]})
      query, key, value = bound.query(x), bound.key(x), bound.value(x)
      return bound.out(attend(params, query, key, value))
    if gradients:
      compiled = jax.jit(jax.grad(lambda *args: jnp.sum(layer(*args)), argnums=(0, 1)))
    else:
      compiled = jax.jit(layer)
    return lambda: compiled(params, x)

  def linked(params, query, key, value):
    core = links.apply({"params": params["links"]}, Core(), query, key)
    return core(query, key, value)

  bound = attn.bind({"params": params["attn"]})
  query, key = jax.jit(lambda x: (bound.query(x), bound.key(x)))(x)
  predict = jax.jit(lambda params, query, key: links.apply(
      {"params": params}, Core(), query, key).layout.chosen)
  return {"linked": run(linked), "dense": run(lambda params, *args: Core()(*args)),
          "predictor": lambda: predict(params["links"], query, key)}


def table(sides: list[int], keep: float, batch: int, gradients: bool, rounds: int) -> str:
  """A row for each side: milliseconds, how much faster linked blocks are, the predictor's share."""
  lines = ["| tokens | linked, ms | dense, ms | faster than dense | predictor |",
           "|---:|---:|---:|---:|---:|"]
  for side in sides:
    timing = paired(layers(side, keep, batch, gradients), rounds=rounds)
    # `paired` gives (seconds of the first) / (seconds of this one): the first is what is sped up.
    ratio, linked, dense, predictor = timing["dense"], *(
        timing[name].seconds for name in ("linked", "dense", "predictor"))
    lines.append(f"| {side * side + 1} | {1e3 * linked:.2f} | {1e3 * dense:.2f} | "
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
