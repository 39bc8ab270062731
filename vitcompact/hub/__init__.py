"""Pretrained weights by name: `pretrained` loads a model with them, and folders that `push` writes.

Names may be:
  "deit_small_patch16_224"            a model of `list_models(pretrained=True)`: its default weights
  "deit_small_patch16_224.fb_in1k"    the weights of a tag
  "hf-hub:org/name", "...@revision"   a repository on the hub: timm's, transformers' or `push`'s
  "local-dir:PATH", or PATH           a folder with such files, or a single file
  "https://.../name-cd65a155.pth"     an authors' file; name the model with model=
"""
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from vitcompact import convert, files, pytorch, trees
from vitcompact._version import __version__
from vitcompact.hub import config, download
from vitcompact.hub.config import Described
from vitcompact.hub.download import File
from vitcompact.hub.folder import push
from vitcompact.models import VARIANTS, create_model, tags, variant_of
from vitcompact.preprocess import Preprocess, preprocess

__all__ = ["Fetched", "as_file", "fetch", "is_file_name", "is_model_name", "pretrained", "push",
           "write"]

REPOSITORY, FOLDER = ("hf-hub:", "hf_hub:"), "local-dir:"
ADDRESS = ("https://", "http://", "file://")
PROCESSOR = "preprocessor_config.json"


class Fetched(NamedTuple):
  """A model with its weights, and where they are from.

  preprocess: how images were prepared in their evaluation. source: "hf-hub:org/name@commit", a URL
  or a path. digest: sha256 of the file of weights. lines: what was dropped, resized or initialised.
  """
  model: nn.Module
  variables: dict[str, Any]
  classes: list[str] | None
  preprocess: Preprocess
  source: str
  digest: str
  lines: Sequence[str] = ()


class WeightFiles(NamedTuple):
  """Local files of weights: the file, the parts that an index names, and the model described by a
  config.json."""
  file: File
  parts: Sequence[File]
  described: Described | None

  @property
  def digest(self) -> str:
    if not self.parts:
      return self.file.digest
    text = "".join(file.digest for file in (self.file, *self.parts))
    return hashlib.sha256(text.encode()).hexdigest()


def pretrained(name: str | os.PathLike, *, model: str | None = None, revision: str | None = None,
               cache_dir: str | os.PathLike | None = None, offline: bool | None = None,
               sha256: str | None = None, weights: str | None = None,
               **fields) -> tuple[nn.Module, dict[str, Any]]:
  """(model, variables) of pretrained weights by name, see the top of `vitcompact/hub`.

  Args:
    name: a model's name, with or without a tag; "hf-hub:org/name", "local-dir:PATH", a path, a URL.
    model: the model's name, if the file or repository does not contain it.
    revision: branch, tag or commit of the repository. `fetch` returns the commit that was used.
    cache_dir: where files are kept, instead of the hub's cache and ~/.cache/vitcompact.
    offline: use only cached files. Default: the environment variable HF_HUB_OFFLINE.
    sha256: of the file of weights, or at least its first 8 digits. Digests from the hub or in the
      file's name are always checked.
    weights: which set of a training checkpoint to take, see `from_torch`.
    fields: as in `create_model`, except the plan. With a different num_classes the backbone is kept
      and the classifier initialised anew, with a warning; 0 drops the classifier.
  Returns:
    The model, dense unless `push` wrote a compact one, and float32 variables, nested dicts of numpy
    arrays.
  Raises:
    ValueError or OSError, one line: the name is unknown; a file is missing, damaged or not the
    model's; or the package huggingface_hub is not installed.
  """
  found = fetch(name, model=model, revision=revision, cache_dir=cache_dir, offline=offline,
                sha256=sha256, weights=weights, **fields)
  for line in found.lines:
    if line.startswith("classifier:"):
      warnings.warn(f"{name}: {line}", stacklevel=2)
  return found.model, found.variables


def fetch(name, *, weights: str | None = None, reset_head: bool = False,
          allow_nonfinite: bool = False, **options) -> Fetched:
  """As `pretrained`, but also returns where the weights are from and how images are prepared.

  reset_head: initialise the classifier anew, even if the number of classes is the same.
  """
  places = ("model", "revision", "cache_dir", "offline", "sha256")
  found = find(name, **{key: options.pop(key) for key in places if key in options})
  return _read(found, options, weights, reset_head, allow_nonfinite)


