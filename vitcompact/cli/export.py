"""vitcompact export: writes a model as a file for another runtime."""
import click

TUNED = {".onnx": "ort", ".xml": "openvino"}   # {suffix: the runtime that --tune times}


@click.command()
@click.argument("file")
@click.argument("out", required=False)
@click.option("--to", type=click.Choice(["onnx", "openvino", "stablehlo", "safetensors", "torch"]),
              help="The format.  [default: by the suffix of OUT]")
@click.option("--out", "named", help="The file to write; the same as OUT.")
@click.option("--batch", type=click.IntRange(1), help="Fix the batch size.  [default: any]")
@click.option("--pixels", is_flag=True,
              help="Take uint8 pixels as input, and normalise them in the file.")
@click.option("--half", is_flag=True, help="Store 16-bit weights (OpenVINO).")
@click.option("--int8", "calibration", metavar="DATA", help="Quantise matrices to 8 bits (ONNX), "
              "calibrated on images of DATA: folder:PATH, digits, ... as in training.")
@click.option("--images", "count", type=click.IntRange(1), default=128, show_default=True,
              help="Number of calibration images for --int8.")
@click.option("--tokens", is_flag=True,
              help="Add a second output: which patches survive (ONNX).")
@click.option("--tune", is_flag=True, help="Merge factorised layers into one matrix where that is "
              "faster in the file's runtime.")
@click.option("--tolerance", type=click.FloatRange(0, min_open=True),
              help="Largest difference allowed, as a share of the largest logit.  [default: 1e-5 "
              "for float32]")
@click.option("--force", is_flag=True, help="Overwrite a file that exists.")
def export(file, out, to, named, batch, pixels, half, calibration, count, tokens, tune,
           tolerance, force):
  """Write FILE as OUT for another runtime, and compare the two.

  \b
  vitcompact export deploy.safetensors deploy.onnx
  vitcompact export deit_small_patch16_224 --to openvino --out deit.xml --half

  FILE is a model that training or `vitcompact convert` wrote, or the name of pretrained weights, as
  for predict. A model in training form is folded. OUT ends in .onnx, .xml (OpenVINO), .stablehlo
  (JAX on CPUs, GPUs and TPUs), .safetensors or .pth. The file is read back in its runtime and
  compared with the model on photographs, in batches of one and of three; if it differs by more than
  the tolerance, nothing is written and the exit code is 2.
  """
  import pathlib

  import vitcompact as vc
  from vitcompact import convert
  from vitcompact.cli import weights
  from vitcompact.export import FORMATS, check_choices, checked_path

  if out and named:
    raise click.UsageError("OUT and --out name the same file: give one of them.")
  source = weights.file_of(file)
  out = out or named
  if out is None:
    if to is None:
      raise click.UsageError("name the file to write, or its format with --to.")
    out = pathlib.Path(source).with_suffix(FORMATS[to].suffix).name
  _, name = checked_path(out, to, force)
  runtime = TUNED.get(pathlib.Path(out).suffix)
  if tune and runtime is None:
    raise ValueError(f"{out}: --tune times ONNX Runtime and OpenVINO, which read "
                     f"{', '.join(TUNED)}; vc.tune chooses for XLA")
  model, variables = vc.load(source)
  preprocess = vc.preprocess(source)
  # Fails here, before minutes of tuning and calibrating.
  check_choices(name, model, batch, pixels, half, calibration, tokens, convert.classes_of(source))
  if not model.deploy:
    click.echo(f"{file} is in training form: folding it", err=True)
  if pathlib.Path(out).suffix in (".onnx", ".xml"):
    click.echo("translating (the first time, jax2onnx takes some seconds to start) ...", err=True)
  if tune:
    model, variables = tuned(model, variables, preprocess, runtime, batch)
  int8 = calibration and images_of(source, model, calibration, count)
  click.echo(vc.export(model, variables, out, to=to, batch=batch, pixels=pixels, half=half,
                       classes=convert.classes_of(source), preprocess=preprocess, int8=int8,
                       tokens=tokens, tolerance=tolerance, force=force))


def tuned(model, variables, preprocess, runtime: str, batch: int | None):
  """(the folded model in the forms that are fastest in a runtime, its variables)."""
  import vitcompact as vc
  from vitcompact.export import photographs

  images = preprocess.normalise(photographs(preprocess, batch or 8))
  model, variables = vc.tune(*vc.fold(model, variables), images, runtime=runtime)
  click.echo(f"one matrix: {', '.join(model.execution.merged) or 'no layer'}", err=True)
  return model, variables


def images_of(file: str, model, name: str, count: int):
  """Normalised images (n, H, W, C) from the training split of a data set."""
  from vitcompact.cli import compact
  from vitcompact.run import path
  from vitcompact.train import config as configs

  compact.note_classes(file, name)
  config = configs.complete(compact.settings(file, name, compact={"images": max(8, count)}))
  return path.calibration_images(config, path.preprocess_of(config, model))[:count]
