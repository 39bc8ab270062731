"""vitcompact measure, compact, verify: from a dense model to a smaller deployed one."""
import re

import click

LEARNING_RATE = 5e-5   # peak of distilling: a twentieth of what is usual for a dense model
SHARE = click.FloatRange(0, 1, min_open=True)
POSITIVE = click.FloatRange(0, min_open=True)
FEWEST_IMAGES = click.IntRange(8)   # as for config.compact.images


def settings(file: str, name: str, **sections):
  """A config for a dense model's file and a data set's name, with these sections. Images are
  cropped as the file says."""
  from ml_collections import ConfigDict

  import vitcompact as vc
  from vitcompact.models import fields_of

  model, _ = vc.load(file)
  fields = fields_of(model)
  for key in ("plan", "execution", "deploy"):
    fields.pop(key)
  if model.num_classes:   # the data set sets the number; 0 means no classifier, and stays
    fields.pop("num_classes")
  if "mix_token" in fields:   # a teacher sees unmixed images
    fields["mix_token"] = False
  config = ConfigDict({"init_from": file, "model": {"name": model.variant, **fields},
                       "data": {"name": name}, "plan": ""})
  own, crop = vc.preprocess(model).crop, vc.preprocess(file).crop
  if crop is None and own is not None:
    config.data.eval_fit = "warp"
  elif crop != own:
    config.data.eval_crop = crop
  for section, values in sections.items():
    if isinstance(values, dict):
      config[section] = ConfigDict({**config.get(section, ConfigDict()).to_dict(), **values})
    else:
      config[section] = values
  return config


def note_classes(file: str, data: str):
  """Prints a note if the model's classes differ from the data's; for subcommands without labels."""
  from vitcompact import convert
  from vitcompact.data import classes, pipeline

  if other := classes.difference(file, convert.classes_of(file), pipeline.class_names(data)):
    click.echo(f"note: {other}. Only the images are used, not their labels", err=True)


def steps_of(distil: str | None, data: str, batch_size: int) -> int:
  """Number of steps from "5ep" (epochs) or "2000" (steps); 0 for None."""
  from vitcompact.data import pipeline

  if distil is None:
    return 0
  match = re.fullmatch(r"(\d+(?:\.\d+)?)ep|(\d+)", distil)
  if not match or float(match[1] or match[2]) <= 0:
    raise ValueError(f"--distil {distil}: must be epochs, such as 5ep, or a whole number of steps")
  if match[2]:
    return int(match[2])
  return max(1, round(float(match[1]) * pipeline.num_examples(data, "train") / batch_size))


@click.command()
@click.argument("file")
@click.option("--data", required=True, metavar="NAME", help="folder:PATH, arrayrecord:PATH, "
              "tfds:NAME, idx:PATH, hf:NAME, fashion_mnist or digits. Calibration images come from "
              "its train split.")
@click.option("--macs", type=SHARE, help="Target share of the dense model's MACs, such as 0.7.")
@click.option("--params", type=SHARE, help="Target share of the dense model's parameters.")
@click.option("--speedup", type=POSITIVE, help="Target speed on this device: 1.5 is one and a half "
              "times the dense model's.")
@click.option("--latency-ms", type=POSITIVE, help="Target milliseconds for a batch on this device.")
@click.option("--latency-batch", type=click.IntRange(1), default=1, show_default=True,
              help="Images in the batch that is timed for these two.")
@click.option("--plan", help="A JSON plan, or a path to one, instead of one chosen from data.")
@click.option("--distil", metavar="5ep", help="Distil from the dense model: epochs (5ep) or steps "
              "(2000).")
@click.option("--images", type=FEWEST_IMAGES, default=512, show_default=True,
              help="Number of calibration images.")
@click.option("--sensitivity", type=click.Choice(["quick", "full"]), default="quick",
              show_default=True, help="How many options to try.")
@click.option("--augment", default="flip_crop", show_default=True,
              help="Augmentation for distilling.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True,
              help="Batch size for distilling.")
@click.option("--learning-rate", type=POSITIVE, default=LEARNING_RATE, show_default=True,
              help="Peak learning rate for distilling.")
@click.option("--export", "formats", multiple=True, metavar="FORMAT",
              help="Also export to onnx, openvino, stablehlo or torch. Repeatable.")
