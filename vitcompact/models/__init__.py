"""Named models: `create_model`, `list_models`."""
import dataclasses
import difflib
import fnmatch
from typing import Any

import flax.linen as nn

from vitcompact.execution import Execution
from vitcompact.models import (
  biformer,
  davit,
  inline_variants,
  lvvit,
  nextvit,
  pvt,
  pvt_v2,
  shvit,
  tags,
  transnext,
  vit_variants,
)
from vitcompact.models.variant import Variant
from vitcompact.plan import Plan

DTYPES = ("float32", "bfloat16")
FAMILIES = (vit_variants, lvvit, nextvit, pvt, pvt_v2, davit, shvit, biformer, transnext,
            inline_variants)
VARIANTS: dict[str, Variant] = {name: row for family in FAMILIES
                                for name, row in family.VARIANTS.items()}


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
  """Lists names of models that match a shell pattern such as "deit_*", in alphabetical order.

  pretrained: lists names with tags, such as "deit_small_patch16_224.fb_in1k", one for each set of
    weights that `pretrained` can get; the pattern may match the name with or without its tag.
  """
  if not pretrained:
    return sorted(fnmatch.filter(VARIANTS, pattern))
  return [f"{name}.{tag}" for name in sorted(VARIANTS) for tag in tags.table().get(name, ())
          if any(fnmatch.fnmatch(text, pattern) for text in (name, f"{name}.{tag}"))]


def variant_of(name: str) -> Variant:
  """Returns the variant of this name, with a tag that of its weights; an unknown name or tag raises
  a ValueError that suggests the closest ones."""
  if not isinstance(name, str):
    raise ValueError(f"{name!r} is not the name of a model; list_models() lists them")
  model, _, tag = name.partition(".")
  if model not in VARIANTS:
    close = difflib.get_close_matches(model, VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else "list_models() lists the known ones"
    raise ValueError(f"unknown model {name!r}; {hint}")
  if name == model:
    return VARIANTS[name]
  return tags.with_tag(VARIANTS[model], tags.row_of(model, tag)[1])


def check_value(field: str, kind, value):
  """Raises ValueError if the value does not suit the field's type; the model's `check` looks at
  combinations of values.

  kind: the field's annotation.
  """
  def is_whole(number):
    return isinstance(number, int) and not isinstance(number, bool) and number >= least

  least = 0 if field in ("num_classes", "depth", "depths", "periods", "reg_tokens") else 1
  if field == "dtype":
    fits, rule = value in DTYPES, f"one of {DTYPES}"
  elif field == "drop_path_rate":
    fits, rule = isinstance(value, (int, float)) and 0 <= value < 1, "at least 0 and below 1"
  elif kind in (bool, bool | None):
    fits = isinstance(value, bool) or (value is None and kind is not bool)
    rule = "True or False"
  elif kind in (float, float | None):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits, rule = number or (value is None and kind is not float), "a number"
  elif kind is str:
    fits, rule = isinstance(value, str), "a string"
  elif kind is Plan:
    fits, rule = isinstance(value, Plan), "a Plan; Plan.parse reads one"
  elif kind is Execution:
    fits, rule = isinstance(value, Execution), "an Execution, which tune returns in a model"
  elif kind is int:
    fits, rule = is_whole(value), f"a whole number of at least {least}"
  elif kind == int | tuple[int, int]:
    pair = isinstance(value, tuple) and len(value) == 2
    fits = all(map(is_whole, value)) if pair else is_whole(value)
    rule = "a whole number of at least 1, or a pair of them"
  elif kind == tuple[int, ...]:
    fits = isinstance(value, tuple) and all(map(is_whole, value))
    rule = f"whole numbers of at least {least}, one for each stage"
  else:
    return
  if not fits:
    raise ValueError(f"{field}={value!r}: must be {rule}")


def fields_of(model: nn.Module) -> dict[str, Any]:
  """Returns the fields that, with the name, make `create_model` build the same model again."""
  return {field.name: getattr(model, field.name) for field in dataclasses.fields(model)
          if field.name not in ("parent", "name", "variant")}


def create_model(name: str, **fields) -> nn.Module:
  """Creates the Linen module of a named model, with some fields overridden. `pretrained` also loads
  weights.

  Args:
    name: as in `list_models()`; timm's name if timm has the model. If methods are part of the named
      model, they are added to the plan, unless it has others on their axis. With a tag, as in
      `list_models(pretrained=True)`, classes, image size and preprocessing are its weights'.
    fields: plan, execution, num_classes (0: features), image_size (int or pair), in_chans,
      global_pool, drop_path_rate, dtype ("float32", "bfloat16": of the computation; parameters are
      float32), remat, deploy (the deployed form), and sizes (width, depth, heads, mlp_ratio,
      patch_size, ...).
  """
  variant = variant_of(name)
  known = {field.name: field.type for field in dataclasses.fields(variant.kind)
           if field.name not in ("parent", "name", "variant")}
  for field in fields:
    if field not in known:
      close = difflib.get_close_matches(field, known, n=1)
      hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
      raise ValueError(f"{name} has no option {field!r}; {hint}")
  # Lists, which come from JSON, would make the module unhashable.
  fields = {key: tuple(value) if isinstance(value, list) else value
            for key, value in fields.items()}
  for field, value in fields.items():
    check_value(field, known[field], value)
  if variant.plan:
    named_plan, plan = Plan.from_dict(variant.plan), fields.get("plan", Plan())
    absent = {axis: method for axis in variant.plan if getattr(plan, axis) is None
              and (method := getattr(named_plan, axis))}
    fields["plan"] = dataclasses.replace(plan, **absent)
  model = variant.kind(variant=name, **{**variant.sizes, **fields})
  model.check()
  return model
