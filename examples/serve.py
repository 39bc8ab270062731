"""Serves an ONNX file exported by vitcompact, with only Pillow, NumPy and ONNX Runtime.

python serve.py model.onnx 8000; then: curl --data-binary @cat.jpg http://127.0.0.1:8000
"""
import http.server
import io
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def prepare(image, about):
  """Preprocesses an image as in the model's evaluation: resize, centre crop, normalise."""
  how = json.loads(about["preprocess"])
  (height, width), crop, mean, std = (how[k] for k in ("image_size", "crop", "mean", "std"))
  if how["crop_mode"] != "center" or crop is None:
    sys.exit(f"{crop=}, crop_mode={how['crop_mode']!r}: this example only has centre crops; add "
             "yours here")
  image = image.convert("L" if len(mean) == 1 else "RGB")
  if image.size != (width, height) or max(image.size) > 32:   # others are used whole
    need_h, need_w = int(height / crop), int(width / crop)
    ratio = min(image.height / need_h, image.width / need_w)
    size = round(image.width / ratio), round(image.height / ratio)
    if need_h == need_w:   # then sizes are rounded down
      size = tuple(int(need_h * side / min(image.size)) for side in image.size)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.resize(size, Image.Resampling[how["interpolation"].upper()]).crop(
        (left, top, left + width, top + height))
  pixels = np.asarray(image).reshape(1, height, width, len(mean))
  return pixels if about["input"] == "pixels" else (
      (np.float32(pixels) / 255 - np.float32(mean)) / np.float32(std))


def classify(image):
  """Returns the five most probable classes."""
  logits = session.run(["logits"], {"images": prepare(image, about)})[0][0]
  probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
  return [{"index": int(k), "name": names[k] if names else str(k),
           "probability": float(probabilities[k])} for k in (-probabilities).argsort()[:5]]


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"] or 0))
    try:
      image = Image.open(io.BytesIO(body)).convert("RGB")
    except Exception as error:   # Pillow may raise anything for a damaged file
      status, answer = 400, {"error": f"the body must be an image: {error}"}
    else:
      status, answer = 200, classify(image)
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.end_headers()
    self.wfile.write(json.dumps(answer).encode())


if __name__ == "__main__":
  session = onnxruntime.InferenceSession(sys.argv[1])
  about = session.get_modelmeta().custom_metadata_map
  names = json.loads(about.get("classes", "null"))
  classify(Image.new("RGB", (64, 64)))   # fails at startup if the file is not supported
  server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
  print(f"http://127.0.0.1:{server.server_port}", flush=True)
  server.serve_forever()
