"""vitcompact convert: other libraries' checkpoints to our files, and our models to PyTorch."""
import click


class Sizes(click.Command):
  """Takes two numbers after --image-size as height and width."""

  def parse_args(self, ctx, args):
    joined = []
    for word in args:
      if joined[-2:-1] == ["--image-size"] and word.isdecimal():
        joined[-1] += f",{word}"
      else:
        joined.append(word)
    return super().parse_args(ctx, joined)


def sides(ctx, option, value):
  """None, a side, or (height, width)."""
  del ctx, option
  if value is None:
    return None
  numbers = value.split(",")
  if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
    raise ValueError(f"--image-size {value}: must be a side, or height and width, in pixels")
  return int(value) if len(numbers) == 1 else tuple(map(int, numbers))


@click.command(cls=Sizes)
@click.argument("checkpoint")
@click.option("--out", required=True, help="A name that ends in .safetensors.")
@click.option("--model", help="The model that the weights belong to; see: vitcompact models.  "
              "[default: read from config.json in the same folder]")
@click.option("--image-size", callback=sides, metavar="PIXELS", help="Side, or height and width; "
              "position embeddings are interpolated to it.")
@click.option("--patch-size", type=int, help="Resample the patch embedding's kernel to this size.")
@click.option("--num-classes", type=int, help="Number of classes; 0 gives features, without a "
              "classifier.")
@click.option("--in-chans", type=int, help="Adapt the kernel of RGB to this many channels.")
@click.option("--global-pool", help="avg for weights with fc_norm instead of norm (MAE).")
@click.option("--weights", help="Which set to take if the checkpoint has several, such as model, "
              "model_ema or teacher.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
              show_default=True, help="Of the values in the file; loading gives float32.")
@click.option("--classes", type=click.File(), help="A file of class names, one per line, in the "
              "order of the logits.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinity.")
@click.option("--ignore-records", is_flag=True,
              help="Skip all objects in a PyTorch file that are not tensors.")
@click.option("--allow", multiple=True, metavar="CLASS", help="Skip the objects of this class in a "
              "PyTorch file, such as omegaconf.dictconfig.DictConfig. Repeatable.")
@click.option("--reset-head", is_flag=True, help="Keep all but the classifier, and initialise a "
              "new one, for a different number of classes.")
@click.option("--to-torch", is_flag=True, help="Convert our file to PyTorch's names.")
@click.option("--names", type=click.Choice(["timm", "authors"]), default="timm", show_default=True,
              help="Whose names --to-torch writes.")
@click.option("--force", is_flag=True, help="Overwrite.")
def convert(checkpoint, out, model, to_torch, names, force, classes, **options):
  """Convert another library's checkpoint to our format, or back, or resize one.

  \b
  vitcompact convert deit.pth --model deit_small_patch16_224 --out deit.safetensors
  vitcompact convert deit.pth --model deit_small_patch16_224 --out 384.safetensors \\
      --image-size 384 --num-classes 10 --reset-head
  vitcompact convert trained.safetensors --image-size 384 --out 384.safetensors
  vitcompact convert compact.safetensors --to-torch --out compact_torch.safetensors
  vitcompact convert deit_small_patch16_224.fb_in1k --out deit.safetensors
  vitcompact convert hf-hub:org/name --out name.safetensors

  vitcompact convert trained.pth --model vit_small_patch16_224 --image-size 128 256 --in-chans 1 \\
      --global-pool avg --weights model_ema --dtype bfloat16 --out half.safetensors

  vitcompact convert DIRECTORY --out mine.safetensors

  CHECKPOINT is a .safetensors or .npz file; or .pth, .pt, .bin, .ckpt or .tar, which need torch and
  are read as weights only (a file that would run code is refused); or the index of several files
  (model.safetensors.index.json); or a directory with weights and config.json. Its names may be
  timm's, the authors', transformers', torchvision's, CLIP's, Google's (.npz), or those of training
  code: Lightning, averaged models, DINO, DINOv2, DINOv3, MAE, DeiT III.

  A file that vitcompact wrote needs no --model. It can be converted to another image or patch size
  (mask predictors keep their rank), or with --to-torch to PyTorch: a dense model under timm's or
  the authors' names, a folded compact DeiT under our own.
  """
  from vitcompact import hub, pytorch
  from vitcompact.cli import weights

  if to_torch:
    checkpoint = weights.file_of(checkpoint)
    lines = pytorch.to_torch(checkpoint, out, names=names, force=force)
  else:
    options = {key: value for key, value in options.items() if value is not None}
    options |= {"force": force, "classes": classes and classes.read().splitlines()}
    if hub.is_file_name(checkpoint):
      lines = pytorch.from_checkpoint(checkpoint, model, out, **options)
    else:
      for key in ("ignore_records", "allow"):   # only for the user's own files
        options.pop(key, None)
      lines = hub.write(checkpoint, out, model=model, **options)
  click.echo("\n".join(lines))