@click.option("--out", required=True, metavar="DIR", help="Folder for the files of all stages.")
def compact(file, data, macs, params, speedup, latency_ms, latency_batch, plan, distil, images,
            sensitivity, augment, batch_size, learning_rate, formats, out):
  """Make a dense model smaller, measured and verified.

  \b
  vitcompact compact deit.safetensors --data folder:imagenet --macs 0.7 --out small
  vitcompact compact deit.safetensors --data folder:imagenet --macs 0.7 --distil 5ep --out small

  Measures what each block can do without (report.html), chooses a plan (plan.json, with reasons in
  plan.txt), fits the smaller model to the dense one without training, distils it if asked, folds,
  verifies and times it, and writes deploy.safetensors and a receipt. Run the same command again to
  resume. For another plan, copy report.json, report.html and an edited plan.json to a new folder,
  and give that as --out. FILE may also be a name of pretrained weights, such as
  deit_small_patch16_224.fb_in1k or hf-hub:org/name. The exit code is 1 if the deployed form does
  not compute the same function.
  """
  from vitcompact.cli import weights
  from vitcompact.run import path

  file = weights.file_of(file)
  goals = {"macs": macs, "params": params, "speedup": speedup, "latency_ms": latency_ms}
  goals = {name: value for name, value in goals.items() if value is not None}
  if plan is not None and not goals:
    goals = {"macs": 1.0}
  if len(goals) != 1:
    raise ValueError("give one of --macs, --params, --speedup, --latency-ms or --plan")
  steps = steps_of(distil, data, batch_size)
  config = settings(
      file, data, eval_batch_size=64, batch_size=batch_size, total_steps=max(steps, 1),
      plan=plan or "", export=",".join(formats), data={"augment": augment if steps else "none"},
      compact={**goals, "latency_batch": latency_batch, "images": images,
               "sensitivity": sensitivity, "distil": bool(steps)},
      checkpoint_every=max(1, steps // 4) or 1,
      optim={"learning_rate": learning_rate, "warmup_steps": steps // 20, "clip_norm": 1.0,
             "final_learning_rate": min(1e-6, learning_rate)},
      loss=path.distillation(file) if steps else {})
  receipt = path.run(config, out, say=click.echo)
  click.echo(receipt.to_markdown())
  if not receipt.ok:
    raise click.exceptions.Exit(1)


@click.command()
@click.argument("file")
@click.option("--data", required=True, metavar="NAME", help="As for vitcompact compact.")
@click.option("--images", type=FEWEST_IMAGES, default=512, show_default=True,
              help="Number of calibration images.")
@click.option("--sensitivity", type=click.Choice(["none", "quick", "full"]), default="quick",
              show_default=True, help="How many options to try.")
@click.option("--out", required=True, metavar="DIR", help="Folder for report.json and report.html.")
@click.option("--force", is_flag=True, help="Overwrite a report.")
def measure(file, data, images, sensitivity, out, force):
  """Measure what each block of a dense model can do without."""
  import pathlib

  import vitcompact as vc
  from vitcompact.cli import weights
  from vitcompact.run import path
  from vitcompact.train import config as configs

  if not force and (pathlib.Path(out) / "report.json").exists():
    raise ValueError(f"{pathlib.Path(out) / 'report.json'} exists; give another folder or --force")
  file = weights.file_of(file)
  model, variables = vc.load(file)
  config = configs.complete(settings(file, data, compact={"images": images}))
  note_classes(file, data)
  with path.Bar("measure") as progress:
    report = vc.measure(model, variables, path.calibration_images(
        config, path.preprocess_of(config, model)), sensitivity, progress)
  click.echo(f"wrote {report.save(out, force=force)} and report.html")
  if sensitivity != "none":
    for macs in (0.8, 0.65, 0.5):
      try:
        click.echo(f"--macs {macs}: {report.explain(report.plan(macs=macs), macs=macs)}\n")
      except ValueError as error:
        click.echo(f"--macs {macs}: {error}\n")


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--images", type=click.IntRange(1), default=32, show_default=True,
              help="Number of images.")
@click.option("--data", metavar="NAME", help="As for vitcompact compact, but uses the val split.  "
              "[default: random images]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32",
              show_default=True, help="In which the second model computes.")
@click.option("--tolerance", type=float, help="Largest difference allowed, as a share of the "
              "largest logit.  [default: 1e-5, with bfloat16 0.05]")
def verify(first, second, images, data, dtype, tolerance):
  """Check that two files compute the same function.

  The exit code is 1 if they do not.
  """
  import jax
  import numpy as np

  import vitcompact as vc
  from vitcompact import convert
  from vitcompact.checks import image_shapes
  from vitcompact.cli import weights
  from vitcompact.data import classes
  from vitcompact.run import path
  from vitcompact.train import config as configs

  first, second = weights.file_of(first), weights.file_of(second)
  (model, variables), (other, other_variables) = vc.load(first), vc.load(second)
  names = convert.classes_of(first), convert.classes_of(second)
  if difference := classes.difference(first, *names, second):
    click.echo(f"note: {difference}. Outputs are compared by their number", err=True)
  if data:
    note_classes(first, data)
    config = configs.complete(settings(first, data, compact={"images": max(8, images)}))
    inputs = path.calibration_images(config, path.preprocess_of(config, model), "val")[:images]
  else:
    shape = image_shapes(model, images).shape
    inputs = np.asarray(jax.random.normal(jax.random.key(0), shape))
  tolerance = tolerance or (1e-5 if dtype == "float32" else 0.05)
  proof = vc.verify(model.clone(dtype="float32"), variables, other.clone(dtype=dtype),
                    other_variables, inputs, tolerance=tolerance)
  click.echo(f"{'same function' if proof.ok else 'NOT the same function'}: on {proof.images} "
             f"{'images of ' + data if data else 'random images'} the logits differ by at most "
             f"{proof.max_rel:.2g} of the largest (allowed {tolerance:.0e}), "
             f"{100 * proof.top1_agreement:.2f}% of the top-1 classes agree"
             + (f"; a difference first arises in {proof.first_difference}"
                if proof.first_difference else ""))
  if not proof.ok:
    raise click.exceptions.Exit(1)
