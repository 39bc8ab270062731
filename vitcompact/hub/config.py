"""What a config.json says of a model: timm's, transformers', and how ours is written."""
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vitcompact._version import __version__
from vitcompact.convert import metadata
from vitcompact.models import create_model, list_models, tags
from vitcompact.preprocess import Preprocess, preprocess

CONFIG = "config.json"
# timm's names of a model's arguments, and ours.
TIMM = {"img_size": "image_size", "patch_size": "patch_size", "embed_dim": "width",
        "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp_ratio", "in_chans": "in_chans",
        "global_pool": "global_pool", "drop_path_rate": "drop_path_rate", "depths": "depths",
        "embed_dims": "widths", "mlp_ratios": "mlp_ratios", "sr_ratios": "sr_ratios",
        "linear": "linear", "num_classes": "num_classes"}
# transformers' model_type: timm's names of the models, and of ours of all its sizes.
TRANSFORMERS = {
    "vit": r"vit_[a-z]+_patch\d+_\d+", "deit": r"deit_[a-z]+_distilled_patch\d+_\d+",
    "dinov2": r"vit_[a-z]+_patch\d+_dinov2",
    "dinov2_with_registers": r"vit_[a-z]+_patch\d+_reg4_dinov2",
    "dinov3_vit": r"vit_[a-z]+(_plus)?_patch\d+_dinov3",
    "clip_vision_model": r"vit_[a-z]+_patch\d+_clip_\d+",
    "siglip_vision_model": r"vit_[a-z0-9]+_patch\d+_siglip_\d+",
    "pvt": r"pvt_[a-z]+", "pvt_v2": r"pvt_v2_b\d",
}
FIELDS = {   # transformers' names of sizes, and ours
    "image_size": "image_size", "patch_size": "patch_size", "hidden_size": "width",
    "num_hidden_layers": "depth", "num_attention_heads": "heads", "num_channels": "in_chans",
}
STAGES = {"image_size": "image_size", "hidden_sizes": "widths", "depths": "depths",
          "num_attention_heads": "heads", "mlp_ratios": "mlp_ratios", "sr_ratios": "sr_ratios",
          "sequence_reduction_ratios": "sr_ratios", "num_channels": "in_chans"}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}   # Pillow's numbers


class Described(NamedTuple):
  """A model as a config.json describes it: its name, with a tag where that is known; fields for
  `create_model`; names of the classes; and what is told of {mean, std, crop, interpolation}."""
  name: str
  fields: dict[str, Any]
  classes: list[str] | None = None
  images: Mapping[str, Any] = {}


def read(where: str, config: Mapping, processor: Mapping | None = None) -> Described:
  """The model of a config.json; ValueError, one line, where it is none of ours.

  where: what the file is of, for errors. processor: transformers' preprocessor_config.json.
  """
  try:
    if "architecture" in config:
      return _of_timm(where, config)
    if "model_type" in config:
      return _of_transformers(where, config, processor or {})
  except (TypeError, AttributeError, KeyError, IndexError) as error:
    raise ValueError(f"{where}: its {CONFIG} cannot be read ({error!r}); name the model "
                     "with model=NAME") from None
  raise ValueError(f"{where}: its {CONFIG} names no model: neither timm's architecture nor "
                   "transformers' model_type; name it with model=NAME")


def _of_timm(where: str, config: Mapping) -> Described:
  about = config.get("pretrained_cfg", config)   # beside the rest before timm 0.9
  name, _, tag = config["architecture"].partition(".")
  tag = tag or about.get("tag") or ""
  if tag in tags.table().get(name, ()):
    name = f"{name}.{tag}"
  fields = {}
  if "num_classes" in config:
    fields["num_classes"] = config["num_classes"]
  if size := about.get("input_size"):
    fields |= {"in_chans": size[0], "image_size": _size(size[1:])}
  unknown = []
  for key, value in (config.get("model_args") or {}).items():
    if key in TIMM:
      fields[TIMM[key]] = _size(value) if key == "img_size" else value
    elif value is not None:
      unknown.append(f"{key}={value!r}")
  if unknown:
    raise ValueError(f"{where}: {CONFIG} has model_args that {name} here has no field for: "
                     f"{', '.join(unknown)}")
  images = {ours: about[key] for key, ours in
            (("mean", "mean"), ("std", "std"), ("interpolation", "interpolation"),
             ("crop_pct", "crop"), ("crop_mode", "crop_mode")) if about.get(key) is not None}
  names = config.get("label_names") or about.get("label_names") or config.get("labels")
  return Described(name, fields, _classes(names, fields.get("num_classes")), images)


