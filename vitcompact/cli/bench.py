"""vitcompact bench: how fast compact models are on this machine, beside the dense one."""
import click

COLUMNS = ("model", "parameters", "MACs", "ms", "images/s", "speed", "of the MACs' ratio")


def candidates(name: str, plans, image_size: int | None) -> dict:
  """{label: deployed model}, the dense one first. name: a model's, or of weights."""
  import vitcompact as vc
  from vitcompact import hub
  from vitcompact.cli import weights

  fields = {} if image_size is None else {"image_size": image_size}
  if not hub.is_model_name(name):
    if plans:
      raise ValueError(f"{name} has its own plan; leave --plan out")
    model = vc.load(weights.file_of(name))[0].clone(deploy=True, **fields)
    model.check()
    return {"dense": model.clone(plan=vc.Plan()), name: model}
  models = {"dense": vc.create_model(name, deploy=True, **fields)}
  for plan in plans:
    models[plan] = vc.create_model(name, plan=vc.Plan.parse(plan), deploy=True, **fields)
  return models


def forward(model, batch: int):
  """A function without arguments: inference of that many random images, with random weights."""
  import jax
  import jax.numpy as jnp

  from vitcompact import bench
  from vitcompact.doors import image_shapes, variable_shapes
  from vitcompact.tune import random_arrays

  images = random_arrays(image_shapes(model, batch))
  variables = random_arrays(variable_shapes(model))
  if "batch_stats" in variables:    # variances are positive
    variables["batch_stats"] = jax.tree.map(jnp.ones_like, variables["batch_stats"])
  return bench.compiled(model.apply, variables, images).call


def rows(models: dict, batch: int, rounds: int):
  """(a row of COLUMNS for each model, the Timing of the first)."""
  import vitcompact as vc
  from vitcompact import bench

  counts = {label: vc.count(model) for label, model in models.items()}
  timings = bench.paired({label: forward(model, batch) for label, model in models.items()},
                         rounds=rounds)
  first = next(iter(models))
  out = []
  for label, timing in timings.items():
    count = counts[label]
    speed, share = "1", ""
    if label != first:
      ratio = counts[first].macs / count.macs
      speed = f"{timing.speedup:.2f}x [{timing.low:.2f}, {timing.high:.2f}]"
      share = f"{100 * timing.speedup / ratio:.0f}%"
    out.append((label, f"{count.params / 1e6:.2f} M", f"{count.macs / 1e9:.2f} G",
                f"{1000 * timing.seconds:.1f}", f"{batch / timing.seconds:.1f}", speed, share))
  return out, timings[first]


@click.command()
@click.argument("name")
@click.option("--plan", "plans", multiple=True,
              help="JSON, or a path to it (*.json); repeat it to compare several.")
@click.option("--image-size", type=int, help="Pixels of a side.  [default: the model's own]")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Images.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True,
              help="How often each model takes its turn.")
def bench(name, plans, image_size, batch, rounds):
  """Time a model under plans against the dense one, on this machine.

  \b
  vitcompact bench deit_small_patch16_224 --plan plan.json --image-size 224 --batch 8
  vitcompact bench deploy.safetensors

  NAME is a model, or a file, folder or hf-hub:org/name that vitcompact wrote, which has its own
  plan. All are in their
  deployed form, with random weights. They take turns: speed is the median over rounds of the
  ratio to the dense model in the same round, with the least and the most in brackets. On a CPU the
  clock counts the CPU seconds of this process; pin it to a core for steady numbers (taskset -c 0).
  """
  import jax

  from vitcompact.bench import processor

  lines, timing = rows(candidates(name, plans, image_size), batch, rounds)
  click.echo("\n".join(f"| {' | '.join(line)} |" for line in (
      COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *lines)))
  clock, device = "CPU seconds", processor()
  if timing.clock == "wall":
    clock, device = "seconds", jax.devices()[0].device_kind
  click.echo(f"\n{device}, jax {jax.__version__}, batch {batch}; {clock}, medians of {rounds} "
             f"rounds, load {timing.load:.1f}.")
