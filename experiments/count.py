"""Parameters and multiply-accumulates of models, dense and under a plan, as a Markdown table.

  python -m experiments.count
  python -m experiments.count "deit_*" --plan plan.json --image-size 384

The default plan is hMHSA and cFFN in every block. Counts are of the deployed (folded) form, read
off the traced inference program at one image; nothing is run.
"""
import argparse

import vitcompact as vc

DEFAULT = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())


def table(patterns: list[str], plan: vc.Plan, image_size: int | None = None) -> str:
  """A row for each model whose name fits a pattern: dense, under the plan, and the change."""
  for pattern in patterns:
    if not vc.list_models(pattern):
      raise ValueError(f"no model is named like {pattern!r}; known: {', '.join(vc.list_models())}")
  lines = ["| model | params, dense | compact | | MACs, dense | compact | |",
           "|---|---:|---:|---:|---:|---:|---:|"]
  for name in [name for pattern in patterns for name in vc.list_models(pattern)]:
    fields = {} if image_size is None else {"image_size": image_size}
    dense, small = (vc.count(vc.create_model(name, plan=p, deploy=True, **fields))
                    for p in (vc.Plan(), plan))
    lines.append(f"| {name} | {dense.params / 1e6:.2f} M | {small.params / 1e6:.2f} M | "
                 f"{100 * (small.params / dense.params - 1):+.1f}% | {dense.macs / 1e9:.2f} G | "
                 f"{small.macs / 1e9:.2f} G | {100 * (small.macs / dense.macs - 1):+.1f}% |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("patterns", nargs="*", default=["*"], help="of names, such as 'deit_*'")
  parser.add_argument("--plan", default=DEFAULT.to_json(), help="JSON, or a path to it (*.json)")
  parser.add_argument("--image-size", type=int)
  args = parser.parse_args()
  try:
    print(table(args.patterns, vc.Plan.parse(args.plan), args.image_size))
  except ValueError as error:
    raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
  main()
