"""Tags name the weights of a model, as in timm's "vit_small_patch16_224.augreg_in1k".

`pretrained.json` lists them, {model: {tag: row}}, the default tag of a model first;
experiments/pretrained_tags.py writes it and says what a row contains.
"""
import difflib
import functools
import json
import pathlib
from typing import Any

from vitcompact.models.variant import Variant

TABLE = pathlib.Path(__file__).with_name("pretrained.json")


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
  """Returns all tags, including those of models that `create_model` does not know."""
  return json.loads(TABLE.read_text(encoding="utf-8"))


def row_of(model: str, tag: str = "") -> tuple[str, dict[str, Any]]:
  """Returns (tag, row) of a model's weights; without a tag, those of the default tag.

  Raises a one-line ValueError that lists the tags, if there is no such tag."""
  rows = table().get(model, {})
  if not rows:
    raise ValueError(f"{model} has no weights known by name; load a file of weights instead")
  if tag and tag not in rows:
    close = difflib.get_close_matches(tag, rows, n=1, cutoff=0.0)
    raise ValueError(f"{model} has no weights tagged {tag!r}, but {', '.join(rows)}; did you mean "
                     f"{model}.{close[0]}?")
  tag = tag or next(iter(rows))
  return tag, rows[tag]


def with_tag(variant: Variant, row: dict[str, Any]) -> Variant:
  """Returns a model's variant with the classes, image size and preprocessing of these weights."""
  size = row["image_size"]
  return variant._replace(
      sizes={**variant.sizes, "num_classes": row["num_classes"], "image_size": size},
      mean=tuple(row["mean"]), std=tuple(row["std"]), crop=row["crop"],
      crop_384=variant.crop_384 if size < 384 else None, interpolation=row["interpolation"],
      crop_mode=row.get("crop_mode", "center"))
