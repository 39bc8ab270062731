"""ONNX files, made by jax2onnx."""
import contextlib
import logging
import pathlib
import re
import warnings
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from vitcompact.export.program import INPUT, PORTABLE, Program
from vitcompact.runtimes import EXTRA

OPSET = 20   # the first one with Gelu; every recent runtime reads it
MAX_BYTES = 2 ** 31 - 2 ** 20   # of weights: a protocol buffer's limit, less some for the graph


def write(program: Program, path: pathlib.Path):
  """Writes the program with its weights; OSError if the disk is full."""
  import onnx

  onnx.save(model_of(program), path)


def model_of(program: Program):
  """The `onnx.ModelProto` of a program, checked.

  Raises ValueError if a package is not installed, the weights are too large, or an operation has no
  equivalent in ONNX.
  """
  try:
    import jax2onnx
    import onnx

    from vitcompact.export import onnx_operators
  except ImportError as error:
    raise ValueError(f"ONNX files need {error.name}, which is not installed; {EXTRA}") from None
  size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(program.variables))
  if size > MAX_BYTES:
    raise ValueError(f"{program.model.variant} has {size / 1e9:.1f} GB of weights, and an ONNX "
                     f"file holds at most {MAX_BYTES / 1e9:.1f}: export it to .stablehlo")
  batch = "batch" if program.batch is None else program.batch
  run = program.on(PORTABLE, "plain")
  images = Images((batch, *program.image_shape), program.dtype)
  with warnings.catch_warnings(), errors_only("onnx_ir"), onnx_operators.translations():
    warnings.filterwarnings("ignore", message="Explicitly requested dtype")
    try:
      model = jax2onnx.to_onnx(lambda images: run(program.variables, images), [images],
                               model_name=program.model.variant, opset=OPSET,
                               input_names=[INPUT], output_names=program.outputs)
    except NotImplementedError as error:
      raise ValueError(_refusal(program, str(error))) from error
  transpose_weights(model.graph)
  for key, value in program.about().items():
    model.metadata_props.add(key=key, value=value)
  onnx.checker.check_model(model)
  return model


def transpose_weights(graph):
  """Stores transposed weights, such as the kernels of convolutions, in the layout in which they are
  used: quantisers find only weights that are used directly."""
  from onnx import numpy_helper

  weights = {tensor.name: tensor for tensor in graph.initializer}
  for node in [node for node in graph.node if node.op_type == "Transpose"]:
    if node.input[0] in weights:
      order = next(list(attribute.ints) for attribute in node.attribute
                   if attribute.name == "perm")
      array = numpy_helper.to_array(weights[node.input[0]]).transpose(order)
      graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array),
                                                       node.output[0]))
      graph.node.remove(node)
  used = {name for node in graph.node for name in node.input}
  for tensor in weights.values():
    if tensor.name not in used:
      graph.initializer.remove(tensor)


class Images(NamedTuple):
  """The shape of a batch, whose first dimension may be a name, and its dtype."""
  shape: tuple
  dtype: np.dtype


@contextlib.contextmanager
def errors_only(name: str):
  """A context in which the logger `name` logs only errors."""
  log = logging.getLogger(name)
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    yield
  finally:
    log.setLevel(level)


def _refusal(program: Program, message: str) -> str:
  """An error text that names the operation without an ONNX equivalent and the block that uses it.
  """
  named = re.search(r"primitive '(\S+?)'", message)
  if named is None:
    return f"ONNX: {message}; export to .stablehlo, which runs wherever JAX does"
  images = jax.ShapeDtypeStruct((program.batch or 1, *program.image_shape), program.dtype)
  traced = jax.make_jaxpr(program.on(PORTABLE, "plain"))(program.variables, images)
  # The path of the module, without the model itself.
  paths = [path.partition("/")[2] for path in _modules_using(traced.jaxpr, named[1]) if "/" in path]
  return (f"ONNX has no {named[1]!r}, which {paths[0] if paths else program.model.variant} needs: "
          "export to .stablehlo, which runs wherever JAX does, or make that block dense")


def _modules_using(jaxpr, primitive: str, path: str = ""):
  """Yields the paths of the modules that use a primitive."""
  for eqn in jaxpr.eqns:
    here = "/".join(filter(None, (path, str(eqn.source_info.name_stack))))
    if eqn.primitive.name == primitive:
      yield here
    for inner in jaxprs_in_params(eqn.params):
      yield from _modules_using(inner, primitive, here)
