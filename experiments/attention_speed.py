"""Times attention layers, dense and compact, in each form in one run.

  taskset -c 0 python -m experiments.attention_speed
  taskset -c 0 python -m experiments.attention_speed --sides 32 --batch 1 --gradients
  taskset -c 0 python -m experiments.attention_speed --forms auto einsum --layers dense
  taskset -c 0 python -m experiments.attention_speed --layers dense sparse predictor --keep 0.25
  taskset -c 0 python -m experiments.attention_speed --layers dense merged --keep 0.5

A layer has projections and attention over a class token and side x side patches, width 384, 6
heads, float32. It is dense, has half of its heads hallucinated (hmhsa; logits filters the scores),
merges keys, or is block-sparse ("regions" are BiFormer's 7 x 7, "routed" its regions of about 8 x 8
patches, "lce" the same with local enhancement). "predictor" is the part of the block-sparse layer
that chooses blocks; it has no gradient. Ratios are relative to the fastest dense row: median,
minimum and maximum over rounds in which candidates take turns. Memory is the compiled program's
temporary memory as a multiple of its inputs and outputs (parameters included).
"""
import argparse
import os

import jax
import jax.numpy as jnp

import vitcompact as vc
from experiments.attention_layer import attention_layer
from vitcompact import attention
from vitcompact.bench import paired

WIDTH, HEADS = 384, 6
HMHSA, LOGITS = vc.HMHSA(), vc.HMHSA(site="logits")
LAYERS = ("dense", "hmhsa", "logits", "sparse", "hmhsa+sparse", "predictor", "regions", "routed",
          "lce", "merged")


def function_of(name: str, side: int, batch: int, keep: float, gradients: bool):
  """Returns (function, arguments) of a layer or of the predictor."""
  sparse = vc.Sparsifiner(keep=keep, granularity="block", min_tokens=0)
  methods = {name: sparse for name in ("sparse", "hmhsa+sparse", "predictor")}
  for kind, regions, lce in (("regions", 7, False), ("routed", None, False), ("lce", None, True)):
    methods[kind] = vc.BiFormer(keep=keep, regions=regions, lce=lce, min_tokens=0)
  methods["merged"] = vc.KeyMerging(keep=keep, min_tokens=0)
  plan = vc.Plan(heads={"hmhsa": HMHSA, "logits": LOGITS, "hmhsa+sparse": HMHSA}.get(name),
                 attention=methods.get(name))
  layer = attention_layer(side, plan, width=WIDTH, heads=HEADS)
  x = jax.random.normal(jax.random.key(0), (batch, side * side + 1, WIDTH))
  variables, run = jax.jit(layer.init)(jax.random.key(1), x), layer.apply
  if name == "predictor":
    predictor = sparse.make(layer.site, parent=None)
    variables = {"params": variables["params"][sparse.scope]}
    query, key = (jax.random.normal(jax.random.key(seed), (*x.shape[:2], HEADS, WIDTH // HEADS))
                  for seed in (2, 3))
    return (lambda *args: predictor.apply(variables, attention.DENSE, *args).layout.chosen,
            (query, key))
  # The gradient of a sum of squares, so that the cotangent is a full array.
  fn = jax.grad(lambda *args: jnp.sum(run(*args) ** 2), (0, 1)) if gradients else run
  return fn, (variables, x)


def compiled(name: str, form: str, side: int, batch: int, keep: float, gradients: bool):
  """Returns (a call without arguments, temporary memory over inputs and outputs)."""
  fn, arguments = function_of(name, side, batch, keep, gradients)
  with attention.using(None if form == "auto" else form):
    program = jax.jit(fn).lower(*arguments).compile()
  memory = program.memory_analysis()
  share = memory.temp_size_in_bytes / (memory.argument_size_in_bytes + memory.output_size_in_bytes)
  return lambda: program(*arguments), share


def table(names, forms, side: int, batch: int, keep: float, gradients: bool, rounds: int
          ) -> list[str]:
  """Returns a row for each layer and form."""
  rows = [(name, form) for name in names for form in forms]
  programs = {row: compiled(*row, side, batch, keep, gradients) for row in rows}
  timing = paired({row: programs[row][0] for row in rows}, rounds=rounds)
  dense = min((row for row in rows if row[0] == "dense"), default=rows[0],
              key=lambda row: timing[row].seconds)
  # `paired` compares with the first candidate: time again with the fastest dense row first.
  timing = paired({row: programs[row][0] for row in [dense] + [r for r in rows if r != dense]},
                  rounds=rounds)
  return [f"| {side * side + 1} | {batch} | {name} | {form} | "
          f"{1e3 * timing[name, form].seconds:.2f} | {timing[name, form].speedup:.2f} "
          f"[{timing[name, form].low:.2f}, {timing[name, form].high:.2f}] | "
          f"{programs[name, form][1]:.2f} |" for name, form in rows]


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--sides", type=int, nargs="+", default=[14, 24, 32, 64],
                      help="patches per side")
  parser.add_argument("--batch", type=int, nargs="+", default=[8, 2, 1, 1],
                      help="images, for each of --sides")
  parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["dense", "hmhsa"])
  parser.add_argument("--forms", nargs="+", choices=["auto", *attention.FORMS],
                      default=["auto"])
  parser.add_argument("--keep", type=float, default=0.25,
                      help="share of blocks that sparse keeps, and of keys that merged keeps")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--gradients", action="store_true", help="time forward and backward")
  args = parser.parse_args()
  if len(args.batch) != len(args.sides):
    args.batch = args.batch[:1] * len(args.sides)
  print("| tokens | images | layer | form | ms | speedup over dense | memory |\n"
        "|---:|---:|---|---|---:|---|---:|", flush=True)
  try:
    for side, batch in zip(args.sides, args.batch, strict=True):
      print("\n".join(table(args.layers, args.forms, side, batch, args.keep, args.gradients,
                            args.rounds)), flush=True)
  except ValueError as error:
    raise SystemExit(f"error: {error}") from None
  print(f"\n{'forward and backward' if args.gradients else 'forward'}, "
        f"{jax.devices()[0].device_kind}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
  main()
