"""The directory of a run: it belongs to one config, which lies in it as config.json."""
import json
import pathlib

from vitcompact.train import settings


def check_claim(workdir: pathlib.Path, config, free=settings.FREE) -> None:
  """Refuses a workdir of another config, naming the keys that differ."""
  path = workdir / "config.json"
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is a file; name a directory")
  if not path.exists():
    return
  try:
    old = settings.flat(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(f"{path} is not readable as JSON ({error}); use another --workdir") from None
  if lines := settings.differences(old, settings.flat(json.loads(config.to_json())), free):
    raise ValueError(f"--workdir={workdir} holds a run of another config: {'; '.join(lines)}. "
                     "Use another --workdir, or the config of that run")


def claim(workdir: pathlib.Path, config) -> None:
  """Makes the directory and writes config.json, unless the run is there already."""
  check_claim(workdir, config)
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / "config.json"
  if not path.exists():
    new = path.with_suffix(".tmp")  # renamed, so that a kill leaves no half of a config
    new.write_text(json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True) + "\n")
    new.replace(path)