def _of_transformers(where: str, config: Mapping, processor: Mapping) -> Described:
  kind = config["model_type"]
  vision = config.get("vision_config")
  if kind in ("clip", "siglip") and vision is not None:   # the whole model: its images' half
    kind, config = f"{kind}_vision_model", {**vision, "architectures": None}
  if kind not in TRANSFORMERS:
    raise ValueError(f"{where} is a {kind!r} of transformers; read are: {', '.join(TRANSFORMERS)}")
  pattern, sizes = TRANSFORMERS[kind], STAGES if kind in ("pvt", "pvt_v2") else FIELDS
  if config.get("hidden_act") == "quick_gelu" and kind == "clip_vision_model":
    pattern = pattern.replace("_clip_", "_clip_quickgelu_")
  known = [name for name in list_models() if re.fullmatch(pattern, name)]
  if not known:
    raise ValueError(f"{where} is a {kind!r} of transformers, a model that is not here; "
                     f"list_models() lists those that are")
  fields = {ours: config[key] for key, ours in sizes.items() if config.get(key) is not None}
  fields = {key: tuple(value) if isinstance(value, list) else value
            for key, value in fields.items()}
  if isinstance(size := fields.get("image_size"), Mapping):
    fields["image_size"] = size["height"], size["width"]
  if isinstance(fields.get("image_size"), tuple):
    fields["image_size"] = _size(fields["image_size"])
  if "intermediate_size" in config and "width" in fields:
    fields["mlp_ratio"] = config["intermediate_size"] / fields["width"]
  elif "mlp_ratio" in config and sizes is FIELDS:
    fields["mlp_ratio"] = config["mlp_ratio"]
  name = max(known, key=lambda name: _alike(name, fields))
  model = create_model(name)
  fields = {key: value for key, value in fields.items() if getattr(model, key, None) != value}
  labels, fields["num_classes"] = None, 0
  if any("ForImageClassification" in text for text in config.get("architectures") or ()):
    labels = config.get("id2label")
    fields["num_classes"] = len(labels) if labels else config.get("num_labels", 2)
    if labels and all(re.fullmatch(r"LABEL_\d+", text) for text in labels.values()):
      labels = None   # transformers' own, of a model that was given none
  return Described(name, fields, _classes(labels, fields["num_classes"]), _images(processor))


def _alike(name: str, fields: Mapping) -> tuple[int, int]:
  """How many of these fields a named model has, image size last: positions can be resized."""
  model = create_model(name)
  equal = [key for key, value in fields.items() if getattr(model, key, None) == value]
  return len(set(equal) - {"image_size"}), len(equal)


def _images(processor: Mapping) -> dict[str, Any]:
  """Of transformers' preprocessor_config.json: what it tells."""
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
    elif "height" in size:   # resized to both sides, whatever the aspect ratio
      images["crop"] = None
  return images


def _size(sides) -> int | tuple[int, int]:
  height, width = np.broadcast_to(sides, 2).tolist()
  return height if height == width else (height, width)


def _classes(names: Sequence[str] | Mapping | None, count: int | None) -> list[str] | None:
  """Names in the order of the logits, where each logit has one."""
  if isinstance(names, Mapping):
    names = [names[key] for key in sorted(names, key=int)]
  return list(names) if names and len(names) == count else None


def settings(prepare: Preprocess) -> dict[str, Any]:
  """How images are prepared, whatever their size: mean, std, crop, interpolation, ..."""
  return {key: value for key, value in dataclasses.asdict(prepare).items() if key != "image_size"}


def prepared(model: nn.Module, told: Mapping[str, Any]) -> Preprocess:
  """As `preprocess(model)`, but for what is told."""
  own = preprocess(model)
  try:
    values = {**settings(own), **told}
    if not hasattr(own, "crop_mode") and values.pop("crop_mode", "") == "squash":
      values["crop"] = None   # all of the image
    for key in ("mean", "std"):
      numbers = tuple(map(float, values[key]))
      if len(numbers) != model.in_chans:   # of RGB, as in `preprocess`
        numbers = (sum(numbers) / len(numbers),) * model.in_chans
      values[key] = numbers
    return dataclasses.replace(own, **values)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise ValueError(f"{CONFIG} tells no preparation of images that is known ({error}): "
                     f"{dict(told)}") from None


def write(model: nn.Module, preprocess: Preprocess, classes: Sequence[str] | None,
          source: str = "") -> str:
  """config.json of a folder that `push` writes: timm's keys, and ours under "vitcompact"."""
  name, _, tag = model.variant.partition(".")
  height, width = preprocess.image_size
  about = {"mean": preprocess.mean, "std": preprocess.std,
           "crop_pct": 1.0 if preprocess.crop is None else preprocess.crop,
           "crop_mode": "squash" if preprocess.crop is None else getattr(
               preprocess, "crop_mode", "center"),
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
  """The object in a JSON file; ValueError, one line, where there is none."""
  try:
    config = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is no JSON: {error}") from None
  if not isinstance(config, Mapping):
    raise ValueError(f"{path} holds a {type(config).__name__}, wanted: an object")
  return config
