"""Model cards for `push` and `vitcompact card`: what a model is, what it costs, and its source."""
import fnmatch
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from vitcompact import convert, trees
from vitcompact._version import __version__
from vitcompact.count import count
from vitcompact.data.classes import describe
from vitcompact.execution import Execution
from vitcompact.hub import config
from vitcompact.models import create_model, fields_of, tags, variant_of
from vitcompact.models.backbone import Backbone
from vitcompact.plan import Plan, describe_method, with_inner
from vitcompact.preprocess import Preprocess, preprocess
from vitcompact.receipt import Receipt, provenance

RECEIPT = "receipt.json"

# {pattern of model names: the network and its paper}; the first match counts.
NETWORKS = {
    "inline_*": "InLine (Han et al., arXiv 2412.06590), a network of linear attention",
    "deit3_*": "DeiT III (Touvron et al., arXiv 2204.07118)",
    "deit_*": "DeiT (Touvron et al., arXiv 2012.12877)",
    "vit_*_clip_*": "the image tower of CLIP (Radford et al., arXiv 2103.00020)",
    "vit_*_siglip_*": "the image tower of SigLIP (Zhai et al., arXiv 2303.15343)",
    "vit_*_reg4_dinov2": "DINOv2 (Oquab et al., arXiv 2304.07193) with registers (Darcet et al., "
                         "arXiv 2309.16588)",
    "vit_*_dinov2": "DINOv2 (Oquab et al., arXiv 2304.07193)",
    "vit_*_dinov3": "DINOv3 (Siméoni et al., arXiv 2508.10104)",
    "vit_*": "ViT (Dosovitskiy et al., arXiv 2010.11929)",
    "eva02_*": "EVA-02 (Fang et al., arXiv 2303.11331)",
    "lvvit_*": "LV-ViT (Jiang et al., arXiv 2104.10858)",
    "pvt_v2_*": "PVT v2 (Wang et al., arXiv 2106.13797)",
    "pvt_*": "PVT (Wang et al., arXiv 2102.12122)",
    "nextvit_*": "Next-ViT (Li et al., arXiv 2207.05501)",
    "davit_*": "DaViT (Ding et al., arXiv 2204.03645)",
    "shvit_*": "SHViT (Yun and Ro, arXiv 2401.16456)",
    "biformer_*": "BiFormer (Zhu et al., arXiv 2303.08810)",
    "transnext_*": "TransNeXt (Shi, arXiv 2311.17132)",
}


class Accuracy(NamedTuple):
  """A receipt's row for a model, and the receipt's file name."""
  row: Mapping[str, Any]
  where: str
  data: str = ""
  remark: str = ""


class Weights(NamedTuple):
  """What a card says about a file of weights. place: the name to give `pretrained`."""
  place: str
  variables: Mapping[str, Any]
  file_digest: str = ""
  source: str = ""


def page(title: str, model: nn.Module, prepare: Preprocess, *, weights: Weights | None = None,
         classes: Sequence[str] | None = None, accuracy: Accuracy | None = None,
         note: str = "") -> str:
  """A card in Markdown. weights: None for a named model without a file of its own."""
  published = Plan.from_dict(variant_of(model.variant).plan)
  changed = model.plan != published
  counts = {"this model": count(model)}
  if changed:
    counts["without the plan" if published != Plan() else "the dense one"] = count(
        model.clone(plan=published, execution=Execution()))
  form = "deployed (folded)" if model.deploy else "training"
  task = "image-classification" if model.num_classes else "image-feature-extraction"
  lines = ["---", "library_name: vitcompact", "tags:", f"- {task}", "- vitcompact",
           "---", f"# {title}", "", f"`{model.variant}` in the {form} form, "
           + ("with this plan:" if changed else
              "dense." if published == Plan() else "as published."), ""]
  if changed:
    lines += ["```json", json.dumps(json.loads(model.plan.to_json()), indent=1), "```", ""]
  lines += [*([note, ""] if note else []),
            "| | parameters | multiply-accumulates per image, executed | needed |",
            "|---|---:|---:|---:|",
            *(f"| {what} | {found.params:,} | {found.macs:,} | {found.ideal_macs:,} |"
              for what, found in counts.items()), "",
            "## What it is", "", *_provenance(model, weights), "",
            "## Accuracy", "", _accuracy(accuracy), "",
            "## Images and classes", "", _images(prepare) + " " + _classes(model, classes), "",
            "## Use", "", "```python", *_usage_lines(model, weights), "```", ""]
  if weights:
    lines += [f"Or: `vitcompact predict {weights.place} photo.jpg`", ""]
  lines += ["## Limits", "", *_limit_lines(model, counts["this model"], changed, weights), ""]
  if weights:
    lines += ([f"sha256 of the file: `{weights.file_digest}`  "] if weights.file_digest else [])
    lines += [f"sha256 of the parameters: `{trees.digest(weights.variables['params'])}`  "]
  return "\n".join([*lines, f"Written by vitcompact {__version__}.", ""])


