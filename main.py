"""Trains or evaluates what a config describes.

  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval

The same command again goes on from the newest checkpoint. Any value of the config can be given on
the command line: --config.total_steps=40 --config.plan=plan.json
"""
import ast
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; made when missing")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do")

# What a user can cause. Others are mistakes of ours, and show where they happened.
USER_ERRORS = (ValueError, OSError, FloatingPointError, flags.Error)


def fail(error: Exception):
  """One line and exit code 2; with --verbosity=1 the whole traceback."""
  if logging.get_verbosity() >= logging.DEBUG or "--verbosity=1" in sys.argv:
    raise error
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)


def unquoted(text: str) -> str:
  """The text itself where it is a literal of Python (ml_collections quotes its errors twice)."""
  try:
    return str(ast.literal_eval(text))
  except (ValueError, SyntaxError):
    return text


def parse(argv):
  """absl's own parser, with errors in our form."""
  try:
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
      flag, equals, value = argument.partition("=")
      path = value if equals else following   # absl also takes "--config FILE"
      if flag == "--config" and not pathlib.Path(path.partition(":")[0]).is_file():
        there = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
        raise ValueError(f"--config={path}: no such file; there are {', '.join(there)}")
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f"unexpected arguments {rest[1:]}; options are --config, --workdir, --mode")
    for flag in (CONFIG, WORKDIR):
      if not flag.present:
        raise ValueError(f"--{flag.name} is missing, as in: python main.py "
                         "--config=configs/digits.py --workdir=runs/digits")
    return rest
  except AttributeError as error:  # ml_collections: an unknown key; its text names close ones
    fail(ValueError(f"--config has no key {unquoted(str(error))}"))
  except USER_ERRORS as error:
    fail(error)


def main(_):
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # absl's INFO would tell every step of a save
  from vitcompact.train import loop, report  # after the flags: an error there needs no JAX

  try:
    if MODE.value == "eval":
      loop.evaluate(CONFIG.value, WORKDIR.value)
    else:
      result = loop.train(CONFIG.value, WORKDIR.value)
      print(report.report(result, WORKDIR.value).to_markdown())
  except USER_ERRORS as error:
    fail(error)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
