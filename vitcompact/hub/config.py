"""Reads the model that a config.json of timm or transformers describes, and writes ours."""
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from vitcompact import foreign_config
from vitcompact._version import __version__
from vitcompact.convert import metadata
from vitcompact.models import create_model, tags
from vitcompact.preprocess import Preprocess, preprocess

CONFIG = "config.json"
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}   # Pillow's numbers


class Described(NamedTuple):
  """A model as a config.json describes it: its name, with a tag if it is known; fields for
  `create_model`; class names; and those of {mean, std, crop, interpolation} that it has."""
  name: str
  fields: dict[str, Any]
  classes: list[str] | None = None
  images: Mapping[str, Any] = {}


def read(where: str, config: Mapping, processor: Mapping | None = None) -> Described:
  """The model in a config.json; ValueError, one line, if it is none of ours.

  where: the file's source, for errors. processor: transformers' preprocessor_config.json.
  """
  try:
    spec = foreign_config.model_spec(config)
    if "architecture" not in config:
      return Described(spec.model, spec.fields, spec.classes, _images(processor or {}))
    return _add_timm_settings(config, spec)
  except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError,
          RecursionError) as error:
    raise ValueError(f"{where}: its {CONFIG} does not describe a known model: "
                     f"{str(error)[:300]}; name it with model=NAME") from None


def _add_timm_settings(config: Mapping, spec) -> Described:
  """Adds the tag and how images are prepared to what `foreign_config` reads."""
  about = config.get("pretrained_cfg", config)   # at the top level before timm 0.9
  name, tag = spec.model, about.get("tag")
  # The tag's number of classes and image size may differ from the model's.
  fields = {**{key: getattr(create_model(name), key) for key in ("num_classes", "image_size")},
            **spec.fields}
  if tag in tags.table().get(name, ()):
    name = f"{name}.{tag}"
  if "input_size" in about and "in_chans" not in fields:
    fields["in_chans"] = about["input_size"][0]
  images = {ours: about[key] for key, ours in
            (("mean", "mean"), ("std", "std"), ("interpolation", "interpolation"),
             ("crop_pct", "crop"), ("crop_mode", "crop_mode")) if about.get(key) is not None}
  # If there are not as many names as logits, they belong to other data.
  known = spec.classes if len(spec.classes or ()) == fields["num_classes"] else None
  return Described(name, fields, known, images)


def _images(processor: Mapping) -> dict[str, Any]:
  """The settings in transformers' preprocessor_config.json, under our names."""
  images = {ours: tuple(processor[key]) for key, ours in
            (("image_mean", "mean"), ("image_std", "std")) if processor.get(key)}
  if processor.get("resample") in RESAMPLE:
    images["interpolation"] = RESAMPLE[processor["resample"]]
  size, crop = processor.get("size"), processor.get("crop_size")
  if isinstance(size, Mapping):
    shortest = size.get("shortest_edge")
    if isinstance(crop, Mapping):
      crop = crop.get("height")
    if processor.get("do_center_crop") and shortest and crop:
      images["crop"] = crop / shortest
    elif "height" in size:   # resized to both sides, ignoring the aspect ratio
      images["crop"] = None
  return images


def settings(prepare: Preprocess) -> dict[str, Any]:
  """How images are prepared, except their size: {mean, std, crop, interpolation, ...}."""
  return {key: value for key, value in dataclasses.asdict(prepare).items() if key != "image_size"}


def prepared(model: nn.Module, overrides: Mapping[str, Any]) -> Preprocess:
  """`preprocess(model)` with these settings replaced."""
  own = preprocess(model)
  try:
    values = {**settings(own), **overrides}
    for key in ("mean", "std"):
      numbers = tuple(map(float, values[key]))
      if len(numbers) != model.in_chans:   # of RGB, as in `preprocess`
        numbers = (sum(numbers) / len(numbers),) * model.in_chans
      values[key] = numbers
    return dataclasses.replace(own, **values)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise ValueError(f"{CONFIG} has unknown settings for preparing images ({error}): "
                     f"{dict(overrides)}") from None


def write(model: nn.Module, preprocess: Preprocess, classes: Sequence[str] | None,
          source: str = "") -> str:
  """The config.json for `push`: timm's keys, and ours under "vitcompact"."""
  name, _, tag = model.variant.partition(".")
  height, width = preprocess.image_size
  about = {"mean": preprocess.mean, "std": preprocess.std,
           "crop_pct": 1.0 if preprocess.crop is None else preprocess.crop,
           "crop_mode": "squash" if preprocess.crop is None else preprocess.crop_mode,
           "interpolation": preprocess.interpolation, "num_classes": model.num_classes,
           "input_size": (model.in_chans, height, width)}
  own = {key: json.loads(text) if key != "model" else text
         for key, text in metadata(model).items()}
  config = {"architecture": name, "num_classes": model.num_classes,
            **({"label_names": list(classes)} if classes else {}),
            "pretrained_cfg": {**({"tag": tag} if tag else {}), **about},
            "vitcompact": {"version": __version__, **own, **({"from": source} if source else {})}}
  return json.dumps(config, indent=1, ensure_ascii=False) + "\n"


def load(path) -> Mapping:
  """The object in a JSON file; ValueError, one line, if it holds none."""
  try:
    config = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(config, Mapping):
    raise ValueError(f"{path} holds a {type(config).__name__}, expected an object")
  return config