def find(name, *, model: str | None = None, revision: str | None = None, cache_dir=None,
         offline: bool | None = None, sha256: str | None = None) -> WeightFiles:
  """The files of weights, downloaded if they are not cached, with their digests checked."""
  text = os.fspath(name) if isinstance(name, str | os.PathLike) else name
  if not isinstance(text, str) or not text:
    raise ValueError(f"{name!r} is not a name of weights; use one of list_models(pretrained=True), "
                     "hf-hub:org/name, a path or a URL")
  if text.startswith(REPOSITORY):
    repo, _, commit = text.partition(":")[2].partition("@")
    if revision and commit:
      raise ValueError(f"{text}: two revisions, {commit!r} and {revision!r}; give one")
    return _files_of_repository(repo, model, sha256, revision=revision or commit or None,
                          cache_dir=cache_dir, offline=offline)
  row = {}
  if is_model_name(text):
    model, text, row = _resolve_tag(text, model)
  if "hub" in row:
    return _files_of_repository(row["hub"], model, sha256, revision=revision, cache_dir=cache_dir,
                          offline=offline)
  if revision:
    raise ValueError(f"revision={revision!r}: {text} is not a repository, and has no revisions; "
                     "leave it out")
  if text.startswith(ADDRESS) or row:
    file = download.from_address(row.get("url", text), cache_dir=cache_dir, offline=offline,
                                 sha256=sha256)
    return WeightFiles(file, (), model and Described(model, {}))
  return _files_of_path(pathlib.Path(text.removeprefix(FOLDER)).expanduser(), model, sha256)


def _resolve_tag(name: str, model: str | None) -> tuple[str, str, dict]:
  """(name with its tag, the same, row) of a model in the table of weights."""
  if model is not None:
    raise ValueError(f"model={model!r}: {name!r} is a model already; leave one out")
  plain, _, tag = name.partition(".")
  variant_of(plain)
  tag, row = tags.row_of(plain, tag)
  return f"{plain}.{tag}", f"{plain}.{tag}", row


def is_file_name(text: str) -> bool:
  """Whether `text` is the path of a file, existing or not; not a folder, a source or a model."""
  return not text.startswith((*REPOSITORY, FOLDER, *ADDRESS)) and not os.path.isdir(text) and (
      os.path.exists(text) or os.sep in text or text.lower().endswith(download.SUFFIXES))


def is_model_name(text: str) -> bool:
  """Whether `text` can only be a model's name, with or without a tag."""
  return not (text.startswith((*REPOSITORY, FOLDER, *ADDRESS)) or os.path.isdir(text)
              or is_file_name(text))


def _files_of_repository(repo: str, model: str | None, sha256, **options) -> WeightFiles:
  described = model and Described(model, {})
  if described is None:
    described = _described_by_hub(repo, options)
  file = download.from_hub(repo, download.WEIGHTS, **options)
  parts = download.parts_from_hub(file, repo, **options)
  file = download.checked_of_hub(file, repo, [sha256] if sha256 else [])
  return WeightFiles(file, [download.checked_of_hub(part, repo) for part in parts], described)


def _described_by_hub(repo: str, options) -> Described:
  where = f"hf-hub:{repo}"
  file = download.from_hub(repo, [config.CONFIG], **options)
  about, processor = config.load(file.path), None
  if "model_type" in about:
    try:
      processor = config.load(download.from_hub(repo, [PROCESSOR], **options).path)
    except (ValueError, OSError):   # not every repository has one
      processor = None
  return config.read(where, about, processor)


def _files_of_path(path: pathlib.Path, model: str | None, sha256) -> WeightFiles:
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file or folder")
  described = model and Described(model, {})
  if path.is_dir():
    names = [name for name in download.WEIGHTS if (path / name).is_file()]
    if not names:
      raise ValueError(f"{path} has no file of weights; looked for: {', '.join(download.WEIGHTS)}")
    if described is None and (path / config.CONFIG).is_file():
      about, other = config.load(path / config.CONFIG), path / PROCESSOR
      if not pytorch.is_ours(path / names[0]):
        described = config.read(str(path), about, config.load(other) if other.is_file() else None)
    path /= names[0]
  hint = "give the intended file"
  file = download.checked(File(path, str(path)), [sha256] if sha256 else [], hint)
  parts = []
  if path.name.endswith(".index.json"):
    for name in sorted(files.shards_of(path)):
      if not (path.parent / name).is_file():
        raise FileNotFoundError(f"{path.parent / name}: no such file, and {path.name} names it")
      parts.append(download.checked(File(path.parent / name, str(path)), [], hint))
  return WeightFiles(file, parts, described)


