"""Files of weights: our .safetensors, or a .pth with PyTorch's names for timm and the authors."""
import pathlib

import jax
import numpy as np

from vitcompact import convert, pytorch
from vitcompact.export.program import Program
from vitcompact.runtimes import Runner


def write(program: Program, path: pathlib.Path):
  """Writes a file that `vc.load` reads."""
  convert.save(path, program.model, program.variables, classes=program.classes,
               preprocess=program.preprocess)


def write_torch(program: Program, path: pathlib.Path):
  """Writes a .pth: PyTorch's state dict, in which tensors of methods have our names."""
  pytorch.write_pickled(path, convert.to_torch(program.model, program.variables))


def read_torch(program: Program, path: pathlib.Path) -> Runner:
  """Runs the program with the weights of a .pth."""
  variables = convert.from_torch(program.model, pytorch.read_checkpoint(path))
  apply = jax.jit(program.model.apply)
  return Runner("XLA, of the weights read back", lambda images: apply(variables, images),
                program.about(), program.image_shape, np.dtype(np.float32))
