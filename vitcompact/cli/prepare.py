"""vitcompact prepare: images into a few large files that are read at random."""
import click


@click.group(no_args_is_help=False)
def prepare():
  """Write images into a few large files that are read at random.

  They are ArrayRecord files, for data.name='arrayrecord:OUT' of a config. A file is written at a
  time; the same command goes on where it was stopped. The bytes of the images stay as they are.
  """


@prepare.command()
@click.option("--tars", required=True, help="The directory of the official files.")
@click.option("--out", required=True, help="The directory of the ArrayRecord files.")
@click.option("--unofficial", is_flag=True, help="Check no md5 sums and numbers of images.")
def imagenet(tars, out, unofficial):
  """Prepare ImageNet-1k from its official tars, without unpacking them.

  They are ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. Their
  md5 sums must be the published ones; with --unofficial, for a subset of the same form, they need
  not be. The validation images become the split val, which then serves as test too.
  """
  from vitcompact.data import prepare

  prepare.prepare_imagenet(tars, out, official=not unofficial)


@prepare.command()
@click.option("--path", required=True, help="The directory of train/ and of val/ or test/.")
@click.option("--out", required=True, help="The directory of the ArrayRecord files.")
def folder(path, out):
  """Prepare class folders: PATH/train/CLASS/*.jpg, with PATH/val or PATH/test."""
  from vitcompact.data import prepare

  prepare.prepare_folder(path, out)


@prepare.command()
@click.option("--out", required=True, help="The directory of the ArrayRecord files.")
@click.option("--decode", is_flag=True, help="Decode each image to its end.")
def verify(out, decode):
  """Read everything that was prepared: sums, numbers of records, labels, images."""
  from vitcompact.data import prepare

  prepare.verify(out, whole_images=decode)
