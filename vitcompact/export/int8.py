"""ONNX with 8-bit matrices: weights quantised per channel, activations by calibrated ranges.

ONNX Runtime's own tool quantises the products with weights; softmax, norms, GELU and the products
of attention stay in float32. `python -m experiments.int8` measures what each kind of product loses,
`python -m experiments.int8 quantisers` compares NNCF.
"""
import pathlib

import numpy as np

from vitcompact.export.program import INPUT, Program
from vitcompact.runtimes import EXTRA

BATCH = 8


def write(path: pathlib.Path, program: Program, images, names=None, outputs: bool = False):
  """Quantises the ONNX file at a path in place, calibrated on images of `program.normalised`.

  names: the nodes to quantise; None: all of `products_with_weights`. outputs: whether to quantise
  the results of matrix products as well. That changes logits more and is slower, as a bias follows.
  """
  import logging

  try:
    from onnxruntime import quantization
  except ImportError as error:
    raise ValueError(f"int8 needs {error.name}, which is not installed; {EXTRA}") from None
  if program.pixels:   # the file takes pixels: undo the normalisation
    images = np.rint(255 * program.preprocess.pixels(images)).astype(np.uint8)
  found = products_with_weights(path)
  names = found if names is None else names
  if not names:
    raise ValueError("int8: the file has no product with weights to quantise")
  quantised = path.with_suffix(".int8.onnx")
  log = logging.getLogger()
  level = log.level
  log.setLevel(logging.ERROR)   # hides the advice to pre-process the model, which is done already
  try:
    quantization.quantize_static(
        path, quantised, Images(images, program.batch),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True, nodes_to_quantize=names, activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax, extra_options={
            "OpTypesToExcludeOutputQuantization": [] if outputs else ["MatMul", "Gemm"]})
  finally:
    log.setLevel(level)
  quantised.replace(path)


def products_with_weights(path) -> list[str]:
  """Names of the MatMul, Gemm and Conv nodes with a weight as input. Nodes without a name are given
  one, in the file."""
  import onnx

  model = onnx.load(path)
  weights = {tensor.name for tensor in model.graph.initializer}
  for i, node in enumerate(model.graph.node):
    node.name = node.name or f"{node.op_type}_{i}"
  onnx.save(model, path)
  return [node.name for node in model.graph.node
          if node.op_type in ("MatMul", "Gemm", "Conv") and weights & set(node.input)]


class Images:
  """Batches of one size, with the interface that ONNX Runtime's calibration asks for. A last batch
  that is not full repeats its images."""

  def __init__(self, images, batch: int | None):
    size = batch or BATCH
    self.batches = (np.resize(images[i:i + size], (size, *images.shape[1:]))
                    for i in range(0, len(images), size))

  def get_next(self):
    batch = next(self.batches, None)
    return None if batch is None else {INPUT: batch}
