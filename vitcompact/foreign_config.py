"""Reads the model and its classes from the config.json that timm or transformers wrote."""
import fnmatch
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vitcompact.models import VARIANTS, create_model, fields_of

# {timm's or transformers' key: our field}
TIMM = {"img_size": "image_size", "embed_dim": "width", "depth": "depth", "num_heads": "heads",
        "patch_size": "patch_size", "mlp_ratio": "mlp_ratio", "in_chans": "in_chans",
        "global_pool": "global_pool", "num_classes": "num_classes"}
ISOTROPIC = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads",
             "image_size": "image_size", "patch_size": "patch_size", "num_channels": "in_chans",
             "mlp_ratio": "mlp_ratio", "layer_norm_eps": "epsilon", "qkv_bias": "qkv_bias",
             "query_bias": "qkv_bias", "num_register_tokens": "reg_tokens", "act": "act"}
PYRAMID = {"depths": "depths", "hidden_sizes": "widths", "num_attention_heads": "heads",
           "mlp_ratios": "mlp_ratios", "image_size": "image_size", "num_channels": "in_chans",
           "sequence_reduction_ratios": "sr_ratios", "sr_ratios": "sr_ratios",
           "linear_attention": "linear"}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "image_size": 224, "patch_size": 16, "num_channels": 3}
_PYRAMID = {"depths": [2, 2, 2, 2], "image_size": 224, "num_channels": 3}


# {transformers' activation: our name}
ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class Family(NamedTuple):
  """models: pattern of our model names; defaults: transformers' defaults for absent keys; words:
  {transformers' key: our field} of sizes; classifies: whether its classifier is our model's."""
  models: str
  defaults: Mapping[str, Any]
  words: Mapping[str, str] = ISOTROPIC
  classifies: bool = True


_DINOV2 = {**_BASE, "patch_size": 14, "mlp_ratio": 4}
_DINOV3 = {**_BASE, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536,
           "query_bias": True}
_CLIP = {**_BASE, "patch_size": 32, "hidden_act": "quick_gelu"}
_SIGLIP = {**_BASE, "hidden_act": "gelu_pytorch_tanh"}
FAMILIES = {
    "vit": Family(r"vit_[a-z]+_patch\d+_\d+", _BASE),
    "vit_mae": Family(r"vit_[a-z]+_patch\d+_\d+", _BASE),
    "deit": Family(r"deit_[a-z]+_distilled_patch\d+_\d+", _BASE),
    "dinov2": Family(r"vit_[a-z]+_patch14_dinov2", _DINOV2, classifies=False),
    "dinov2_with_registers": Family(r"vit_[a-z]+_patch14_reg4_dinov2", _DINOV2, classifies=False),
    "dinov3_vit": Family(r"vit_\w+_patch16_dinov3", _DINOV3, classifies=False),
    "clip_vision_model": Family(r"vit_[a-z]+_patch\d+_clip_\w+", _CLIP, classifies=False),
    "siglip_vision_model": Family(r"vit_\w+_patch\d+_siglip_\d+", _SIGLIP, classifies=False),
    "pvt": Family(r"pvt_[a-z]+", _PYRAMID, PYRAMID),
    "pvt_v2": Family(r"pvt_v2_b\d(_li)?", _PYRAMID, PYRAMID),
}


class ModelSpec(NamedTuple):
  """model, fields: arguments of `create_model`; classes: names in the order of the logits."""
  model: str
  fields: dict[str, Any]
  classes: list[str] | None = None

  def line(self) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in self.fields.items())
    return f"config.json: {self.model}{', ' * bool(fields)}{fields}"


def spec_next_to(path) -> ModelSpec:
  """The model in the config.json in a file's directory; ValueError if it does not name one."""
  hint = f"give the model, as in --model deit_small_patch16_224; known: {', '.join(VARIANTS)}"
  file = pathlib.Path(path).parent / "config.json"
  if not file.is_file():
    raise ValueError(f"--model is missing, and there is no config.json next to {path}: {hint}")
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
    return model_spec(config)
  except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError,
          RecursionError) as error:
    raise ValueError(f"{file} does not describe a known model: {str(error)[:300]}; {hint}"
                     ) from None


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
  """The model in a config.json of timm or transformers; ValueError if it does not name one."""
  if "architecture" in config:
    return _describe_timm(config)
  if "model_type" in config:
    return _describe_transformers(config)
  raise ValueError("it has neither timm's architecture nor transformers' model_type")


