"""The directory of a run. It belongs to one config (config.json), one list of classes
(classes.json), and one set of images, which data.json identifies even at another path."""
import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Sequence

import numpy as np

from vitcompact.data import pipeline
from vitcompact.data.classes import check_classes
from vitcompact.data.decode import BadRecord
from vitcompact.train import config as configs

CLASSES = "classes.json"             # names of the classes, in the order of the outputs
ON_DISK = ("folder", "arrayrecord")   # kinds of data that have a path
SAMPLED = 16                         # images of a split whose pixels are compared


def path_of(workdir) -> pathlib.Path:
  """The absolute path of --workdir; raises ValueError for the address of a bucket."""
  configs.check_local("--workdir", workdir)
  return pathlib.Path(workdir).absolute()


def check_claim(workdir: pathlib.Path, config, *, allow: Sequence[str] = (),
                free=configs.FREE) -> list[str]:
  """Raises ValueError for a workdir of another config, naming the keys that differ.

  free: keys that may differ; data.name may differ if the images are the same. allow: more keys that
  may differ, named by the user. Returns a line for each difference that needed `allow`.
  """
  for key in allow:
    if key not in (known := [*configs.KEYS, *configs.all_settings(), "plan"]) and (
        not key.startswith("model.")):
      close = difflib.get_close_matches(key, known) or ["total_steps"]
      raise ValueError(f"--allow={key} is not a key of a config; did you mean {close[0]}?")
  path = workdir / "config.json"
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is a file; name a directory")
  if not path.exists():
    if any((workdir / "checkpoints").glob("*")):
      raise ValueError(f"--workdir={workdir} holds checkpoints but no config.json, which says "
                       "whose they are: restore that run's file, or use another --workdir")
    return []
  _check_classes(workdir, config.data.name)
  new = configs.flat(json.loads(config.to_json()))
  try:
    old = configs.from_text(path.read_text(encoding="utf-8"))
    changed = configs.changes(old, new)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not the config of a run ({error}); use another --workdir"
                     ) from None
  lines = {key: f"{key} was {before!r} and is now {after!r}"
           for key, (before, after) in changed.items() if key not in free}
  if "data.name" in lines and "data.name" not in allow:
    if why := _other_images(workdir, *changed["data.name"]):
      lines["data.name"] += f" ({why})"
    else:
      del lines["data.name"]
  if refused := [line for key, line in lines.items() if key not in allow]:
    keys = ",".join(key for key in lines)
    raise ValueError(f"--workdir={workdir} holds a run of another config: {'; '.join(refused)}. "
                     "Use another --workdir, or the config of that run; or, to resume it anyway, "
                     f"--allow={keys}")
  return list(lines.values())


def _check_classes(workdir: pathlib.Path, name: str):
  """Raises ValueError for data with other classes than those of the workdir."""
  path = workdir / CLASSES
  if not path.exists():   # the workdir of an older version
    return
  try:
    names = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
      raise ValueError("it is not a list of names")
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} holds no names of classes ({error}); use another --workdir") from None
  check_classes(f"--workdir={workdir}", names, pipeline.class_names(name),
                "Use the data of that run, or another --workdir")


def _other_images(workdir: pathlib.Path, old: str, new: str) -> str:
  """Why data under another name may not be the same images; "" if they are the same."""
  path = workdir / "data.json"
  if not isinstance(old, str) or old.partition(":")[0] != new.partition(":")[0]:
    return "another kind of data"
  if not path.exists():
    return "there is no data.json to say which images they were"
  try:
    known = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError):
    return "data.json is damaged"
  facts = images_at(new)
  return "" if facts and facts == known else f"the images differ: {known} and {facts}"


def images_at(name: str) -> dict:
  """Facts that identify data on disk: the numbers of images and classes, and a digest of the pixels
  and labels of a few images of each split. {} for data that have no path."""
  if name.partition(":")[0] not in ON_DISK:
    return {}
  facts, digest = {"classes": pipeline.num_classes(name)}, hashlib.sha256()
  for split in pipeline.SPLITS:
    images = pipeline.source(name, split, image_size=1)
    facts[split] = len(images)
    for index in np.unique(np.linspace(0, len(images) - 1, SAMPLED).astype(int)):
      try:
        example = images[int(index)]
      except BadRecord:   # it is as bad at another path
        digest.update(b"bad")
        continue
      digest.update(np.asarray(example["image"]).tobytes())
      digest.update(str((index, np.shape(example["image"]), int(example["label"]))).encode())
  return {**facts, "digest": digest.hexdigest()}


def check_writable(workdir: pathlib.Path) -> None:
  """Raises ValueError if the workdir cannot be made or written, before anything is computed."""
  existing = workdir
  while not existing.exists() and existing != existing.parent:
    existing = existing.parent
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    raise ValueError(f"--workdir={workdir} cannot be written: no write permission in {existing}")


def make(workdir: pathlib.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


def claim(workdir: pathlib.Path, config, allow: Sequence[str] = ()) -> list[str]:
  """Makes the directory, and writes config.json, classes.json and data.json unless they exist.

  If `allow` permits differences, config.json is rewritten. Returns the differences.
  """
  changed = check_claim(workdir, config, allow=allow)
  path = workdir / "config.json"
  make(workdir)
  try:
    if changed or not path.exists():
      _write(path, json.loads(config.to_json()))
    if not (workdir / CLASSES).exists():
      _write(workdir / CLASSES, list(pipeline.class_names(config.data.name)))
    if not (workdir / "data.json").exists() and (facts := images_at(config.data.name)):
      _write(workdir / "data.json", facts)
  except OSError as error:
    raise ValueError(f"--workdir={workdir} cannot be written: {error.strerror}") from error
  return changed


def _write(path: pathlib.Path, values: dict | list):
  """Writes JSON by a rename, so that a kill cannot leave a partial file."""
  new = path.with_suffix(".tmp")
  new.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  new.replace(path)


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
  """Locks the workdir; raises ValueError if another run writes there. A kill releases the lock."""
  with open(workdir / "lock", "a", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"--workdir={workdir} is being written by another run, {holder(workdir)}; "
                       "wait for it, or use another --workdir") from error
    except OSError:
      pass   # a file system without locks: a second run cannot be detected
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()} since {time.ctime()}")
    file.flush()
    yield


def holder(workdir: pathlib.Path) -> str:
  """The process that last locked this workdir, as written by `locked`."""
  path = workdir / "lock"
  return path.read_text() if path.exists() else "nobody"
