"""Resolves what subcommands accept as a file: a path, folder, name with tag, hf-hub:org/name."""
import click


def file_of(name: str) -> str:
  """The path of a file of ours; named weights are downloaded and converted into the cache."""
  from vitcompact import hub

  return hub.as_file(name, say=lambda line: click.echo(line, err=True))
