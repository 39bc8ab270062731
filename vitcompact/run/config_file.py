"""A config from its file and the command line: --config=FILE:ARGUMENT and --config.KEY=VALUE.

Imports no JAX. `train/config.py` checks keys and values later, so the command line may give keys
that are not in the file.
"""
import ast
import importlib.util
import json
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict, FrozenConfigDict

FLAG, NEGATED = "--config.", "--noconfig."


def split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Splits arguments into (the others, [(key, text)] of each --config.KEY=VALUE)."""
  rest, overrides, argv = [], [], list(argv)
  while argv:
    argument = argv.pop(0)
    name, equals, text = argument.partition("=")
    if name.startswith(NEGATED):
      overrides.append((name.removeprefix(NEGATED), "false"))
    elif not name.startswith(FLAG):
      rest.append(argument)
    elif equals:
      overrides.append((name.removeprefix(FLAG), text))
    else:   # --config.KEY VALUE, or --config.KEY for True
      value = argv.pop(0) if argv and not argv[0].startswith("--") else "true"
      overrides.append((name.removeprefix(FLAG), value))
  return rest, overrides


def load(where: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
  """The config that `get_config(ARGUMENT)` in FILE returns, for FILE or FILE:ARGUMENT, with the
  overrides applied."""
  path, colon, argument = where.partition(":")
  if not pathlib.Path(path).is_file():
    existing = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
    raise ValueError(f"--config={path}: no such file; there are {', '.join(existing)}")
  try:
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*[argument] * bool(colon))
    if isinstance(config, FrozenConfigDict):
      config = config.as_configdict()
    elif not isinstance(config, ConfigDict):
      config = ConfigDict(dict(config))
  except SyntaxError as error:
    raise ValueError(f"--config={path}: not Python: {error.msg}, line {error.lineno}") from error
  except Exception as error:   # a user's program may raise anything
    what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    hint = "; the text after the colon is the argument of the file's get_config, see its docstring"
    raise ValueError(f"--config={where}: {what}{hint if colon else ''}") from error
  for key, text in overrides:
    override(config, key, text)
  return config


def override(config: ConfigDict, key: str, text: str):
  """Sets "optim.b1" or "plan.tokens.keep" from text; missing sections are created."""
  *sections, name = key.split(".")
  section = config
  with config.unlocked(), config.ignore_type():
    for part in sections:
      inner = section.get(part)
      if section is config and part == "plan" and isinstance(inner, str):
        inner = ConfigDict(plan_from(inner))
      section[part] = inner if isinstance(inner, ConfigDict) else ConfigDict()
      section = section[part]
    old = section.get(name)
    new = text if isinstance(old, str) and key != "plan" else value_of(text)
    # Checked here already, because other keys may be computed from a number.
    if isinstance(old, (int, float)) and not isinstance(new, (int, float)):
      kinds = {bool: "True or False", int: "a whole number"}
      raise ValueError(f"config.{key}={text!r}: must be {kinds.get(type(old), 'a number')}")
    section[name] = ConfigDict(new) if isinstance(new, dict) else new


def value_of(text: str):
  """The value of JSON or of a Python literal; the text itself if it is neither."""
  for read in (json.loads, ast.literal_eval):
    try:
      return read(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      pass
  return text


def plan_from(text: str) -> dict:
  """The dict of a plan given as text: a path to JSON, JSON, or "" for the dense model."""
  if text.endswith(".json"):
    try:
      text = pathlib.Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
      raise ValueError(f"config.plan={text!r} cannot be read: {error}") from error
  plan = value_of(text or "{}")
  if not isinstance(plan, dict):
    raise ValueError(f"config.plan={text[:60]!r} is not a JSON object, so --config.plan.AXIS.KEY "
                     "cannot change it")
  return plan
