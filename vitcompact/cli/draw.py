"""vitcompact draw: what a method does to an image."""
import click


@click.group(no_args_is_help=False)
def draw():
  """Draw which patches survive, or which tokens attend to which. Needs matplotlib."""


@draw.command()
@click.argument("checkpoint")
@click.argument("image")
@click.option("--out", required=True, help="A name that ends in .png.")
@click.option("--plan", help="JSON, or a path to it; its token reducer replaces the model's.")
@click.option("--force", is_flag=True, help="Overwrite.")
def tokens(checkpoint, image, out, plan, force):
  """Draw which patches of IMAGE survive token reduction, stage by stage.

  \b
  vitcompact draw tokens deploy.safetensors cat.jpg --out tokens.png
  vitcompact draw tokens deit.safetensors cat.jpg --out tokens.png \\
      --plan '{"tokens": {"method": "tome", "r": 13}}'

  CHECKPOINT is a file that training or `vitcompact convert` wrote. Patches that were dropped, or
  fused into the remainder, are white; patches that were merged into one token have their mean
  colour and an outline. For a model without a reducer, --plan can name one without parameters
  (EViT, ToMe, MCTF).
  """
  from vitcompact.cli import weights
  from vitcompact.draw import tokens

  click.echo(tokens.run(weights.file_of(checkpoint), image, out, plan=plan, force=force))


@draw.command()
@click.argument("checkpoint")
@click.argument("image")
@click.option("--out", required=True, help="The folder to write into.")
@click.option("--query", "queries", multiple=True, metavar="ROW,COLUMN",
              help="A patch. Repeatable.  [default: the middle and a corner]")
@click.option("--block", "blocks", type=int, multiple=True,
              help="A block's number. Repeatable.  [default: all with sparse attention]")
@click.option("--force", is_flag=True, help="Overwrite.")
def attention(checkpoint, image, out, queries, blocks, force):
  """Draw which tokens attend to which in a model with attention sparsity.

  \b
  vitcompact draw attention sparse.safetensors cat.jpg --out drawings
  vitcompact draw attention sparse.safetensors cat.jpg --out drawings \\
      --query 3,5 --query 10,2 --block 0 --block 11

  The model must be isotropic (DeiT, LV-ViT). Writes into the folder: query_ROW_COLUMN.png for each
  chosen patch, with the patches that it attends to in each block and head; matrices.png, with which
  query (rows) attends to which key (columns); mass.png and mass.csv, with the share of dense
  attention that the kept pairs hold at several keep rates.
  """
  from vitcompact.cli import weights
  from vitcompact.draw import attention

  click.echo(attention.run(weights.file_of(checkpoint), image, out, queries=queries,
                           blocks=blocks, force=force))
