"""The server in examples/ answers as the library does, without the library and without JAX."""
import ast
import io
import json
import pathlib
import subprocess
import sys
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from tests import tiny

onnx = pytest.importorskip("onnx")
pytest.importorskip("jax2onnx")
pytest.importorskip("onnxruntime")

from vitcompact.export import onnx_file  # noqa: E402
from vitcompact.export.program import Program  # noqa: E402

SCRIPT = pathlib.Path(__file__).parents[2] / "examples/serve.py"
CLASSES = [f"class «{i}»" for i in range(7)]


@pytest.fixture(scope="module")
def program():
  model = tiny.deit(width=48, image_size=64, num_classes=7)
  return Program(model, tiny.init(model, spread=0.1), tiny.preprocess(64, 0.875), classes=CLASSES)


@pytest.fixture(scope="module")
def file(program, tmp_path_factory):
  path = tmp_path_factory.mktemp("onnx") / "model.onnx"
  onnx_file.write(program, path)
  return path


@pytest.fixture(scope="module")
def served(file):
  """The address of a running server."""
  process = subprocess.Popen([sys.executable, SCRIPT, file, "0"], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.DEVNULL)
  yield process.stdout.readline().strip()
  process.terminate()
  process.wait()
  process.stdout.close()


def post(address, content: bytes):
  with urllib.request.urlopen(urllib.request.Request(address, content), timeout=60) as answer:
    return json.load(answer)


def test_answers_on_photographs_are_those_of_the_library(served, program):
  photographs = {}
  for name in ("china.jpg", "flower.jpg"):
    out = io.BytesIO()
    Image.fromarray(load_sample_image(name)).save(out, "jpeg", quality=95)
    photographs[name] = out.getvalue()
  images = np.stack([program.preprocess(Image.open(io.BytesIO(content)))
                     for content in photographs.values()])
  expected = np.asarray(jax.nn.softmax(program.logits(images)))
  for content, chances in zip(photographs.values(), expected, strict=True):
    answer = post(served, content)
    order = (-chances).argsort()[:5]
    assert [row["index"] for row in answer] == order.tolist()
    assert [row["name"] for row in answer] == [CLASSES[k] for k in order]
    np.testing.assert_allclose([row["probability"] for row in answer], chances[order], rtol=0,
                               atol=1e-5)
  assert np.abs(expected[0] - expected[1]).max() > 1e-3, "the model must tell the photographs apart"


def test_a_request_without_an_image_is_refused_with_a_reason(served):
  with pytest.raises(urllib.error.HTTPError, match="400") as caught:
    post(served, b"text")
  assert "must be an image" in json.load(caught.value)["error"]


@pytest.mark.parametrize(("size", "fields"), [
    ((640, 425), {}), ((425, 640), {"interpolation": "bilinear"}), ((64, 64), {}),
    ((640, 427), {"image_size": (48, 64), "crop": 0.9}), ((32, 32), {"image_size": (32, 32)}),
    ((640, 427), {"mean": (0.5,), "std": (0.25,)}),
])
@pytest.mark.parametrize("pixels", [False, True])
def test_preprocessing_equals_the_librarys_to_the_last_bit(size, fields, pixels):
  preprocess = tiny.preprocess(**{"image_size": 64, "crop": 0.875, **fields})
  model = tiny.deit(image_size=preprocess.image_size, in_chans=len(preprocess.mean))
  program = Program(model, {}, preprocess, pixels=pixels)
  image = Image.fromarray(load_sample_image("china.jpg")).resize(size)
  space = {"__name__": "serve"}
  exec(compile(SCRIPT.read_text(), SCRIPT, "exec"), space)
  np.testing.assert_array_equal(space["prepare"](image, program.about())[0],
                                program.prepared(preprocess.resize(image)), strict=True)


def test_unknown_preprocessing_ends_the_server_at_once_in_one_line(file, tmp_path):
  model = onnx.load(file)
  about = {entry.key: entry.value for entry in model.metadata_props}
  about["preprocess"] = json.dumps({**json.loads(about["preprocess"]), "crop_mode": "squash"})
  onnx.helper.set_model_props(model, about)
  onnx.save(model, tmp_path / "model.onnx")
  done = subprocess.run([sys.executable, SCRIPT, tmp_path / "model.onnx", "0"], text=True,
                        capture_output=True, timeout=60)
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.count("\n") == 1 and "crop_mode='squash'" in done.stderr


def test_the_server_imports_neither_jax_nor_the_library():
  imported = {name.name for node in ast.walk(ast.parse(SCRIPT.read_text()))
              if isinstance(node, ast.Import) for name in node.names}
  imported |= {node.module for node in ast.walk(ast.parse(SCRIPT.read_text()))
               if isinstance(node, ast.ImportFrom)}
  assert imported - sys.stdlib_module_names == {"http.server", "numpy", "onnxruntime", "PIL"}
