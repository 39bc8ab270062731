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

OPSET = 20   # Gelu came with it; every runtime of the last years reads it
MOST = 2 ** 31 - 2 ** 20   # bytes: a protocol buffer's limit, and room for the graph


def write(program: Program, path: pathlib.Path):
  """Writes the program with its weights; OSError where there is no room."""
  import onnx

  onnx.save(model_of(program), path)


def model_of(program: Program):
  """The `onnx.ModelProto` of a program, checked.

  Raises ValueError, one line, where something is not installed, is too large, or has no form in
  ONNX.
  """
  try:
    import jax2onnx
    import onnx

    from vitcompact.export import onnx_operators
  except ImportError as error:
    raise ValueError(f"ONNX files need {error.name}, which is not installed; {EXTRA}") from None
  if (size := sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(program.variables))) > MOST:
    raise ValueError(f"{program.model.variant} has {size / 1e9:.1f} GB of weights, and an ONNX "
                     f"file holds {MOST / 1e9:.1f}: export it to .stablehlo")
  batch = "batch" if program.batch is None else program.batch
  run = program.on(PORTABLE, "plain")
  images = Images((batch, *program.image_shape), program.dtype)
  with warnings.catch_warnings(), quiet("onnx_ir"), onnx_operators.known():
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
  """Kernels of convolutions as they are used: quantisers look for weights, not for what is made of
  them."""
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
  """The shape of a batch, whose number may be a name, and its dtype."""
  shape: tuple
  dtype: np.dtype


@contextlib.contextmanager
def quiet(name: str):
  """A context in which a library's log tells errors alone."""
  log = logging.getLogger(name)
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    yield
  finally:
    log.setLevel(level)


def _refusal(program: Program, said: str) -> str:
  """What has no form in ONNX, and which block needs it."""
  named = re.search(r"primitive '(\S+?)'", said)
  if named is None:
    return f"ONNX: {said}; export to .stablehlo, which runs wherever JAX does"
  images = jax.ShapeDtypeStruct((program.batch or 1, *program.image_shape), program.dtype)
  traced = jax.make_jaxpr(program.on(PORTABLE, "plain"))(program.variables, images)
  # The path of modules, without the model itself.
  where = [path.partition("/")[2] for path in _users(traced.jaxpr, named[1]) if "/" in path]
  return (f"ONNX has no {named[1]!r}, which {where[0] if where else program.model.variant} needs: "
          "export to .stablehlo, which runs wherever JAX does, or make that block dense")


def _users(jaxpr, primitive: str, path: str = ""):
  """Paths of the modules that a primitive is used in."""
  for eqn in jaxpr.eqns:
    here = "/".join(filter(None, (path, str(eqn.source_info.name_stack))))
    if eqn.primitive.name == primitive:
      yield here
    for inner in jaxprs_in_params(eqn.params):
      yield from _users(inner, primitive, here)
