"""A page of one file that runs ONNX files on the reader's own images, in any browser, offline.

What it needs is inside: ONNX Runtime's WebAssembly, the models, and a script that prepares images
as `Preprocess` does (page.html). Nothing it is given leaves the browser.
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
VERSION = "1.30.0"   # of onnxruntime-web, the one that is tested
GET = f"npm install onnxruntime-web@{VERSION} puts it in node_modules/onnxruntime-web/dist"
SCRIPT, WEBASSEMBLY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
# Bytes in one element, a multiple of 3. Chromium's parser takes minutes over an element of 100 MB.
PIECE = 3 << 16
# Pillow's filters that page.html has.
INTERPOLATIONS = ("box", "bilinear", "hamming", "bicubic", "lanczos")


def write(path, models: Mapping[str, str | os.PathLike], runtime, *, force: bool = False):
  """Writes a page that compares models, given as {label: ONNX file that `vc.export` wrote}.

  runtime: the folder dist of the npm package onnxruntime-web. Images are classified by every model,
  and their times are compared with the first one's. Where a model was exported with its tokens, the
  page shows which patches survived.
  """
  path = pathlib.Path(path)
  if path.suffix != ".html":
    raise ValueError(f"{path}: must end in .html")
  if path.exists() and not force:
    raise ValueError(f"{path} exists; give another name, or ask to overwrite it with force")
  if not models:
    raise ValueError("models={}: a page needs one at least, as {label: ONNX file}")
  files = {file: _of_runtime(pathlib.Path(runtime), name)
           for file, name in (("script", SCRIPT), ("webassembly", WEBASSEMBLY))}
  told = []
  for label, file in models.items():
    content = _read(pathlib.Path(file))
    told.append({"label": label, "bytes": len(content), **_told(file, content)})
    files[f"model-{len(told) - 1}"] = content
  values = {"TITLE": html.escape(" and ".join(models)), "MODELS": _json(told),
            "FILES": "".join(map(_elements, files, files.values()))}
  text = re.sub("@(TITLE|MODELS|FILES)@", lambda found: values[found[1]],
                TEMPLATE.read_text(encoding="utf-8"))
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  try:
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error.strerror}; make room, or name another place"
                  ) from error
  finally:
    partial.unlink(missing_ok=True)


def _of_runtime(folder: pathlib.Path, name: str) -> bytes:
  try:
    return (folder / name).read_bytes()
  except OSError as error:
    raise ValueError(f"runtime={str(folder)!r} must be the folder dist of onnxruntime-web, whose "
                     f"{name} cannot be read here: {error.strerror}; {GET}") from None


def _read(file: pathlib.Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise ValueError(f"{file} cannot be read: {error.strerror}; name a file that vc.export wrote"
                     ) from None


def _told(file, content: bytes) -> dict:
  """What the page's script must know of a model, from its file's metadata."""
  try:
    import onnx
  except ImportError:
    raise ValueError(f"ONNX files need onnx, which is not installed; {EXTRA}") from None
  try:
    model = onnx.load_model_from_string(content)
  except Exception:   # protobuf's own, of a package that onnx brings
    raise ValueError(f"{file} is no ONNX file; name one that vc.export wrote") from None
  about = {entry.key: entry.value for entry in model.metadata_props}
  outputs = [output.name for output in model.graph.output]
  if not {"preprocess", "input"} <= about.keys() or OUTPUT not in outputs:
    raise ValueError(f"{file} does not tell how images are prepared for it: its metadata has "
                     f"{sorted(about)}; make the file with vc.export")
  preprocess = json.loads(about["preprocess"])
  if preprocess["interpolation"] not in INTERPOLATIONS:
    raise ValueError(f"{file} asks for interpolation={preprocess['interpolation']!r}, and the page "
                     f"has {', '.join(INTERPOLATIONS)}; export it with one of these")
  image = next(value for value in model.graph.input if value.name == INPUT)
  batch = image.type.tensor_type.shape.dim[0]
  if batch.HasField("dim_value") and batch.dim_value != 1:
    raise ValueError(f"{file} takes {batch.dim_value} images at a time, and the page gives one; "
                     "export it with any number, or with 1")
  return {"preprocess": preprocess, "input": about["input"],
          "classes": json.loads(about.get("classes", "null")),
          "grid": json.loads(about["grid"]) if KEPT in outputs else None}


def _json(value) -> str:
  """For a script element, which "</script>" would end."""
  return json.dumps(value).replace("<", "\\u003c")


def _elements(file: str, content: bytes) -> str:
  packed = gzip.compress(content, 1, mtime=0)   # weights hardly get smaller with more effort
  pieces = (base64.b64encode(packed[i:i + PIECE]).decode() for i in range(0, len(packed), PIECE))
  return "".join(f'<script type="text/plain" data-file="{file}">{piece}</script>\n'
                 for piece in pieces)