def _describe_timm(config):
  name = config["architecture"]
  model = create_model(name)
  known, fields = fields_of(model), {}
  cfg = config.get("pretrained_cfg", {})
  args = {**({"img_size": cfg["input_size"][1:]} if "input_size" in cfg else {}),
          **{key: config[key] for key in ("num_classes", "global_pool") if key in config},
          **config.get("model_args", {})}
  for key, value in args.items():
    if key not in TIMM or TIMM[key] not in known:
      if key == "global_pool":   # the model has only one kind
        continue
      raise ValueError(f"its model_args have {key}={value!r}, which is not an option of {name}")
    fields[TIMM[key]] = _plain(TIMM[key], value)
  fields = {key: value for key, value in fields.items() if value != known[key]}
  names = config.get("label_names") or cfg.get("label_names") or config.get("labels")
  return ModelSpec(name, fields, _names(names))


def _describe_transformers(config):
  kind, architectures = config["model_type"], config.get("architectures") or [""]
  projection = 0
  if "vision_config" in config:
    has_projection = kind == "clip" and architectures[0] in ("", "CLIPModel")
    projection = config.get("projection_dim", 512) if has_projection else 0
    config, kind = {**config["vision_config"]}, f"{kind}_vision_model"
  elif architectures[0] == "CLIPVisionModelWithProjection":
    projection = config.get("projection_dim", 512)
  if kind not in FAMILIES:
    raise ValueError(f"no model here is of model_type {kind!r}")
  family = FAMILIES[kind]
  sizes = {**_BASE, **family.defaults, **config}
  sizes |= _ffn(sizes)
  name, fields = _nearest(family, {ours: _plain(ours, sizes[theirs])
                                   for theirs, ours in family.words.items() if theirs in sizes})
  classes = config.get("id2label") or {}
  has_classifier = family.classifies and "ForImageClassification" in architectures[0]
  count = (len(classes) or config.get("num_labels", 2)) if has_classifier else projection
  if count != fields_of(create_model(name))["num_classes"]:
    fields["num_classes"] = count
  return ModelSpec(name, fields, _names(classes) if has_classifier else None)


def _ffn(sizes) -> dict[str, Any]:
  """The fields for the FFN's activation and width, under our names."""
  act, width = sizes.get("hidden_act", "gelu"), sizes.get("hidden_size")
  if sizes.get("use_swiglu_ffn"):   # DINOv2: two thirds of the width, in multiples of 8
    hidden = -(-int(int(width * sizes["mlp_ratio"]) * 2 / 3) // 8) * 8
    return {"act": "swiglu", "mlp_ratio": hidden / width}
  if sizes.get("use_gated_mlp") and act == "silu":
    return {"act": "swiglu", "mlp_ratio": sizes["intermediate_size"] / width}
  if act not in ACTS or sizes.get("use_gated_mlp"):
    raise ValueError(f"its hidden_act is {act!r}, which no model here of model_type "
                     f"{sizes['model_type']!r} has")
  own = {} if "mlp_ratio" in sizes else {"mlp_ratio": sizes["intermediate_size"] / width}
  return {"act": ACTS[act], **own}


def _nearest(family, sizes):
  """(the named model that differs in the fewest sizes, {field: value} that differ)."""
  found = {}
  for name in VARIANTS:
    if re.fullmatch(family.models, name):
      known = fields_of(create_model(name))
      found[name] = {key: value for key, value in sizes.items()
                     if key in known and not _values_equal(known[key], value)}
  if not found:
    raise ValueError(f"no model here is called {family.models}")
  name = min(found, key=lambda name: len(found[name]))
  create_model(name, **found[name])
  return name, found[name]


def _values_equal(a, b) -> bool:
  """Whether two values are equal; floats to a tolerance, as configs round ratios to five digits."""
  numbers = isinstance(a, float) and isinstance(b, (int, float))
  return bool(np.isclose(a, b, rtol=1e-4, atol=0) if numbers else np.array_equal(a, b))


def _plain(field, value):
  """A config's value in our form: lists as tuples, and a square image or patch as its side."""
  if field == "image_size" and isinstance(value, Mapping):   # PVT v2's
    value = [value["height"], value["width"]]
  if field in ("image_size", "patch_size") and isinstance(value, list) and len({*value}) == 1:
    return value[0]
  return tuple(value) if isinstance(value, list) else value


def _names(labels):
  """Class names from a list or from {number: name}; None for placeholders such as LABEL_0."""
  if isinstance(labels, Mapping):
    labels = [labels[key] for key in sorted(labels, key=int)]
  if not labels or not all(isinstance(label, str) for label in labels):
    return None
  return None if fnmatch.filter(labels, "LABEL_[0-9]*") else list(labels)
