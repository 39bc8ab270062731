"""Files of PyTorch weights: read safely, converted to our files, and written back.

.safetensors files are read as they are; .pth, .pt, .bin and .tar through torch, which has to be
installed, as weights only: a file that would run code is refused.
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
  """Whether `vc.save` wrote a file. What `to_torch` wrote says which model it is of too, but has
  PyTorch's names."""
  path = pathlib.Path(path)
  if path.suffix != ".safetensors" or not path.is_file():
    return False
  arrays, about = convert.read_safetensors(path)
  return "fields" in about and any(name.startswith("params/") for name in arrays)


def from_checkpoint(checkpoint, name: str | None, out, *, reset_head: bool = False,
                    force: bool = False, **fields) -> list[str]:
  """Writes the model of a checkpoint to `out`; returns lines that tell what was done.

  name: of the model that PyTorch's weights are of; None for a file that `vc.save` wrote, which says
    so itself. fields: as in `vc.create_model`, such as image_size=384.
  """
  if (ours := is_ours(checkpoint)) and name is not None:
    raise ValueError(f"{checkpoint} says which model it is of; leave --model out")
  if not ours and name is None:
    raise ValueError("--model is missing, as in --model deit_small_patch16_224; known: "
                     f"{', '.join(vc.list_models())}")
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


def to_torch(checkpoint, out, *, names: str = "timm", force: bool = False) -> list[str]:
  """Writes the PyTorch state dict of one of our files; returns lines that tell what was done."""
  model, variables = convert.load(checkpoint)
  state = vc.to_torch(model, variables, names=names)
  convert.write_safetensors(out, state, convert.metadata(model), force=force)
  return [f"{out}: {model.variant}, {len(state)} tensors"]
