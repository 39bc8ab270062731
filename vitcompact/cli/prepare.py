"""vitcompact prepare: packs images into a few large files for fast random access."""
import click


@click.group(no_args_is_help=False)
def prepare():
  """Pack images into a few large files for fast random access.

  They are ArrayRecord files, for data.name='arrayrecord:OUT' in a config. Files are written one at
  a time; run the same command again to resume. The bytes of the images are not changed.
  """


@prepare.command()
@click.option("--tars", required=True, help="The directory of the official files.")
@click.option("--out", required=True, help="The directory of the ArrayRecord files.")
@click.option("--unofficial", is_flag=True,
              help="Don't check md5 sums and the number of images.")
def imagenet(tars, out, unofficial):
  """Prepare ImageNet-1k from its official tars, without unpacking them.

  They are ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. Their
  md5 sums must be the published ones, unless --unofficial is given, for a subset in the same form.
  The validation images become the val split, which also serves as test.
  """
  from vitcompact.data import prepare

  prepare.prepare_imagenet(tars, out, official=not unofficial)


@prepare.command()
@click.option("--path", required=True, help="The directory with train/ and val/ or test/.")
@click.option("--out", required=True, help="The directory of the ArrayRecord files.")
def folder(path, out):
  """Prepare class folders: PATH/train/CLASS/*.jpg, with PATH/val or PATH/test."""
  from vitcompact.data import prepare

  prepare.prepare_folder(path, out)


@prepare.command()
@click.option("--out", required=True, help="The directory of the ArrayRecord files.")
@click.option("--decode", is_flag=True, help="Decode each image completely.")
def verify(out, decode):
  """Check all prepared files: checksums, numbers of records, labels, images."""
  from vitcompact.data import prepare

  prepare.verify(out, whole_images=decode)
