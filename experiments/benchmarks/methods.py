"""Every method at its default, in a model that has room for it, deployed; and which go together."""
import dataclasses
import itertools
import warnings
from collections.abc import Iterator

import vitcompact as vc
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Setting

# Of the first of these models in which a method is legal, but for those made for hierarchical ones.
HOSTS = ("deit_small_patch16_224", "pvt_v2_b2")
HIERARCHICAL = ("FastPath",)
# (pixels, batch)
HOST_SHAPES, DEVICE_SHAPES = ((224, 4), (512, 1)), ((224, 256), (512, 64), (1024, 16))
# One model of each kind, for what is legal where.
FAMILIES = ("deit_small_patch16_224", "vit_base_patch16_siglip_224", "lvvit_s", "pvt_small",
            "pvt_v2_b2", "nextvit_small", "davit_tiny", "shvit_s1", "biformer_tiny",
            "transnext_micro", "inline_deit_tiny")
# What is not at its default: {name of the method's class: its settings}; DeiT-S, other models.
SETTINGS = {"BiFormer": {"min_tokens": 0}, "KeyMerging": {"min_tokens": 0},
            "FastPath": {"blocks": (8, 9, 10)}, "ToMe": {"r": 13}, "MCTF": {"r": 16}}
# What a dense model's weights are to it: "exactly", the same function at the settings said; fitted,
# from calibration images; "no", train it.
STARTS = {
    "HMHSA": "fitted", "HeadPruning": "fitted", "MoH": "exactly with active=1.0, else nearly",
    "Sparsifiner": "exactly with keep=1, else fitted", "BiFormer": "exactly with all regions",
    "KeyMerging": "exactly with keep=1, else nearly", "InLine": "shapes, not the function",
    "ChannelAttention": "shapes, not the function", "EViT": "exactly with keep=1, else nearly",
    "DynamicViT": "exactly with keep=1, else train", "ToMe": "exactly with r=0, else nearly",
    "MCTF": "exactly with r=0, else nearly", "FastPath": "exactly with keep=1, else train",
    "CFFN": "fitted", "GLU": "no", "ConvGLU": "no"}


def default(kind: type, model: str):
  """A method as the tables have it, in a model of this name."""
  method = kind(**SETTINGS.get(kind.__name__, {}))
  if kind.axis == "tokens" and hasattr(method, "blocks") and method.blocks is not None:
    depth = len(vc.create_model(model).sites())
    third = tuple(block for block in method.blocks if block < depth)
    method = dataclasses.replace(method, blocks=third or (depth - 2,))
  return method


def refusal(model: str, **axes) -> str:
  """Why a model cannot have a plan of these methods; empty: it can."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      made = vc.create_model(model, plan=vc.Plan(**axes))
  except ValueError as error:
    return str(error)
  plan, sites = made.plan, made.sites()
  for axis, method in axes.items():
    acting = [getattr(plan.at(site), axis) for site in sites]
    if axis != "tokens" and method not in acting:
      return "no block of the model has room for it"
  return ""


def kinds() -> Iterator[type]:
  """Every method of the library, by axis."""
  for listed in vc.METHODS.values():
    yield from (kind for kind in listed.values() if kind.__module__.startswith("vitcompact."))


def host(kind: type) -> str:
  hosts = HOSTS[::-1] if kind.__name__ in HIERARCHICAL else HOSTS
  return next(model for model in hosts
              if not refusal(model, **{kind.axis: default(kind, model)}))


def legal() -> tuple[list[dict], list[dict]]:
  """(method and family, method and method of another axis), each with the reason why not."""
  by_family = [{"method": kind.__name__, "model": model,
                "refused": refusal(model, **{kind.axis: default(kind, model)})}
               for kind in kinds() for model in FAMILIES]
  pairs = []
  for one, other in itertools.combinations(kinds(), 2):
    if one.axis == other.axis:
      continue
    why = [refusal(model, **{one.axis: default(one, model), other.axis: default(other, model)})
           for model in HOSTS]
    # Of the model in which each of the two is legal by itself.
    alone = [not any(refusal(model, **{kind.axis: default(kind, model)}) for kind in (one, other))
             for model in HOSTS]
    known = [reason for reason, both in zip(why, alone, strict=True) if both]
    pairs.append({"methods": [one.__name__, other.__name__],
                  "refused": "" if "" in known else (known or why)[0]})
  return by_family, pairs


def run(setting: Setting, shapes=None, **sizes) -> Iterator[dict]:
  """sizes: fields of the models that make them smaller, for tests."""
  by_host = {model: [kind for kind in kinds() if host(kind) == model] for model in HOSTS}
  for (pixels, batch), model in itertools.product(
      shapes or (HOST_SHAPES if setting.on_host else DEVICE_SHAPES), HOSTS):
    candidates = {}
    plans = {"dense": vc.Plan()} | {kind.__name__: vc.Plan(**{kind.axis: default(kind, model)})
                                    for kind in by_host[model]}
    for name, plan in plans.items():
      made = vc.create_model(model, plan=plan, image_size=pixels, deploy=True, dtype=setting.dtype,
                             **sizes)
      images = measure.normal((batch, pixels, pixels, 3), setting.dtype)
      variables = measure.drawn_variables(made, images[:1], setting.dtype)
      counted = vc.count(made)
      candidates[name] = measure.compiled(
          made.apply, variables, images, plan=plan.to_json(), macs=counted.macs,
          ideal_macs=counted.ideal_macs, params=counted.params)
    yield from measure.rows({"model": model, "image_size": pixels, "batch": batch}, candidates,
                            setting)
