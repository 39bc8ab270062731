"""Runs the `vitcompact` command in this process."""
from click.testing import CliRunner

from vitcompact.cli import main


def succeeds(*arguments) -> str:
  """Runs a command that must succeed, and returns what it printed."""
  done = CliRunner().invoke(main, [str(argument) for argument in arguments],
                            catch_exceptions=False)
  assert done.exit_code == 0, done.output
  return done.stdout


def fails(*arguments) -> str:
  """Runs a command that must fail, and returns its one line of error."""
  done = CliRunner().invoke(main, [str(argument) for argument in arguments],
                            catch_exceptions=False)
  assert done.exit_code == 2 and not done.stdout, done.output
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
  return done.stderr.rstrip()
