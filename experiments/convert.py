"""PyTorch checkpoints to our files, and our models back to PyTorch.

  python -m experiments.convert deit.pth --model deit_small_patch16_224 --out deit.safetensors
  python -m experiments.convert deit.pth --model deit_small_patch16_224 --out 384.safetensors \\
      --image-size 384 --num-classes 10 --reset-head
  python -m experiments.convert trained.safetensors --image-size 384 --out 384.safetensors
  python -m experiments.convert compact.safetensors --to-torch --out compact_torch.safetensors

  python -m experiments.convert trained.pth --model vit_small_patch16_224 --image-size 128 256 \\
      --in-chans 1 --global-pool avg --weights model_ema --dtype bfloat16 --out half.safetensors

Reads .safetensors, .npz, and PyTorch's files (.pth, .pt, .bin, .ckpt) through torch (which has to
be installed), as weights only: a file that would run code is refused, or read without the objects
that are no tensors by --ignore-records. What `vitcompact.convert.save` wrote needs no --model; it
becomes one for another size of images or patches (predictors of token links keep their rank), or
goes --to-torch: a dense model under timm's or the authors' names, a folded compact DeiT under names
that experiments/torch_deit.py reads.
"""
import argparse
import pathlib
import re
from collections.abc import Mapping

import numpy as np

import vitcompact as vc
from vitcompact import convert, files, trees

WAY_OUT = ("where it was made, torch.save({'model': model.state_dict()}, 'weights.pth') writes "
           "weights only")


class Record:
  """Stands for an object of a class that is not looked for: what a file has of it is dropped."""

  def __new__(cls, *_, **__):
    return super().__new__(cls)

  def __init__(self, *_, **__):
    pass

  def __setstate__(self, _):
    pass


def harmless() -> list:
  """Classes that checkpoints keep plain records in, with the names that files have for them."""
  core = np._core.multiarray
  numpy = [(getattr(core, name), f"numpy.{home}.multiarray.{name}")
           for name in ("scalar", "_reconstruct") for home in ("_core", "core")]
  numbers = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
  # DeiT's own checkpoints keep their command line as a Namespace.
  return [argparse.Namespace, np.ndarray, np.dtype, *numbers, *numpy,
          *[(Record, f"pathlib.{name}") for name in ("Path", "PosixPath", "WindowsPath")]]


def read_checkpoint(path: str, *, ignore_records: bool = False) -> Mapping:
  """What a checkpoint holds: a state dict, or containers of some. ValueError where it cannot be
  read."""
  kind = files.kind_of(path)
  if kind == "safetensors" or pathlib.Path(path).suffix == ".safetensors":
    return convert.read_safetensors(path)[0]
  if kind == "pytorch":
    return _read_pickled(path, ignore_records)
  if kind == "npz":
    try:
      with np.load(path, allow_pickle=False) as file:
        return dict(file)
    except Exception as error:  # a damaged archive may raise anything
      reason = str(error).split("\n")[0]
      raise ValueError(f"{path}: refused: damaged, or more than arrays ({reason})") from None
  raise ValueError(f"{path} is {files.KINDS[kind]}; must be .safetensors, .npz or PyTorch's "
                   f"({', '.join(files.PICKLED)})")


