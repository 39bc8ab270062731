"""Runs the `vitcompact` command in this process."""
from click.testing import CliRunner

from vitcompact.cli import main


def succeeds(*arguments) -> str:
  """What it printed."""
  done = CliRunner().invoke(main, [str(argument) for argument in arguments],
                            catch_exceptions=False)
  assert done.exit_code == 0, done.output
  return done.stdout


def fails(*arguments) -> str:
  """The one line that said why it refused."""
  done = CliRunner().invoke(main, [str(argument) for argument in arguments],
                            catch_exceptions=False)
  assert done.exit_code == 2 and not done.stdout, done.output
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
  return done.stderr.rstrip()
