"""ONNX with matrices of 8 bits: weights by channel, activations by ranges seen on images.

Products with weights are quantised, by ONNX Runtime's own tool; softmax, norms, GELU and the
products of attention keep float32. `python -m experiments.int8` measures what each kind of product
loses, `python -m experiments.int8 quantisers` what NNCF does instead.
"""
import pathlib

import numpy as np

from vitcompact.export.program import INPUT, Program
from vitcompact.runtimes import EXTRA

BATCH = 8


def write(path: pathlib.Path, program: Program, images, names=None, outputs: bool = False):
  """Quantises the ONNX file at a path in place, calibrated on images of `program.normalised`.

  names: of the nodes; None: all of `products_with_weights`. outputs: whether the results of matrix
  products are quantised as well: logits change more, and it is slower, as a bias is added next.
  """
  import logging

  try:
    from onnxruntime import quantization
  except ImportError as error:
    raise ValueError(f"int8 needs {error.name}, which is not installed; {EXTRA}") from None
  if program.pixels:   # the file takes what these images were normalised from
    images = np.rint(255 * program.preprocess.pixels(images)).astype(np.uint8)
  found = products_with_weights(path)
  names = found if names is None else names
  if not names:
    raise ValueError("int8: the file has no product with weights to quantise")
  done = path.with_suffix(".int8.onnx")
  log = logging.getLogger()
  level = log.level
  log.setLevel(logging.ERROR)   # it advises a pre-processing that has been done
  try:
    quantization.quantize_static(
        path, done, Images(images, program.batch), quant_format=quantization.QuantFormat.QDQ,
        per_channel=True, nodes_to_quantize=names, activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax, extra_options={
            "OpTypesToExcludeOutputQuantization": [] if outputs else ["MatMul", "Gemm"]})
  finally:
    log.setLevel(level)
  done.replace(path)


def products_with_weights(path) -> list[str]:
  """Names of the MatMul and Conv nodes of which one factor is a weight. Named first, where they are
  not."""
  import onnx

  model = onnx.load(path)
  weights = {tensor.name for tensor in model.graph.initializer}
  for i, node in enumerate(model.graph.node):
    node.name = node.name or f"{node.op_type}_{i}"
  onnx.save(model, path)
  return [node.name for node in model.graph.node
          if node.op_type in ("MatMul", "Gemm", "Conv") and weights & set(node.input)]


class Images:
  """Batches of one size, as ONNX Runtime's calibration asks for them; images of the last one come
  again where it is not full."""

  def __init__(self, images, batch: int | None):
    size = batch or BATCH
    self.batches = (np.resize(images[i:i + size], (size, *images.shape[1:]))
                    for i in range(0, len(images), size))

  def get_next(self):
    batch = next(self.batches, None)
    return None if batch is None else {INPUT: batch}
