"""vitcompact count: parameters and multiply-accumulates, as a Markdown table."""
import click

# hMHSA and cFFN in every block.
DEFAULT = '{"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}'


def default_plan(name: str):
  """(plan, why it is not the default or ""): cFFN alone if the network refuses hMHSA."""
  import vitcompact as vc

  plan = vc.Plan.parse(DEFAULT)
  vc.create_model(name)      # an unknown name raises here
  try:
    vc.create_model(name, plan=plan)
  except ValueError as error:
    return vc.Plan(ffn=plan.ffn), str(error)
  return plan, ""


def pairs(names, plan: str | None, image_size: int | None):
  """Yields (name, a remark if the plan is not the default, dense model, compact model) for each
  file or matching model; both models are in deployed form."""
  import vitcompact as vc
  from vitcompact import hub
  from vitcompact.cli import weights

  fields = {} if image_size is None else {"image_size": image_size}
  for name in names:
    if not hub.is_model_name(name):
      if plan is not None:
        raise ValueError(f"{name} has its own plan; leave --plan out")
      model = vc.load(weights.file_of(name))[0].clone(deploy=True, **fields)
      model.check()
      yield name, "", model.clone(plan=vc.Plan()), model
      continue
    if not (found := vc.list_models(name) or vc.list_models(name, pretrained=True)):
      raise ValueError(f"no model matches {name!r}; known: {', '.join(vc.list_models())}")
    for known in found:
      small_plan, why = default_plan(known) if plan is None else (vc.Plan.parse(plan), "")
      yield known, why and " (cFFN alone)", *(
          vc.create_model(known, plan=p, deploy=True, **fields) for p in (vc.Plan(), small_plan))


def table(names, plan: str | None = None, image_size: int | None = None) -> str:
  """A Markdown row for each model: dense, compact, and the change; both folded."""
  import vitcompact as vc

  lines = ["| model, deployed | params, dense | compact | | MACs, dense | compact | |",
           "|---|---:|---:|---:|---:|---:|---:|"]
  for name, less, *both in pairs(names, plan, image_size):
    dense, small = map(vc.count, both)
    lines.append(f"| {name}{less} | {dense.params / 1e6:.2f} M | {small.params / 1e6:.2f} M | "
                 f"{100 * (small.params / dense.params - 1):+.1f}% | {dense.macs / 1e9:.2f} G | "
                 f"{small.macs / 1e9:.2f} G | {100 * (small.macs / dense.macs - 1):+.1f}% |")
  return "\n".join(lines)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--plan", help="JSON, or a path to it (*.json).  [default: hMHSA and cFFN; cFFN "
              "alone if the network refuses hMHSA]")
@click.option("--image-size", type=int, help="Side in pixels.  [default: the model's own]")
def count(names, plan, image_size):
  """Count parameters and multiply-accumulates, dense and compact.

  NAMES are models, patterns such as 'deit_*', or files, folders and hf-hub:org/name that vitcompact
  wrote, which have their own plan. Without names, all models are counted. Both columns are for one
  image and the deployed form, in which norms and branches are folded (nextvit_small then has 31.73
  M parameters, and 31.76 M in training). Counts come from the traced program; nothing is run.
  """
  click.echo(table(names or ("*",), plan, image_size))
