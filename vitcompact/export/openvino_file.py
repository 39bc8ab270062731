"""OpenVINO files: NAME.xml and NAME.bin, converted from an ONNX model."""
import pathlib
import tempfile

from vitcompact.export import onnx_file
from vitcompact.export.program import Program
from vitcompact.runtimes import EXTRA

ABOUT = "vitcompact"   # our section of the file's metadata


def write(program: Program, path: pathlib.Path, half: bool = False):
  """Writes the program; half: stores weights as float16. The device chooses how it computes."""
  try:
    import openvino
  except ImportError:
    raise ValueError(f"OpenVINO files need openvino, which is not installed; {EXTRA}") from None
  with tempfile.TemporaryDirectory() as folder:
    onnx_path = pathlib.Path(folder, "model.onnx")
    onnx_file.write(program, onnx_path)
    model = openvino.Core().read_model(onnx_path)
    for key, value in program.about().items():
      model.set_rt_info(value, [ABOUT, key])
    openvino.save_model(model, path, compress_to_fp16=half)
