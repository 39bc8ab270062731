"""vitcompact models: the names that the other verbs take."""
import click


@click.command()
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="With the tags of weights that are known by name.")
def models(pattern: str, pretrained: bool):
  """List the models whose names match PATTERN, such as 'deit_*'."""
  import vitcompact as vc

  names = vc.list_models(pattern, pretrained=pretrained)
  if not names:
    raise ValueError(f"no model matches {pattern!r}; all are listed by: vitcompact models")
  click.echo("\n".join(names))
