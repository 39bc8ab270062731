"""PyTorch checkpoints to our files, and our models back to PyTorch.

  python -m experiments.convert deit.pth --model deit_small_patch16_224 --out deit.safetensors
  python -m experiments.convert deit.pth --model deit_small_patch16_224 --out 384.safetensors \\
      --image-size 384 --num-classes 10 --reset-head
  python -m experiments.convert trained.safetensors --image-size 384 --out 384.safetensors
  python -m experiments.convert compact.safetensors --to-torch --out compact_torch.safetensors

Reads .safetensors, and .pth, .pt, .bin, .tar through torch (which has to be installed), as weights
only: a file that would run code is refused. What `vitcompact.convert.save` wrote needs no --model;
it becomes one for another size of images or patches (predictors of token links keep their rank), or
goes --to-torch: a dense model under timm's or the authors' names, a folded compact DeiT under names
that experiments/torch_deit.py reads.
"""
import argparse
import pathlib
import re

import numpy as np

import vitcompact as vc
from vitcompact import convert, trees

PICKLED = (".pth", ".pt", ".bin", ".tar")


def read_checkpoint(path: str) -> dict[str, np.ndarray]:
  """{name: array} of a checkpoint, its container taken off; ValueError where it cannot be read."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  if path.suffix == ".safetensors":
    return convert.read_safetensors(path)[0]
  if path.suffix not in PICKLED:
    raise ValueError(f"{path}: must end in .safetensors, {', '.join(PICKLED)}")
  return _read_pickled(path)


def _read_pickled(path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError:
    raise ValueError(f"{path}: reading {path.suffix} needs torch (pip install torch); or save the "
                     "weights as .safetensors where it is installed") from None
  try:
    # DeiT's own checkpoints keep their command line as a Namespace, a plain record.
    with torch.serialization.safe_globals([argparse.Namespace]):
      checkpoint = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # a broken or hostile file may raise anything
    # torch's own text recommends to switch the protection off.
    asks_for = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = (f"it holds more than weights, {asks_for[1]}" if asks_for else
              f"damaged, or more than weights ({type(error).__name__})")
    raise ValueError(f"{path}: refused: {reason}") from None
  if not isinstance(checkpoint, dict):
    raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors")
  state = convert.unwrap(checkpoint)
  strange = [name for name, value in state.items() if not torch.is_tensor(value)]
  if strange:
    kind = type(state[strange[0]]).__name__
    raise ValueError(f"{path}: {strange[0]!r} is a {kind}, not a tensor")
  return {name: _to_numpy(tensor) for name, tensor in state.items()}


def _to_numpy(tensor):
  return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def is_ours(path: str) -> bool:
  """Whether `vitcompact.convert.save` wrote a file. What went --to-torch says which model it is of
  too, but has PyTorch's names."""
  path = pathlib.Path(path)
  if path.suffix != ".safetensors" or not path.is_file():
    return False
  arrays, about = convert.read_safetensors(path)
  return "fields" in about and any(name.startswith("params/") for name in arrays)


def from_checkpoint(checkpoint, name, out, *, reset_head=False, force=False, **fields):
  """Writes `out`, returns lines that tell what was done. name: None for a file of ours."""
  source = None
  if name is None:
    source, variables = convert.load(checkpoint)
    state, name = vc.to_torch(source, variables), source.variant
    model = convert.altered(source, **fields)
  else:
    state, model = read_checkpoint(checkpoint), vc.create_model(name, **fields)
  loaded = convert.read_state_dict(model, state, reset_head=reset_head, source=source)
  convert.save(out, model, loaded.variables, force=force)
  lines = [f"{out}: {name}, {trees.size(loaded.variables['params']):,} parameters"]
  for what, names in (("dropped", loaded.dropped), ("resized", loaded.resized),
                      ("initialised anew", loaded.reset)):
    lines += [f"{what}: {', '.join(names)}"] if names else []
  return lines


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
  parser.add_argument("--image-size", type=int, help="positions are resized to it")
  parser.add_argument("--patch-size", type=int, help="patches are embedded by a resized kernel")
  parser.add_argument("--num-classes", type=int, help="0: features, without a classifier")
  parser.add_argument("--reset-head", action="store_true", help="initialise the classifier anew")
  parser.add_argument("--to-torch", action="store_true", help="from our file to PyTorch's names")
  parser.add_argument("--names", choices=("timm", "authors"), default="timm")
  parser.add_argument("--force", action="store_true", help="overwrite")
  args = parser.parse_args()
  fields = {key: value for key in ("image_size", "patch_size", "num_classes")
            if (value := getattr(args, key)) is not None}
  try:
    if args.to_torch:
      lines = to_torch(args.checkpoint, args.out, names=args.names, force=args.force)
    elif (ours := is_ours(args.checkpoint)) and args.model:
      raise ValueError(f"{args.checkpoint} says which model it is of; leave --model out")
    elif not ours and args.model is None:
      raise ValueError("--model is missing, as in --model deit_small_patch16_224; known: "
                       f"{', '.join(vc.list_models())}")
    else:
      lines = from_checkpoint(args.checkpoint, args.model, args.out, reset_head=args.reset_head,
                              force=args.force, **fields)
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from None
  print("\n".join(lines))


if __name__ == "__main__":
  main()
