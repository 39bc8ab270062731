"""vitcompact predict: the most probable classes of images."""
import glob
import json
import os
import pathlib
import sys

import click

IMAGENET_NOTE = "{file} has no class names: using those of ImageNet-1k; --labels gives others"
SAME_NAMES = "Give the names in the order of the file, or leave --labels out"


def paths_of(given) -> list[str]:
  """Expands arguments to files: a directory to all images in it and below, and a pattern, if the
  shell did not expand it, to what it matches. Missing files stay in the list, to be reported later.
  """
  from vitcompact.data import folder
  from vitcompact.data.decode import printable

  paths = []
  for name in given:
    found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True)) or [name]
    for path in found:
      below = folder.images_below(path) if os.path.isdir(path) else [path]
      if not below:
        raise ValueError(f"no images in {printable(path)}: name the files, or another folder")
      paths += below
  return paths


def probabilities(model, variables, preprocess, paths, batch: int):
  """Yields (path, float32 (classes,)), computed in batches, or (path, BadRecord) for an image that
  cannot be read."""
  import jax
  import numpy as np

  from vitcompact.data.decode import BadRecord

  forward = jax.jit(lambda v, x: jax.nn.softmax(model.apply(v, x).astype("float32")))
  size = min(batch, len(paths))   # of every batch: a smaller last one would compile again
  images = np.zeros((size, *preprocess.image_size, model.in_chans), np.float32)
  for start in range(0, len(paths), size):
    some, bad = paths[start:start + size], {}
    for i, path in enumerate(some):
      try:
        images[i] = preprocess(path)
      except BadRecord as error:
        bad[i] = error
    probs = np.asarray(forward(variables, images)) if len(bad) < len(some) else None
    for i, path in enumerate(some):
      yield path, bad[i] if i in bad else probs[i]


def class_names(file: str, model, stored: list[str] | None, labels: str | None
                ) -> tuple[list[str], str]:
  """(the names of the classes in order, a note for the user or "").

  stored: the names in the model's file; labels: a file with other names, one per line.
  """
  import vitcompact as vc
  from vitcompact.data import classes

  if labels is not None:
    names = labels_in(labels, model.num_classes)
    if stored and sorted(stored) == sorted(names):
      classes.check_classes(file, stored, names, SAME_NAMES, labels)
    other = classes.difference(file, stored, names, labels)
    return names, f"{other}. The latter are shown" if other else ""
  if stored:
    return stored, ""
  count = vc.create_model(model.variant).num_classes
  if (_has_imagenet_classes(model.variant) and
      model.num_classes == count == len(classes.imagenet_1k())):
    return list(classes.imagenet_1k()), IMAGENET_NOTE.format(file=file)
  return [str(i) for i in range(model.num_classes)], ""


def _has_imagenet_classes(variant: str) -> bool:
  """Whether a model's classes are ImageNet's: its tag says so, or it has no tag and its family is
  published with these classes. The outputs of CLIP models are text embeddings instead."""
  name, _, tag = variant.partition(".")
  return "in1k" in tag if tag else "_clip_" not in name


def labels_in(path: str, count: int) -> list[str]:
  """The lines of a file, which must be `count`, not counting empty lines at the end."""
  try:
    names = pathlib.Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
  if len(names) != count:
    raise ValueError(f"{path} has {len(names)} lines, and the model {count} classes")
  return names


def as_json(path: str, best) -> str:
  """best: (class index, name, probability), the most probable first."""
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
              help="How many classes to show.")
@click.option("--labels", metavar="FILE", help="Names of the classes, one per line, instead of "
              "those in the model's file.")
@click.option("--json", "json_lines", is_flag=True,
              help="Print JSON, one object per line for each image.")
@click.option("--exif-transpose", is_flag=True,
              help="Rotate photographs as their EXIF data say.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True,
              help="Images per batch.")
def predict(file, images, top, labels, json_lines, exif_transpose, batch):
  """Print the most probable classes of IMAGES.

  \b
  vitcompact predict deploy.safetensors cat.jpg
  vitcompact predict deploy.safetensors photos --json

  FILE is a model that training or `vitcompact convert` wrote (deploy.safetensors), a folder that
  push wrote, or the name of pretrained weights: deit_small_patch16_224.fb_in1k, hf-hub:org/name.
  IMAGES are files, folders or patterns; they are resized, cropped and normalised as in the
  evaluation of the run that wrote FILE, or by default of the model. If the output is a pipe, each
  image is one line: its path, then classes with their probability in percent, separated by tabs.

  If an image cannot be read, it is reported and the others are still predicted; the exit code is
  then 1, or 2 if none could be read.
  """
  import dataclasses

  import vitcompact as vc
  from vitcompact import convert
  from vitcompact.cli import weights
  from vitcompact.data.decode import BadRecord

  file = weights.file_of(file)
  model, variables = vc.load(file)
  stored, preprocess = convert.classes_of(file), vc.preprocess(file)
  if not model.num_classes:
    raise ValueError(f"{file} gives features: it has no classifier")
  names, note = class_names(file, model, stored, labels)
  paths = paths_of(images)
  if note:
    click.echo(f"note: {note}", err=True)
  if json_lines:
    formatted = as_json
  else:
    formatted = as_table if sys.stdout.isatty() else as_line
  preprocess = dataclasses.replace(preprocess, exif_transpose=exif_transpose)
  failed = 0
  for path, probs in probabilities(model, variables, preprocess, paths, batch):
    if isinstance(probs, BadRecord):
      failed += 1
      click.echo(f"error: {probs}", err=True)
      if json_lines:
        click.echo(json.dumps({"image": path, "error": str(probs)}))
      continue
    best = (-probs).argsort()[:top]
    click.echo(formatted(path, [(int(i), names[i], float(probs[i])) for i in best]))
  if failed:
    raise click.exceptions.Exit(1 if failed < len(paths) else 2)
