"""A config from its file and the command line: --config=FILE:ARGUMENT and --config.KEY=VALUE.

Imports no JAX. Which keys and values there may be is checked later, by `train/config.py`: a key
that the file leaves out can be given all the same.
"""
import ast
import importlib.util
import json
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict, FrozenConfigDict

FLAG, NEGATED = "--config.", "--noconfig."


def split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """(the other arguments, [(key, text)] of the --config.KEY=VALUE among them)."""
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
    else:   # --config.KEY VALUE, or of a switch --config.KEY
      value = argv.pop(0) if argv and not argv[0].startswith("--") else "true"
      overrides.append((name.removeprefix(FLAG), value))
  return rest, overrides


def load(where: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
  """What `get_config(ARGUMENT)` of a FILE or FILE:ARGUMENT returns, with these keys changed."""
  path, colon, argument = where.partition(":")
  if not pathlib.Path(path).is_file():
    there = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
    raise ValueError(f"--config={path}: no such file; there are {', '.join(there)}")
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
    raise ValueError(f"--config={path}: no Python: {error.msg}, line {error.lineno}") from error
  except Exception as error:   # of a user's program, whatever it raises
    what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    hint = "; what follows the colon is for the file's get_config, see its docstring"
    raise ValueError(f"--config={where}: {what}{hint if colon else ''}") from error
  for key, text in overrides:
    override(config, key, text)
  return config


def override(config: ConfigDict, key: str, text: str):
  """Sets "optim.b1" or "plan.tokens.keep" from text; sections that are missing are made."""
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
    if isinstance(old, (int, float)) and not isinstance(new, (int, float)):   # others follow it
      kinds = {bool: "True or False", int: "a whole number"}
      raise ValueError(f"config.{key}={text!r}: must be {kinds.get(type(old), 'a number')}")
    section[name] = ConfigDict(new) if isinstance(new, dict) else new


def value_of(text: str):
  """The value of JSON or of a literal of Python; the text itself where it is neither."""
  for read in (json.loads, ast.literal_eval):
    try:
      return read(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      pass
  return text


def plan_from(text: str) -> dict:
  """The dict of a config's plan that is text: a path to JSON, JSON, or "" for the dense model."""
  if text.endswith(".json"):
    try:
      text = pathlib.Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
      raise ValueError(f"config.plan={text!r} cannot be read: {error}") from error
  plan = value_of(text or "{}")
  if not isinstance(plan, dict):
    raise ValueError(f"config.plan={text[:60]!r} is no JSON object, so --config.plan.AXIS.KEY has "
                     "nothing to change")
  return plan
