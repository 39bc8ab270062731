"""vitcompact predict: the most probable classes of images."""
import glob
import json
import os
import pathlib
import sys

import click

IMAGENET_NOTE = "{file} tells no names of classes: they are ImageNet-1k's; --labels gives others"
SAME_NAMES = "Give the names in the order of the file, or leave --labels out"


def paths_of(given) -> list[str]:
  """The files that arguments stand for: a directory for the images in it and below, a pattern that
  no shell has expanded for what it matches. What is not there stays, to be named later."""
  from vitcompact.data import folder
  from vitcompact.data.decode import printable

  paths = []
  for name in given:
    there = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True)) or [name]
    for path in there:
      below = folder.images_below(path) if os.path.isdir(path) else [path]
      if not below:
        raise ValueError(f"no images in {printable(path)}: name the files, or another folder")
      paths += below
  return paths


def probabilities(model, variables, preprocess, paths, batch: int):
  """Yields (path, float32 (classes,)), computed a batch at a time; or (path, the reason as a
  BadRecord) where an image cannot be read."""
  import jax
  import numpy as np

  from vitcompact.data.decode import BadRecord

  forward = jax.jit(lambda v, x: jax.nn.softmax(model.apply(v, x).astype("float32")))
  size = min(batch, len(paths))   # of every batch, the last one too: another would be compiled
  images = np.zeros((size, *preprocess.image_size, model.in_chans), np.float32)
  for start in range(0, len(paths), size):
    some, bad = paths[start:start + size], {}
    for i, path in enumerate(some):
      try:
        images[i] = preprocess(path)
      except BadRecord as error:
        bad[i] = error
    chances = np.asarray(forward(variables, images)) if len(bad) < len(some) else None
    for i, path in enumerate(some):
      yield path, bad[i] if i in bad else chances[i]


def class_names(file: str, model, told: list[str] | None, labels: str | None
                ) -> tuple[list[str], str]:
  """(the names of the classes in order, what the user should know of them or "").

  told: those in the model's file; labels: a file of others, one in each line.
  """
  import vitcompact as vc
  from vitcompact.data import classes

  if labels is not None:
    names = labels_in(labels, model.num_classes)
    if told and sorted(told) == sorted(names):
      classes.check_classes(file, told, names, SAME_NAMES, labels)
    other = classes.difference(file, told, names, labels)
    return names, f"{other}. The latter are shown" if other else ""
  if told:
    return told, ""
  count = vc.create_model(model.variant).num_classes
  if _of_imagenet(model.variant) and model.num_classes == count == len(classes.imagenet_1k()):
    return list(classes.imagenet_1k()), IMAGENET_NOTE.format(file=file)
  return [str(i) for i in range(model.num_classes)], ""


def _of_imagenet(variant: str) -> bool:
  """Whether a model of so many classes has ImageNet's: its tag says so, or it has none and is of a
  family that is published with these. CLIP's are projections into the space of texts, too."""
  name, _, tag = variant.partition(".")
  return "in1k" in tag if tag else "_clip_" not in name


def labels_in(path: str, count: int) -> list[str]:
  """The lines of a file, of which there must be `count`; empty ones at the end do not count."""
  try:
    names = pathlib.Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None
  if len(names) != count:
    raise ValueError(f"{path} has {len(names)} lines, and the model {count} classes")
  return names


def as_json(path: str, best) -> str:
  """best: (number of the class, its name, its probability), the most probable first."""
  keys = ("index", "name", "probability")
  return json.dumps({"image": path, "classes": [dict(zip(keys, row, strict=True))
                                                for row in best]})


def as_line(path: str, best) -> str:
  from vitcompact.data.decode import printable

  fields = [path, *(f"{name} {100 * share:.2f}" for _, name, share in best)]
  return "\t".join(map(printable, fields))


def as_table(path: str, best) -> str:
  from vitcompact.data.decode import printable

  rows = [f"{100 * share:7.2f}%  {printable(name)}" for _, name, share in best]
  return "\n".join([click.style(printable(path), bold=True), *rows])


@click.command()
@click.argument("file")
@click.argument("images", nargs=-1, required=True)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True,
              help="How many classes are shown.")
@click.option("--labels", metavar="FILE", help="Names of the classes, one in each line, instead of "
              "those that the model's file tells.")
@click.option("--json", "json_lines", is_flag=True,
              help="A JSON object a line, one for each image.")
@click.option("--exif-transpose", is_flag=True, help="Turn photographs as their EXIF data say.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
def predict(file, images, top, labels, json_lines, exif_transpose, batch):
  """Print the most probable classes of IMAGES.

  \b
  vitcompact predict deploy.safetensors cat.jpg
  vitcompact predict deploy.safetensors photos --json

  FILE is a model that training or `vitcompact convert` wrote (deploy.safetensors), or weights by
  name: deit_small_patch16_224.fb_in1k, hf-hub:org/name, a folder that push wrote. IMAGES are files,
  folders of them, or patterns; they are resized, cropped and normalised as in the evaluation of the
  run that wrote FILE, or of the model. In a pipe, each image is a line: its path, then
  classes with their probability in percent, separated by tabs.

  An image that cannot be read is named, and the others are predicted; the exit code is then 1, or 2
  where none could be read.
  """
  import dataclasses

  import vitcompact as vc
  from vitcompact import convert
  from vitcompact.cli import weights
  from vitcompact.data.decode import BadRecord

  file = weights.file_of(file)
  model, variables = vc.load(file)
  told, preprocess = convert.classes_of(file), vc.preprocess(file)
  if not model.num_classes:
    raise ValueError(f"{file} gives features: it has no classifier")
  names, note = class_names(file, model, told, labels)
  paths = paths_of(images)
  if note:
    click.echo(f"note: {note}", err=True)
  if json_lines:
    written = as_json
  else:
    written = as_table if sys.stdout.isatty() else as_line
  preprocess = dataclasses.replace(preprocess, exif_transpose=exif_transpose)
  failed = 0
  for path, chances in probabilities(model, variables, preprocess, paths, batch):
    if isinstance(chances, BadRecord):
      failed += 1
      click.echo(f"error: {chances}", err=True)
      if json_lines:
        click.echo(json.dumps({"image": path, "error": str(chances)}))
      continue
    best = (-chances).argsort()[:top]
    click.echo(written(path, [(int(i), names[i], float(chances[i])) for i in best]))
  if failed:
    raise click.exceptions.Exit(1 if failed < len(paths) else 2)
