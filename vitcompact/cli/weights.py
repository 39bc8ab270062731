"""What the verbs take for a file: also a model's name with its tag, hf-hub:org/name, a folder."""
import click


def file_of(name: str) -> str:
  """The path of a file of ours; weights by name are downloaded and converted into the cache."""
  from vitcompact import hub

  return hub.as_file(name, say=lambda line: click.echo(line, err=True))
