"""push: a folder with a model, what it computes and how to load it, here or on the hub."""
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from vitcompact import convert, trees
from vitcompact._version import __version__
from vitcompact.count import count
from vitcompact.data.classes import describe
from vitcompact.execution import Execution
from vitcompact.hub import config, download
from vitcompact.plan import Plan
from vitcompact.preprocess import Preprocess, preprocess
from vitcompact.receipt import Receipt

WEIGHTS, CARD, RECEIPT = "model.safetensors", "README.md", "receipt.json"


def push(folder: str | os.PathLike, model: nn.Module, variables: Mapping[str, Any], *,
         classes: Sequence[str] | None = None, preprocess: Preprocess | None = None,
         receipt: Receipt | Mapping | str | os.PathLike | None = None, card: bool = True,
         force: bool = False, repo: str | None = None, private: bool = False,
         source: str = "") -> pathlib.Path:
  """Writes a folder that `pretrained` reads back bit for bit, and uploads it if a `repo` is named.

  In it: model.safetensors (as `vc.save` writes it, the plan included), config.json (timm's keys,
  and the plan), README.md (a card) and receipt.json.

  Args:
    folder: made if it is not there; other files in it are left alone.
    classes: names, in the order of the logits.
    preprocess: how evaluation prepares images, where not as `vc.preprocess(model)`.
    receipt: of the run that made the model, or the path of its receipt.json; the card takes the
      accuracy from it, and states none without.
    card: write README.md.
    force: overwrite what stands in the folder under these names.
    repo: "org/name" on the Hugging Face hub, made if it is not there; wants `hf auth login`.
    private: make it a private one.
    source: where the weights are from, for the card.
  Returns:
    The folder's path.
  Raises:
    ValueError or OSError, one line; nothing is uploaded then.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file; name a folder")
  library = download.library() if repo is not None else None
  prepare = preprocess if preprocess is not None else _own(model)
  if prepare.image_size != _own(model).image_size:
    raise ValueError(f"preprocess makes images of {prepare.image_size}, and the model takes "
                     f"{_own(model).image_size}")
  told = _told(receipt)
  row = told and _row_of(told, model)
  names = [WEIGHTS, config.CONFIG, *([CARD] if card else []), *([RECEIPT] if told else [])]
  if (there := [name for name in names if (folder / name).exists()]) and not force:
    raise ValueError(f"{folder} has {', '.join(there)} already; name another folder, or overwrite "
                     "with force")
  partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
  try:
    partial.mkdir(parents=True)
    convert.save(partial / WEIGHTS, model, variables, classes=classes, preprocess=prepare,
                 about={"source": source} if source else None)
    _write(partial / config.CONFIG, config.write(model, prepare, classes, source))
    if told:
      _write(partial / RECEIPT, json.dumps(told, indent=1) + "\n")
    if card:
      digest = download.sha256(partial / WEIGHTS)
      place = str(folder) if repo is None else f"hf-hub:{repo}"
      _write(partial / CARD, page(repo or folder.name, place, model, variables, prepare, classes,
                                  row, digest, source))
    folder.mkdir(exist_ok=True)
    for name in names:
      os.replace(partial / name, folder / name)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  if repo is not None:
    _upload(library, folder, names, repo, private)
  return folder


def page(title: str, place: str, model, variables, prepare: Preprocess, classes, row, digest: str,
         source: str) -> str:
  """The card, in Markdown: what the model is, what it costs, how to load it.

  place: what `pretrained` is given. row: of the receipt, None without one.
  """
  plain = model.clone(plan=Plan(), execution=Execution())
  counts = {"this model": count(model)}
  if model.plan != Plan():
    counts["the dense one"] = count(plain)
  mean, std = (", ".join(f"{value:.4g}" for value in values)
               for values in (prepare.mean, prepare.std))
  crop = "warped" if prepare.crop is None else f"resized, and {prepare.crop:.4g} of it cropped"
  height, width = prepare.image_size
  lines = [
      "---", "library_name: vitcompact", "tags:", "- image-classification", "- vitcompact", "---",
      f"# {title}", "",
      f"`{model.variant}` in the {'deployed (folded)' if model.deploy else 'training'} form"
      + (", dense." if model.plan == Plan() else ", made smaller under the plan"), ""]
  if model.plan != Plan():
    lines += ["```json", json.dumps(json.loads(model.plan.to_json()), indent=1), "```", ""]
  lines += ["| | parameters | multiply-accumulates of an image |", "|---|---:|---:|"]
  lines += [f"| {what} | {found.params:,} | {found.macs:,} |" for what, found in counts.items()]
  lines += ["", _accuracy(row), ""]
  if source:
    lines += [f"Made from the weights {source}.", ""]
  lines += [
      "```python", "import vitcompact as vc", "",
      f"model, variables = vc.pretrained({place!r})",
      f"prepare = vc.preprocess({place!r})   # prepare(\"photo.jpg\") -> an array for model.apply",
      "```", "", f"Or: `vitcompact predict {place} photo.jpg`", "",
      f"Images: {height} x {width}, {crop} ({prepare.interpolation}); mean {mean}, std {std}.", "",
      describe(classes) + "." if classes else f"{model.num_classes} classes, without names."
      if model.num_classes else "No classifier: it gives features.", "",
      f"sha256 of {WEIGHTS}: `{digest}`  ",
      f"sha256 of the parameters: `{trees.digest(variables['params'])}`  ",
      f"Written by vitcompact {__version__}.", ""]
  return "\n".join(lines)


def _own(model) -> Preprocess:
  return preprocess(model)


def _accuracy(row) -> str:
  if not row or row.get("test_accuracy") is None:
    return f"Accuracy: not stated; {'the receipt has none' if row else 'no receipt was given'}."
  low, high = row.get("accuracy_interval") or (None, None)
  between = "" if low is None else f" (95 % interval {100 * low:.2f} to {100 * high:.2f})"
  return (f"Accuracy: {100 * row['test_accuracy']:.2f}% of {row['test_images']:,} test images"
          f"{between}, from {RECEIPT}.")


def _told(receipt) -> dict | None:
  if receipt is None:
    return None
  if isinstance(receipt, Receipt):
    return json.loads(receipt.to_json())
  if isinstance(receipt, str | os.PathLike):
    path = pathlib.Path(receipt)
    return dict(config.load(path / RECEIPT if path.is_dir() else path))
  return dict(receipt)


def _row_of(told: dict, model) -> dict:
  """The receipt's row of this model, which has its parameters and multiply-accumulates."""
  found = count(model)
  try:
    rows = [row for row in told["models"]
            if (row["params"], row["macs"]) == (found.params, found.macs)]
  except (KeyError, TypeError) as error:
    raise ValueError(f"the receipt cannot be read ({error!r}); give a receipt.json of a run"
                     ) from None
  if not rows:
    raise ValueError(f"the receipt has no model of {found.params:,} parameters and {found.macs:,} "
                     "multiply-accumulates, as this one has; give the receipt of the run that made "
                     "it")
  return rows[-1]


def _upload(library, folder: pathlib.Path, names: Sequence[str], repo: str, private: bool):
  try:
    api = library.HfApi(endpoint=download.endpoint(), library_name="vitcompact",
                        library_version=__version__)
    api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(names),
                      commit_message=f"Written by vitcompact {__version__}")
  except library.errors.HfHubHTTPError as error:
    raise OSError(f"hf-hub:{repo}: not uploaded ({download.first_line(error)}); {folder} is whole: "
                  f"`hf auth login`, then hf upload {repo} {folder}") from None


def _write(path: pathlib.Path, text: str):
  path.write_text(text, encoding="utf-8")
