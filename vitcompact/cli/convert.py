"""vitcompact convert: others' checkpoints to our files, and our models back to PyTorch."""
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
@click.option("--model", help="What others' weights are of; see: vitcompact models. Without: "
              "what config.json beside them tells.")
@click.option("--image-size", callback=sides, metavar="PIXELS", help="A side, or height and width; "
              "position embeddings are interpolated to it.")
@click.option("--patch-size", type=int, help="The patch embedding's kernel is resampled to it.")
@click.option("--num-classes", type=int, help="0: features, without a classifier.")
@click.option("--in-chans", type=int, help="The kernel of RGB is made for as many channels.")
@click.option("--global-pool", help="avg for weights with fc_norm instead of norm (MAE).")
@click.option("--weights", help="Which of several sets, such as model, model_ema or teacher.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
              show_default=True, help="Of the file; it is loaded as float32 all the same.")
@click.option("--classes", type=click.File(), help="Names, a line each, as the logits.")
@click.option("--allow-nonfinite", is_flag=True, help="Take NaN and infinity.")
@click.option("--ignore-records", is_flag=True,
              help="Read a PyTorch file without its objects that are no tensors.")
@click.option("--allow", multiple=True, metavar="CLASS", help="Read a PyTorch file without its "
              "objects of this class, such as omegaconf.dictconfig.DictConfig.")
@click.option("--reset-head", is_flag=True, help="Keep all but the classifier, and initialise that "
              "anew, for another number of classes.")
@click.option("--to-torch", is_flag=True, help="From our file to PyTorch's names.")
@click.option("--names", type=click.Choice(["timm", "authors"]), default="timm", show_default=True,
              help="Of --to-torch: whose.")
@click.option("--force", is_flag=True, help="Overwrite.")
def convert(checkpoint, out, model, to_torch, names, force, classes, **options):
  """Convert a checkpoint of others to our format, or back, or to another size.

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

  CHECKPOINT is .safetensors, .npz, or .pth, .pt, .bin, .ckpt, .tar, which are read through torch
  (which has to be installed) as weights only: a file that would run code is refused; or the index
  of several files (model.safetensors.index.json), or a directory with weights and config.json.
  Names may be timm's, the authors', transformers', torchvision's, CLIP's, or Google's of a .npz; or
  those of training code: Lightning, averages, DINO, DINOv2, DINOv3, MAE, DeiT III.

  A file that vitcompact wrote needs no --model; it is converted for another size of images or
  patches (mask predictors keep their rank), or goes --to-torch: a dense model under timm's or the
  authors' names, a folded compact DeiT under names of our own.
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
      for key in ("ignore_records", "allow"):   # of files of the user's own
        options.pop(key, None)
      lines = hub.write(checkpoint, out, model=model, **options)
  click.echo("\n".join(lines))