def model_card(name: str, plan: Plan | None = None, *, receipt=None, note: str = "",
             **fields) -> str:
  """The card of a named model under a plan, in deployed form. fields: as in `create_model`."""
  model = create_model(name, **({} if plan is None else {"plan": plan}), deploy=True, **fields)
  return page(name, model, preprocess(model), note=note,
              accuracy=None if receipt is None else accuracy_in(receipt, model))


def file_card(path: str | os.PathLike, place: str = "", receipt=None) -> str:
  """The card of a file of ours. receipt: by default NAME.json or receipt.json in the same folder,
  if it is of this model."""
  path = pathlib.Path(path)
  model, variables = convert.load(path)
  accuracy = (_accuracy_next_to(path, model, variables) if receipt is None else
              accuracy_in(receipt, model, variables))
  weights = Weights(place or str(path), variables,
                    source=convert.read_metadata(path).get("source", ""))
  return page(path.stem, model, preprocess(path), weights=weights,
              classes=convert.classes_of(path), accuracy=accuracy)


def receipt_dict(receipt) -> dict:
  """A receipt as a dict, from a Receipt, a dict, or the path of its file or folder."""
  if isinstance(receipt, Receipt):
    return json.loads(receipt.to_json())
  if isinstance(receipt, str | os.PathLike):
    path = pathlib.Path(receipt)
    return dict(config.load(path / RECEIPT if path.is_dir() else path))
  return dict(receipt)


def accuracy_in(receipt, model, variables=None, where: str = "") -> Accuracy:
  """The receipt's row for this model, found by its parameters and multiply-accumulates."""
  about, found = receipt_dict(receipt), count(model)
  try:
    rows = [row for row in about["models"]
            if (row["params"], row["macs"]) == (found.params, found.macs)]
  except (KeyError, TypeError) as error:
    raise ValueError(f"the receipt cannot be read ({error!r}); give a receipt.json of a run"
                     ) from None
  if not rows:
    raise ValueError(f"the receipt has no model of {found.params:,} parameters and {found.macs:,} "
                     "multiply-accumulates, as this one has; give the receipt of the run that made "
                     "it")
  digests = {about[key] for key in ("params_digest", "deploy_digest") if key in about}
  remark = ""
  if variables is not None and digests and trees.digest(variables["params"]) not in digests:
    remark = ("The parameters that it was measured with have another digest than these, which may "
              "be rounded.")
  if not where:
    where = pathlib.Path(receipt).name if isinstance(receipt, str | os.PathLike) and not (
        os.path.isdir(receipt)) else RECEIPT
  return Accuracy(rows[-1], where, about.get("data", ""), remark)


def _accuracy_next_to(path: pathlib.Path, model, variables) -> Accuracy | None:
  for other in (path.with_suffix(".json"), path.with_name(RECEIPT)):
    try:
      return accuracy_in(other, model, variables, other.name)
    except (ValueError, OSError):     # it does not exist, or is of another model
      continue
  return None


def _accuracy(accuracy: Accuracy | None) -> str:
  row = accuracy.row if accuracy else {}
  if row.get("test_accuracy") is None:
    why = f"{accuracy.where} has none" if accuracy else "no receipt of this model was given"
    return f"Accuracy: not measured; {why}."
  low, high = row.get("accuracy_interval") or (None, None)
  between = "" if low is None else f" (95 % interval {100 * low:.2f} to {100 * high:.2f})"
  data = f" of {accuracy.data}" if accuracy.data else ""
  text = (f"Accuracy: {100 * row['test_accuracy']:.2f}% of {row['test_images']:,} test images{data}"
          f"{between}, from {accuracy.where}.")
  return f"{text} {accuracy.remark}".rstrip()


