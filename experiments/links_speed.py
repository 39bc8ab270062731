"""Attention layers with linked blocks against dense ones, timed in one run, as a Markdown table.

  taskset -c 0 python -m experiments.links_speed
  taskset -c 0 python -m experiments.links_speed --sides 32 --gradients

A layer is projections, the predictor and attention, of a class token and side x side patches, width
384, 6 heads, float32. Dense is the faster of two: all scores at once, or 64 queries at a time. The
ratios are medians over rounds that take turns (least to most in brackets).
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

WIDTH, HEADS, TILE = 384, 6, 64


def tiled(query_bnhd, key_bmhd, value_bmhd):
  """Dense attention of one head and 64 queries at a time: a tile of scores stays in the cache."""
  batch, tokens, heads, width = query_bnhd.shape
  query, key, value = (x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, width)
                       for x in (query_bnhd * width ** -0.5, key_bmhd, value_bmhd))
  query = jnp.pad(query, [(0, 0), (0, -tokens % TILE), (0, 0)])

  def head(arrays):
    query_nd, key_md, value_md = arrays
    return jax.lax.map(lambda tile: jax.nn.softmax(tile @ key_md.T, axis=-1) @ value_md,
                       query_nd.reshape(-1, TILE, width))

  out = jax.lax.map(jax.checkpoint(head), (query, key, value))
  out = out.reshape(batch, heads, -1, width)[:, :, :tokens]
  return out.transpose(0, 2, 1, 3)


def layers(side: int, keep: float, batch: int, gradients: bool):
  """{name: function of no arguments}: the three layers on the same weights and input."""
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

  return {"linked": run(linked), "dense": run(lambda params, *args: Core()(*args)),
          "tiled": run(lambda params, *args: tiled(*args))}


def table(sides: list[int], keep: float, batch: int, gradients: bool, rounds: int) -> str:
  """A row for each side: milliseconds, and how much faster linked blocks are than dense."""
  lines = ["| tokens | linked, ms | dense, ms | tiled, ms | faster than the better dense |",
           "|---:|---:|---:|---:|---:|"]
  for side in sides:
    timing = paired(layers(side, keep, batch, gradients), rounds=rounds)
    best = min("dense", "tiled", key=lambda name: timing[name].seconds)
    # `paired` gives (seconds of the first) / (seconds of this one): the first is what is sped up.
    ratio = timing[best]
    lines.append(f"| {side * side + 1} | " + " | ".join(
        f"{1e3 * timing[name].seconds:.2f}" for name in ("linked", "dense", "tiled")) +
        f" | {1 / ratio.speedup:.2f}x [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}] |")
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
