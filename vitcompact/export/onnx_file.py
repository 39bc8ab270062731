"""ONNX files, made by jax2onnx."""
import logging
import pathlib
import warnings

import numpy as np

from vitcompact.export.program import INPUT, PORTABLE, Program

SUFFIX = ".onnx"
OPSET = 20   # Gelu came with it; every runtime of the last years reads it
EXTRA = "pip install 'vitcompact[export]'"


def write(program: Program, path: pathlib.Path):
  """Writes the program with its weights; OSError where there is no room."""
  import onnx

  onnx.save(model_of(program), path)


def model_of(program: Program):
  """The `onnx.ModelProto` of a program, checked."""
  try:
    import jax2onnx
    import onnx

    from vitcompact.export import onnx_operators
  except ImportError as error:
    raise ValueError(f"ONNX files need {error.name}, which is not installed; {EXTRA}") from None
  height, width, channels = program.image_shape
  batch = "batch" if program.batch is None else program.batch
  run = program.on(PORTABLE, "plain")
  spec = shape_of((batch, height, width, channels), program.dtype)
  with warnings.catch_warnings(), quiet("onnx_ir"), onnx_operators.known():
    warnings.filterwarnings("ignore", message="Explicitly requested dtype")
    model = jax2onnx.to_onnx(lambda images: run(program.variables, images), [spec],
                             model_name=program.model.variant, opset=OPSET, input_names=[INPUT],
                             output_names=program.outputs)
  for key, value in program.about().items():
    model.metadata_props.add(key=key, value=value)
  onnx.checker.check_model(model)
  return model


class shape_of:
  """The shape and dtype of an array, some of whose axes are names."""

  def __init__(self, shape, dtype):
    self.shape, self.dtype = shape, np.dtype(dtype)


class quiet:
  """A context in which a library's log keeps its warnings."""

  def __init__(self, name: str):
    self.log = logging.getLogger(name)

  def __enter__(self):
    self.level = self.log.level
    self.log.setLevel(logging.ERROR)

  def __exit__(self, *_):
    self.log.setLevel(self.level)
