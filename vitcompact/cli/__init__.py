"""The `vitcompact` command, with one file per subcommand.

A subcommand imports its dependencies, above all JAX, only when it runs: --help answers at once.
User errors are reported in one line, with exit code 2; --verbose shows the whole traceback.
"""
import importlib
import pathlib
import sys
import warnings

import click

from vitcompact._version import __version__
from vitcompact.cli import (
    bench,
    card,
    compact,
    compare,
    convert,
    count,
    draw,
    export,
    models,
    page,
    predict,
    prepare,
    push,
)

MAX_ERROR_LINES = 5    # shown of a longer error, such as one line per parameter that does not fit


def _set_verbose(context: click.Context, _, value: bool):
  if value:
    context.obj["verbose"] = True


def verbose_option() -> click.Option:
  """--verbose, for the command and for each subcommand, so that it works before or after it."""
  return click.Option(["--verbose", "--traceback"], is_flag=True, is_eager=True,
                      expose_value=False, callback=_set_verbose,
                      help="Show the full traceback of an error.")


def _import_methods(context: click.Context, _, files: tuple[str, ...]):
  """Imports Python files, which add methods to `vc.METHODS`."""
  for file in map(pathlib.Path, files):
    if not file.is_file():
      raise ValueError(f"--methods {file}: there is no such file")
    sys.path.insert(0, str(file.resolve().parent))   # for what it imports, as for a script
    try:
      module = importlib.import_module(file.stem)
    except Exception as error:
      if context.obj["verbose"]:
        raise
      raise ValueError(f"--methods {file}: {type(error).__name__}: {error}") from error
    if pathlib.Path(getattr(module, "__file__", None) or "").resolve() != file.resolve():
      raise ValueError(f"--methods {file}: another module is called {file.stem}; rename the file")


def methods_option() -> click.Option:
  """--methods FILE, for the command and for each subcommand."""
  return click.Option(["--methods"], multiple=True, metavar="FILE.py", expose_value=False,
                      is_eager=True, callback=_import_methods,
                      help="Import a Python file that adds methods to vc.METHODS. Repeatable.")


class Program(click.Group):
  """A group of subcommands that reports errors in one line."""

  def main(self, args=None, prog_name=None, **_):
    args = list(sys.argv[1:] if args is None else args) or ["--help"]
    options = {"verbose": False}
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
      code = super().main(args, prog_name="vitcompact", standalone_mode=False, obj=options)
    except click.UsageError as error:
      where = error.ctx.command_path if error.ctx else "vitcompact"
      _fail(f"{error.format_message()} See '{where} --help'.")
    except click.ClickException as error:
      _fail(error.format_message())
    except click.Abort:
      sys.exit(130)    # Ctrl-C
    except (ValueError, OSError) as error:
      if options["verbose"]:
        raise
      _fail(str(error) or type(error).__name__)
    sys.exit(code or 0)


def _fail(text: str):
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if len(lines) > MAX_ERROR_LINES:
    lines[MAX_ERROR_LINES:] = [f"and {len(lines) - MAX_ERROR_LINES} more: --verbose shows them"]
  print(f"error: {'; '.join(lines)}", file=sys.stderr, flush=True)
  sys.exit(2)


@click.group(cls=Program, subcommand_metavar="VERB ...",
             params=[verbose_option(), methods_option()],
             context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vitcompact")
def main():
  """Compact vision transformers: count, convert, time, draw and use them.

  To train, run main.py in the repository.
  """


for command in (models.models, count.count, convert.convert, predict.predict, bench.bench,
                draw.draw, prepare.prepare, compare.compare, compact.measure, compact.compact,
                compact.verify, push.push, card.card, export.export, page.page):
  main.add_command(command)
  for subcommand in (command, *getattr(command, "commands", {}).values()):
    subcommand.params += [verbose_option(), methods_option()]
