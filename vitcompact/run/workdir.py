"""The directory of a run: it belongs to one config, which lies in it as config.json."""
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time

from vitcompact.train import config as configs


def check_claim(workdir: pathlib.Path, config, free=configs.FREE) -> None:
  """Refuses a workdir of another config, naming the keys that differ."""
  path = workdir / "config.json"
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is a file; name a directory")
  if not path.exists():
    if any((workdir / "checkpoints").glob("*")):
      raise ValueError(f"--workdir={workdir} holds checkpoints but no config.json, which says "
                       "whose they are: put that run's back, or use another --workdir")
    return
  try:
    old = configs.from_text(path.read_text())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is no config of a run ({error}); use another --workdir") from None
  if lines := configs.differences(old, configs.flat(json.loads(config.to_json())), free):
    raise ValueError(f"--workdir={workdir} holds a run of another config: {'; '.join(lines)}. "
                     "Use another --workdir, or the config of that run")


def check_writable(workdir: pathlib.Path) -> None:
  """Refuses, before anything is computed, a workdir that cannot be made or written to."""
  there = workdir
  while not there.exists() and there != there.parent:
    there = there.parent
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f"--workdir={workdir} cannot be written: {there} gives no permission to")


def claim(workdir: pathlib.Path, config) -> None:
  """Makes the directory and writes config.json, unless the run is there already."""
  check_claim(workdir, config)
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      new = path.with_suffix(".tmp")  # renamed, so that a kill leaves no half of a config
      new.write_text(json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True) + "\n")
      new.replace(path)
  except OSError as error:
    raise ValueError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
  """Refuses a second run that would write into the same workdir; a kill frees it."""
  with open(workdir / "lock", "a", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"--workdir={workdir} is being written by another run, {holder(workdir)}; "
                       "wait for it, or use another --workdir") from error
    except OSError:
      pass   # a file system without locks: then nobody can be told
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()} since {time.ctime()}")
    file.flush()
    yield


def holder(workdir: pathlib.Path) -> str:
  """Who wrote into this workdir last, as `locked` noted it."""
  path = workdir / "lock"
  return path.read_text() if path.exists() else "nobody"
