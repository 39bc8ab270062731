"""vitcompact predict: the most probable classes of images."""
import pathlib

import click


def open_image(path: str):
  """The image in a file; ValueError where there is none."""
  from vitcompact.data import decode

  try:
    return decode.rgb(path, path)
  except decode.BadRecord as error:
    raise ValueError(f"cannot read {path}: {error.__cause__}") from error


def probabilities(model, variables, paths, batch: int, prepared=None):
  """Yields (path, probability of each class), computed a batch at a time."""
  import jax
  import numpy as np

  import vitcompact as vc

  prepared = prepared or vc.preprocess(model)
  forward = jax.jit(lambda v, x: jax.nn.softmax(model.apply(v, x).astype("float32")))
  for start in range(0, len(paths), batch):
    some = paths[start:start + batch]
    images = np.stack([prepared(open_image(path)) for path in some])
    yield from zip(some, np.asarray(forward(variables, images)), strict=True)


def class_names(path: str | None, classes: int) -> list[str]:
  """The names of the classes, one in each line of a file; their numbers without one."""
  if path is None:
    return [str(i) for i in range(classes)]
  names = pathlib.Path(path).read_text().splitlines()
  if len(names) != classes:
    raise ValueError(f"{path} has {len(names)} lines, and the model {classes} classes")
  return names


@click.command()
@click.argument("file")
@click.argument("images", nargs=-1, required=True)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True,
              help="How many classes are shown.")
@click.option("--labels", metavar="FILE", help="Names of the classes, one in each line.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
def predict(file, images, top, labels, batch):
  """Print the most probable classes of IMAGES.

  FILE is a model that training or `vitcompact convert` wrote (deploy.safetensors), or weights by
  name: deit_small_patch16_224.fb_in1k, hf-hub:org/name, a folder that push wrote. Images are
  resized, cropped and normalised as in the evaluation of the run that wrote it, or of the model. A
  line for each image: its path, then classes with their probability in percent, separated by tabs.
  """
  import vitcompact as vc
  from vitcompact.cli import weights

  file = weights.file_of(file)
  model, variables = vc.load(file)
  if not model.num_classes:
    raise ValueError(f"{file} gives features: it has no classifier")
  names = class_names(labels, model.num_classes)
  for path, chances in probabilities(model, variables, images, batch,
                                     vc.preprocess(file)):
    best = (-chances).argsort()[:top]
    click.echo("\t".join([path, *(f"{names[i]} {100 * chances[i]:.2f}" for i in best)]))