def _images(prepare: Preprocess) -> str:
  mean, std = (", ".join(f"{value:.4g}" for value in values)
               for values in (prepare.mean, prepare.std))
  crop = "warped" if prepare.crop is None else f"resized, and {prepare.crop:.4g} of it cropped"
  height, width = prepare.image_size
  return f"Images: {height} x {width}, {crop} ({prepare.interpolation}); mean {mean}, std {std}."


def _classes(model, classes) -> str:
  if classes:
    return describe(classes) + "."
  return (f"{model.num_classes} classes, without names." if model.num_classes else
          "No classifier: it gives features.")


def network_of(name: str) -> str:
  return next(paper for pattern, paper in NETWORKS.items() if fnmatch.fnmatch(name, pattern))


def _provenance(model, weights: Weights | None) -> list[str]:
  name, _, tag = model.variant.partition(".")
  lines = [f"* Network: {network_of(name)}, computed by this library's own code."]
  named = fields_of(create_model(model.variant))
  if other := [f"{key}={value!r}" for key, value in fields_of(model).items()
               if key not in ("plan", "deploy", *Backbone.free_fields) and value != named[key]]:
    lines += [f"* It differs from the named model: {', '.join(other)}."]
  if weights:
    lines += [f"* Weights: from {weights.source}; their licence is that of their source."
              if weights.source else "* Weights: the file names no source; whoever trained them "
              "decides on their licence."]
  elif rows := tags.table().get(name, {}):
    known = [f"`{row_tag}` ({row.get('hub') or row['url']}; licence "
             f"{row.get('license') or 'not stated'})" for row_tag, row in rows.items()
             if tag in ("", row_tag)]
    lines += [f"* Weights that load by name: {', '.join(known)}. They are their authors', none of "
              "them ours, and the licences are as timm states them."]
  else:
    lines += ["* Weights: none is known by name. A state dict under timm's names, or its authors', "
              "is read by `vc.from_torch`. The weights and their licence are their authors'."]
  return lines + _method_lines(model)


def _method_lines(model) -> list[str]:
  """A line for each method of the plan; it says so if the method acts in no block."""
  acting = {nested for site in model.sites() for method in model.plan.at(site).present()
            for nested in with_inner(method)}
  lines = []
  for method in model.plan.methods():
    lines += [f"* {method.axis}: `{describe_method(method)}`: " + (
        f"{provenance(method)}." if method in acting else "it applies to no block of this model.")]
  return lines


def _usage_lines(model, weights: Weights | None) -> list[str]:
  lines = ["import vitcompact as vc", ""]
  if weights:
    return [*lines, f"model, variables = vc.pretrained({weights.place!r})",
            f"prepare = vc.preprocess({weights.place!r})   # prepare(\"photo.jpg\") -> an array",
            "logits = model.apply(variables, prepare(\"photo.jpg\")[None])"]
  name = model.variant
  if name.partition(".")[0] in tags.table():
    lines += [f"model, variables = vc.pretrained({name!r})"]
  else:
    lines += [f"model = vc.create_model({name!r})",
              "variables = vc.from_torch(model, state_dict)   # {name: numpy array}"]
  if model.plan != Plan.from_dict(variant_of(name).plan):
    lines += ["plan = vc.Plan.parse(\"plan.json\")   # the plan above",
              "small, small_variables = vc.compact(model, variables, plan, images=images)"]
  else:
    lines += ["images = vc.preprocess(model)(\"photo.jpg\")[None]",
              "logits = model.apply(variables, images)"]
  return lines


def _limit_lines(model, found, changed: bool, weights: Weights | None) -> list[str]:
  lines = []
  if changed and not weights:
    lines += ["* What `vc.compact` fits is a starting point: a compact model has to be trained, "
              "preferably by distillation, before it is used."]
  if found.ideal_macs < found.macs:
    lines += ["* The program executes more multiply-accumulates than the methods need: the table "
              "has both."]
  return lines + [
      "* To use another image size, create the model with `image_size=`; position embeddings are "
      "then resized.",
      "* No times are given here: `vitcompact bench` measures them on your machine.",
      "* We have not examined which biases its training images left in the weights."]
