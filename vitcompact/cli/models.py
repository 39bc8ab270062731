"""vitcompact models: the names that the other subcommands take."""
import click


@click.command()
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Include the tags of known pretrained weights.")
def models(pattern: str, pretrained: bool):
  """List the models whose names match PATTERN, such as 'deit_*'."""
  import vitcompact as vc

  names = vc.list_models(pattern, pretrained=pretrained)
  if not names:
    raise ValueError(f"no model matches {pattern!r}; to list all: vitcompact models")
  click.echo("\n".join(names))
