"""Times every method at its default, deployed, and finds out which methods combine."""
import dataclasses
import itertools
import warnings
from collections.abc import Iterator

import vitcompact as vc
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Setting

# A method is timed in the first of these models in which it is valid, and methods for hierarchical
# models in the last.
HOSTS = ("deit_small_patch16_224", "pvt_v2_b2")
HIERARCHICAL = ("FastPath",)
# (pixels, batch)
HOST_SHAPES, DEVICE_SHAPES = ((224, 4), (512, 1)), ((224, 256), (512, 64), (1024, 16))
# One model of each kind, for the table of valid combinations.
FAMILIES = ("deit_small_patch16_224", "vit_base_patch16_siglip_224", "lvvit_s", "pvt_small",
            "pvt_v2_b2", "nextvit_small", "davit_tiny", "shvit_s1", "biformer_tiny",
            "transnext_micro", "inline_deit_tiny")
# Settings that differ from the default: {name of the method's class: its settings}.
SETTINGS = {"BiFormer": {"min_tokens": 0}, "KeyMerging": {"min_tokens": 0},
            "FastPath": {"blocks": (8, 9, 10)}, "ToMe": {"r": 13}, "MCTF": {"r": 16}}
# How a method starts from a dense model's weights. "exactly": the same function at the settings
# named; "fitted": from calibration images; "no": it has to be trained.
STARTS = {
    "HMHSA": "fitted", "HeadPruning": "fitted",
    "MoH": "exactly with active=1.0, else approximately",
    "Sparsifiner": "exactly with keep=1, else fitted", "BiFormer": "exactly with all regions",
    "KeyMerging": "exactly with keep=1, else approximately",
    "InLine": "same shapes, another function", "ChannelAttention": "same shapes, another function",
    "EViT": "exactly with keep=1, else approximately",
    "DynamicViT": "exactly with keep=1, else to be trained",
    "ToMe": "exactly with r=0, else approximately", "MCTF": "exactly with r=0, else approximately",
    "FastPath": "exactly with keep=1, else to be trained",
    "CFFN": "fitted", "GLU": "no", "ConvGLU": "no"}


def default(kind: type, model: str):
  """Returns a method with the settings that the tables use, for a model of this name."""
  method = kind(**SETTINGS.get(kind.__name__, {}))
  if kind.axis == "tokens" and hasattr(method, "blocks") and method.blocks is not None:
    depth = len(vc.create_model(model).sites())
    blocks = tuple(block for block in method.blocks if block < depth)
    method = dataclasses.replace(method, blocks=blocks or (depth - 2,))
  return method


def refusal(model: str, **axes) -> str:
  """Returns why a model cannot have a plan of these methods, or "" if it can."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      planned = vc.create_model(model, plan=vc.Plan(**axes))
  except ValueError as error:
    return str(error)
  plan, sites = planned.plan, planned.sites()
  for axis, method in axes.items():
    acting = [getattr(plan.at(site), axis) for site in sites]
    if axis != "tokens" and method not in acting:
      return "no block of the model has room for it"
  return ""


def kinds() -> Iterator[type]:
  """Yields every method of the library, axis by axis."""
  for listed in vc.METHODS.values():
    yield from (kind for kind in listed.values() if kind.__module__.startswith("vitcompact."))


def host(kind: type) -> str:
  hosts = HOSTS[::-1] if kind.__name__ in HIERARCHICAL else HOSTS
  return next(model for model in hosts
              if not refusal(model, **{kind.axis: default(kind, model)}))


def legal() -> tuple[list[dict], list[dict]]:
  """Returns the rows of two tables, (methods by model, methods by methods of another axis), each
  with the reason of a refusal or ""."""
  by_family = [{"method": kind.__name__, "model": model,
                "refused": refusal(model, **{kind.axis: default(kind, model)})}
               for kind in kinds() for model in FAMILIES]
  pairs = []
  for one, other in itertools.combinations(kinds(), 2):
    if one.axis == other.axis:
      continue
    reasons = [refusal(model, **{one.axis: default(one, model), other.axis: default(other, model)})
               for model in HOSTS]
    # Prefer the reason of a model in which each of the two is valid without the other.
    each_valid = [not any(refusal(model, **{kind.axis: default(kind, model)})
                          for kind in (one, other)) for model in HOSTS]
    preferred = [reason for reason, valid in zip(reasons, each_valid, strict=True) if valid]
    pairs.append({"methods": [one.__name__, other.__name__],
                  "refused": "" if "" in preferred else (preferred or reasons)[0]})
  return by_family, pairs


def run(setting: Setting, shapes=None, **sizes) -> Iterator[dict]:
  """Times every method. sizes: fields of the models that make them smaller, for tests."""
  by_host = {model: [kind for kind in kinds() if host(kind) == model] for model in HOSTS}
  for (pixels, batch), model in itertools.product(
      shapes or (HOST_SHAPES if setting.on_host else DEVICE_SHAPES), HOSTS):
    candidates = {}
    plans = {"dense": vc.Plan()} | {kind.__name__: vc.Plan(**{kind.axis: default(kind, model)})
                                    for kind in by_host[model]}
    for name, plan in plans.items():
      deployed = vc.create_model(model, plan=plan, image_size=pixels, deploy=True,
                                 dtype=setting.dtype, **sizes)
      images = measure.normal((batch, pixels, pixels, 3), setting.dtype)
      variables = measure.random_variables(deployed, images[:1], setting.dtype)
      count = vc.count(deployed)
      candidates[name] = measure.compiled(
          deployed.apply, variables, images, plan=plan.to_json(), macs=count.macs,
          ideal_macs=count.ideal_macs, params=count.params)
    yield from measure.rows({"model": model, "image_size": pixels, "batch": batch}, candidates,
                            setting)
