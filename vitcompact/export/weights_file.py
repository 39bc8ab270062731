"""Weights alone: a .safetensors of ours, or under PyTorch's names for timm and the authors."""
import pathlib

import jax
import numpy as np

from vitcompact import convert, pytorch
from vitcompact.export.program import Program
from vitcompact.runtimes import Runner


def write(program: Program, path: pathlib.Path):
  """A file that `vc.load` reads."""
  convert.save(path, program.model, program.variables, classes=program.classes,
               preprocess=program.preprocess)


def write_torch(program: Program, path: pathlib.Path):
  """A .pth: PyTorch's state dict, with tensors of methods under names of ours."""
  pytorch.write_pickled(path, convert.to_torch(program.model, program.variables))


def read_torch(program: Program, path: pathlib.Path) -> Runner:
  """The program with the weights of a .pth."""
  variables = convert.from_torch(program.model, pytorch.read_checkpoint(path))
  apply = jax.jit(program.model.apply)
  return Runner("XLA, of the weights read back", lambda images: apply(variables, images),
                program.about(), program.image_shape, np.dtype(np.float32))