def _read(found: WeightFiles, fields, weights, reset_head, allow_nonfinite) -> Fetched:
  """The model and weights in the files, with these fields."""
  path, source = found.file.path, found.file.source
  if "plan" in fields or "deploy" in fields:
    raise ValueError("plan and deploy are those of the weights: load them, then use vc.compact and "
                     "vc.fold")
  if pytorch.is_ours(path):
    return _read_ours(found, fields, reset_head, allow_nonfinite)
  if found.described is None:
    raise ValueError(f"{source} does not say which model it is of; name it with model=NAME "
                     "(list_models() lists them)")
  name, config_fields, classes, images = found.described
  stored = create_model(name, **config_fields)
  model = create_model(name, **{**config_fields, **fields})
  other = reset_head or model.num_classes != stored.num_classes
  state = pytorch.read_checkpoint(str(path))

  def read(reset_head: bool):
    return convert.read_state_dict(model, state, reset_head=reset_head, weights=weights,
                                   allow_nonfinite=allow_nonfinite)

  if other and not reset_head and name in VARIANTS and "num_classes" not in config_fields:
    try:   # the file's number of classes is unknown: it may be the one in `fields`
      loaded, other = read(False), False
    except ValueError:
      loaded = read(True)
  else:
    loaded = read(other)
  settings = [f"{key}={value}" for key, value in config_fields.items()]
  lines = [*([f"{config.CONFIG}: {', '.join([name, *settings])}"] if config_fields else []),
           *_classifier_lines(stored, model, other), *loaded.lines()]
  return Fetched(model, loaded.variables, None if other else classes,
                 config.prepared(model, images), source, found.digest, lines)


def _read_ours(found: WeightFiles, fields, reset_head, allow_nonfinite) -> Fetched:
  path = found.file.path
  stored, variables = convert.load(path, allow_nonfinite=allow_nonfinite)
  classes, pre, lines, model = convert.classes_of(path), preprocess(path), [], stored
  if fields or reset_head:
    model = convert.with_fields(stored, **fields)
    other = reset_head or model.num_classes != stored.num_classes
    loaded = convert.read_state_dict(model, convert.tensors_of(stored, variables), source=stored,
                                     reset_head=other, allow_nonfinite=allow_nonfinite)
    variables, classes = loaded.variables, None if other else classes
    lines = [*_classifier_lines(stored, model, other), *loaded.lines()]
    pre = config.prepared(model, config.settings(pre))
  return Fetched(model, variables, classes, pre, found.file.source, found.digest, lines)


def _classifier_lines(stored, model, other: bool) -> list[str]:
  if not other or not model.num_classes:
    return []
  old = (f"the one of {stored.num_classes} classes was left out" if stored.num_classes else
         "the weights have none")
  return [f"classifier: {old}; a new one of {model.num_classes} classes is initialised and has to "
          "be trained; the backbone's weights are kept"]


def write(name, out, *, force: bool = False, dtype: str = "float32",
          classes: Sequence[str] | None = None, **options) -> list[str]:
  """Writes named weights as a file of ours; returns lines that say what was done.

  The file's metadata hold the source, with its commit and digest. options: see `fetch`.
  """
  found = fetch(name, **options)
  _save(out, found, force=force, dtype=dtype, classes=classes)
  size = trees.size(found.variables["params"])
  return [f"{out}: {found.model.variant}, {size:,} parameters, from {found.source}", *found.lines]


def _save(out, found: Fetched, classes=None, **options):
  convert.save(out, found.model, found.variables, classes=classes or found.classes,
               preprocess=found.preprocess,
               about={"source": found.source, "source_sha256": found.digest}, **options)


def as_file(name, say=None, **options) -> str:
  """The path of a file of ours for any name: a given file, or a converted one in the cache.

  The path of a file is returned unchanged and unchecked. say: called with each line that says what
  was done, if the file is made now. options: see `find`.
  """
  text = os.fspath(name)
  if is_file_name(text):
    return text
  found = find(name, **options)
  if pytorch.is_ours(found.file.path):
    return str(found.file.path)
  key = json.dumps([found.described, found.digest, __version__], default=list)
  stem = found.described.name if found.described else "model"
  folder = download.cache_folder(options.get("cache_dir")) / "models"
  path = folder / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
  if not path.exists():
    fetched = _read(found, {}, None, False, False)
    folder.mkdir(parents=True, exist_ok=True)
    _save(path, fetched, force=True)
    for line in fetched.lines if say else ():
      say(line)
  return str(path)
