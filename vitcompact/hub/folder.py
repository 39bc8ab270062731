"""push: writes a folder with a model and its card, and uploads it to the hub."""
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from vitcompact import convert
from vitcompact._version import __version__
from vitcompact.files import sha256
from vitcompact.hub import card as cards
from vitcompact.hub import config, download
from vitcompact.preprocess import Preprocess, preprocess
from vitcompact.receipt import Receipt

WEIGHTS, CARD, RECEIPT = "model.safetensors", "README.md", cards.RECEIPT


def push(folder: str | os.PathLike, model: nn.Module, variables: Mapping[str, Any], *,
         classes: Sequence[str] | None = None, preprocess: Preprocess | None = None,
         receipt: Receipt | Mapping | str | os.PathLike | None = None, card: bool = True,
         force: bool = False, repo: str | None = None, private: bool = False,
         source: str = "") -> pathlib.Path:
  """Writes a folder that `pretrained` reads back bit for bit, and uploads it if a `repo` is named.

  It contains model.safetensors (as `vc.save` writes it, with the plan), config.json (timm's keys,
  and the plan), README.md (a card) and receipt.json.

  Args:
    folder: created if it does not exist; other files in it are left alone.
    classes: names, in the order of the logits.
    preprocess: how evaluation prepares images, if not as `vc.preprocess(model)` does.
    receipt: of the run that made the model, or the path of its receipt.json; the card takes the
      accuracy from it. Without one, the card states no accuracy.
    card: write README.md.
    force: overwrite existing files of these names.
    repo: "org/name" on the Hugging Face hub, created if it does not exist; needs `hf auth login`.
    private: create a private repository.
    source: where the weights are from, for the card.
  Returns:
    The folder's path.
  Raises:
    ValueError or OSError, one line; nothing is uploaded in that case.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file; name a folder")
  library = download.library() if repo is not None else None
  prepare = preprocess if preprocess is not None else _preprocess_of(model)
  if prepare.image_size != _preprocess_of(model).image_size:
    raise ValueError(f"preprocess makes images of {prepare.image_size}, but the model takes "
                     f"{_preprocess_of(model).image_size}")
  facts = None if receipt is None else cards.receipt_dict(receipt)
  accuracy = facts and cards.accuracy_in(facts, model, variables)
  names = [WEIGHTS, config.CONFIG, *([CARD] if card else []), *([RECEIPT] if facts else [])]
  if (existing := [name for name in names if (folder / name).exists()]) and not force:
    raise ValueError(f"{folder} has {', '.join(existing)} already; name another folder, or "
                     "overwrite with force")
  partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
  try:
    partial.mkdir(parents=True)
    convert.save(partial / WEIGHTS, model, variables, classes=classes, preprocess=prepare,
                 about={"source": source} if source else None)
    _write(partial / config.CONFIG, config.write(model, prepare, classes, source))
    if facts:
      _write(partial / RECEIPT, json.dumps(facts, indent=1) + "\n")
    if card:
      digest = sha256(partial / WEIGHTS)
      place = str(folder) if repo is None else f"hf-hub:{repo}"
      _write(partial / CARD, cards.page(
          repo or folder.name, model, prepare, classes=classes, accuracy=accuracy,
          weights=cards.Weights(place, variables, digest, source)))
    folder.mkdir(exist_ok=True)
    for name in names:
      os.replace(partial / name, folder / name)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  if repo is not None:
    _upload(library, folder, names, repo, private)
  return folder


def _preprocess_of(model) -> Preprocess:
  return preprocess(model)


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
