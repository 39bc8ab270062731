"""A self-contained HTML page that runs ONNX files on the reader's own images, in any browser.

It works offline: it contains ONNX Runtime's WebAssembly, the models, and a script that prepares
images as `Preprocess` does (page.html). The reader's images never leave the browser.
"""
import base64
import gzip
import html
import json
import os
import pathlib
import re
from collections.abc import Mapping

from vitcompact.export.program import INPUT, KEPT, OUTPUT
from vitcompact.runtimes import EXTRA

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
VERSION = "1.30.0"   # the tested version of onnxruntime-web
GET = f"npm install onnxruntime-web@{VERSION} puts it in node_modules/onnxruntime-web/dist"
SCRIPT, WEBASSEMBLY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
# Bytes per element, a multiple of 3. Chromium's parser takes minutes for an element of 100 MB.
PIECE = 3 << 16
# The filters of Pillow that page.html implements.
INTERPOLATIONS = ("box", "bilinear", "hamming", "bicubic", "lanczos")


def write(path, models: Mapping[str, str | os.PathLike], runtime, *, force: bool = False):
  """Writes a page that compares models, given as {label: ONNX file that `vc.export` wrote}.

  Every model classifies the reader's images, and the page compares its time with the first model's.
  It shows which patches survived if a model was exported with tokens=True.

  runtime: the folder dist of the npm package onnxruntime-web.
  """
  path = pathlib.Path(path)
  if path.suffix != ".html":
    raise ValueError(f"{path}: must end in .html")
  if path.exists() and not force:
    raise ValueError(f"{path} exists; give another name, or overwrite it with force")
  if not models:
    raise ValueError("models={}: must have at least one, as {label: ONNX file}")
  files = {file: _runtime_file(pathlib.Path(runtime), name)
           for file, name in (("script", SCRIPT), ("webassembly", WEBASSEMBLY))}
  facts = []
  for label, file in models.items():
    content = _read(pathlib.Path(file))
    facts.append({"label": label, "bytes": len(content), **_model_facts(file, content)})
    files[f"model-{len(facts) - 1}"] = content
  values = {"TITLE": html.escape(" and ".join(models)), "MODELS": _json(facts),
            "FILES": "".join(map(_elements, files, files.values()))}
  text = re.sub("@(TITLE|MODELS|FILES)@", lambda found: values[found[1]],
                TEMPLATE.read_text(encoding="utf-8"))
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  try:
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error.strerror}; free some space, or give another "
                  "path") from error
  finally:
    partial.unlink(missing_ok=True)


def _runtime_file(folder: pathlib.Path, name: str) -> bytes:
  try:
    return (folder / name).read_bytes()
  except OSError as error:
    raise ValueError(f"runtime={str(folder)!r} must be the folder dist of onnxruntime-web, but its "
                     f"{name} cannot be read: {error.strerror}; {GET}") from None


def _read(file: pathlib.Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise ValueError(f"{file} cannot be read: {error.strerror}; give a file that vc.export wrote"
                     ) from None


def _model_facts(file, content: bytes) -> dict:
  """What the page's script needs to know about a model, from its file's metadata."""
  try:
    import onnx
  except ImportError:
    raise ValueError(f"ONNX files need onnx, which is not installed; {EXTRA}") from None
  try:
    model = onnx.load_model_from_string(content)
  except Exception:   # protobuf's own, from a package that comes with onnx
    raise ValueError(f"{file} is not an ONNX file; give one that vc.export wrote") from None
  about = {entry.key: entry.value for entry in model.metadata_props}
  outputs = [output.name for output in model.graph.output]
  if not {"preprocess", "input"} <= about.keys() or OUTPUT not in outputs:
    raise ValueError(f"{file} does not say how its images are prepared: its metadata has "
                     f"{sorted(about)}; write the file with vc.export")
  preprocess = json.loads(about["preprocess"])
  if preprocess["interpolation"] not in INTERPOLATIONS:
    raise ValueError(f"{file} needs interpolation={preprocess['interpolation']!r}, and the page "
                     f"has only {', '.join(INTERPOLATIONS)}; export it with one of these")
  image = next(value for value in model.graph.input if value.name == INPUT)
  batch = image.type.tensor_type.shape.dim[0]
  if batch.HasField("dim_value") and batch.dim_value != 1:
    raise ValueError(f"{file} has batch={batch.dim_value}, and the page classifies one image at a "
                     "time; export it with batch=None or batch=1")
  return {"preprocess": preprocess, "input": about["input"],
          "classes": json.loads(about.get("classes", "null")),
          "grid": json.loads(about["grid"]) if KEPT in outputs else None}


def _json(value) -> str:
  """JSON for a script element, with "<" escaped, as "</script>" would end the element."""
  return json.dumps(value).replace("<", "\\u003c")


def _elements(file: str, content: bytes) -> str:
  packed = gzip.compress(content, 1, mtime=0)   # a higher level hardly makes weights smaller
  pieces = (base64.b64encode(packed[i:i + PIECE]).decode() for i in range(0, len(packed), PIECE))
  return "".join(f'<script type="text/plain" data-file="{file}">{piece}</script>\n'
                 for piece in pieces)