def _read_pickled(path, ignore_records):
  try:
    import torch
  except ImportError:
    raise ValueError(f"{path} is a PyTorch file: reading it needs torch (pip install torch); or "
                     "save the weights as .safetensors where it is installed") from None
  allowed = harmless()
  while True:
    try:
      with torch.serialization.safe_globals(allowed):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
      break
    except Exception as error:  # a broken or hostile file may raise anything
      # torch's own text recommends to switch the protection off.
      name = re.search(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", str(error))
      if not name:
        kind = type(error).__name__
        raise ValueError(f"{path}: refused: damaged, or more than weights ({kind}); {WAY_OUT}"
                         ) from None
      record = (Record, name[1])
      blocked = "blocked" in str(error)   # modules that torch never reads a name of, such as os
      if not ignore_records or blocked or record in allowed:
        ignore = "" if blocked else ", or --ignore-records leaves such objects out"
        raise ValueError(f"{path}: refused: it holds more than weights, {name[1]}; {WAY_OUT}"
                         f"{ignore}") from None
      allowed.append(record)   # its name is read, nothing of that name is imported or run
  if not isinstance(checkpoint, Mapping):
    raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors")
  return checkpoint


def is_ours(path: str) -> bool:
  """Whether `vitcompact.convert.save` wrote a file. What went --to-torch says which model it is of
  too, but has PyTorch's names."""
  if pathlib.Path(path).suffix != ".safetensors" or files.kind_of(path) != "safetensors":
    return False
  names, about = files.read_header(path)
  return "fields" in about and any(name.startswith("params/") for name in names)


def from_checkpoint(checkpoint, name, out, *, reset_head=False, force=False, weights=None,
                    dtype="float32", classes=None, allow_nonfinite=False, ignore_records=False,
                    **fields):
  """Writes `out`, returns lines that tell what was done. name: None for a file of ours."""
  source = None
  if name is None:
    source, variables = convert.load(checkpoint, allow_nonfinite=allow_nonfinite)
    state, name = vc.to_torch(source, variables), source.variant
    model = convert.altered(source, **fields)
    if classes is None and model.num_classes == source.num_classes and not reset_head:
      classes = convert.classes_of(checkpoint)
  else:
    state = read_checkpoint(checkpoint, ignore_records=ignore_records)
    model = vc.create_model(name, **fields)
  loaded = convert.read_state_dict(model, state, reset_head=reset_head, source=source,
                                   weights=weights, allow_nonfinite=allow_nonfinite)
  convert.save(out, model, loaded.variables, force=force, dtype=dtype, classes=classes,
               allow_nonfinite=allow_nonfinite)
  return [f"{out}: {name}, {trees.size(loaded.variables['params']):,} parameters",
          *loaded.lines()]


def to_torch(checkpoint, out, *, names="timm", force=False):
  """Writes the PyTorch state dict of one of our files, returns lines that tell what was done."""
  model, variables = convert.load(checkpoint)
  state = vc.to_torch(model, variables, names=names)
  convert.write_safetensors(out, state, convert.metadata(model), force=force)
  return [f"{out}: {model.variant}, {len(state)} tensors"]


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("checkpoint")
  parser.add_argument("--out", required=True, help="a name that ends in .safetensors")
  parser.add_argument("--model", help="as in vc.list_models(); what PyTorch's weights are of")
  parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS",
                      help="a side, or height and width; positions are resized to it")
  parser.add_argument("--patch-size", type=int, help="patches are embedded by a resized kernel")
  parser.add_argument("--num-classes", type=int, help="0: features, without a classifier")
  parser.add_argument("--in-chans", type=int, help="the kernel of RGB is made for them")
  parser.add_argument("--global-pool", help="avg for weights with fc_norm instead of norm")
  parser.add_argument("--weights", help="which of several, as in model, model_ema or teacher")
  parser.add_argument("--dtype", choices=tuple(files.DTYPES), default="float32",
                      help="of the file; half precision is loaded as float32")
  parser.add_argument("--classes", metavar="FILE", help="names, a line each, as the logits")
  parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity")
  parser.add_argument("--ignore-records", action="store_true",
                      help="read a PyTorch file without its objects that are no tensors")
  parser.add_argument("--reset-head", action="store_true", help="initialise the classifier anew")
  parser.add_argument("--to-torch", action="store_true", help="from our file to PyTorch's names")
  parser.add_argument("--names", choices=("timm", "authors"), default="timm")
  parser.add_argument("--force", action="store_true", help="overwrite")
  args = parser.parse_args()
  fields = {key: value for key in ("image_size", "patch_size", "num_classes", "in_chans",
                                   "global_pool") if (value := getattr(args, key)) is not None}
  if len(size := fields.get("image_size", [])) == 1:
    fields["image_size"] = size[0]
  try:
    if args.to_torch:
      lines = to_torch(args.checkpoint, args.out, names=args.names, force=args.force)
    elif (ours := is_ours(args.checkpoint)) and args.model:
      raise ValueError(f"{args.checkpoint} says which model it is of; leave --model out")
    elif not ours and args.model is None:
      raise ValueError("--model is missing, as in --model deit_small_patch16_224; known: "
                       f"{', '.join(vc.list_models())}")
    else:
      classes = args.classes and pathlib.Path(args.classes).read_text().splitlines()
      lines = from_checkpoint(args.checkpoint, args.model, args.out, reset_head=args.reset_head,
                              force=args.force, weights=args.weights, dtype=args.dtype,
                              classes=classes, allow_nonfinite=args.allow_nonfinite,
                              ignore_records=args.ignore_records, **fields)
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from None
  print("\n".join(lines))


if __name__ == "__main__":
  main()
