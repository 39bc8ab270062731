"""vitcompact convert: PyTorch checkpoints to our files, and our models back to PyTorch."""
import click


@click.command()
@click.argument("checkpoint")
@click.option("--out", required=True, help="A name that ends in .safetensors.")
@click.option("--model", help="What PyTorch's weights are of; see: vitcompact models.")
@click.option("--image-size", type=int, help="Position embeddings are interpolated to it.")
@click.option("--patch-size", type=int, help="The patch embedding's kernel is resampled to it.")
@click.option("--num-classes", type=int, help="0: features, without a classifier.")
@click.option("--reset-head", is_flag=True, help="Initialise the classifier anew.")
@click.option("--to-torch", is_flag=True, help="From our file to PyTorch's names.")
@click.option("--names", type=click.Choice(["timm", "authors"]), default="timm", show_default=True,
              help="Of --to-torch: whose.")
@click.option("--force", is_flag=True, help="Overwrite.")
def convert(checkpoint, out, model, reset_head, to_torch, names, force, **sizes):
  """Convert a PyTorch checkpoint to our format, or back, or to another size.

  \b
  vitcompact convert deit.pth --model deit_small_patch16_224 --out deit.safetensors
  vitcompact convert deit.pth --model deit_small_patch16_224 --out 384.safetensors \\
      --image-size 384 --num-classes 10 --reset-head
  vitcompact convert trained.safetensors --image-size 384 --out 384.safetensors
  vitcompact convert compact.safetensors --to-torch --out compact_torch.safetensors

  Reads .safetensors, and .pth, .pt, .bin, .tar through torch (which has to be installed), as
  weights only: a file that would run code is refused. A file that vitcompact wrote needs no
  --model; it is converted for another size of images or patches (mask predictors keep their rank),
  or goes --to-torch: a dense model under timm's or the authors' names, a folded compact DeiT under
  names of our own.
  """
  from vitcompact import pytorch

  if to_torch:
    lines = pytorch.to_torch(checkpoint, out, names=names, force=force)
  else:
    fields = {key: value for key, value in sizes.items() if value is not None}
    lines = pytorch.from_checkpoint(checkpoint, model, out, reset_head=reset_head, force=force,
                                    **fields)
  click.echo("\n".join(lines))
