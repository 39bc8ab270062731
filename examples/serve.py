"""Serves an ONNX file that vitcompact exported, with Pillow, NumPy and ONNX Runtime alone.

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
  """The image as in the model's evaluation: resized, its centre cut out, normalised."""
  how = json.loads(about["preprocess"])
  (height, width), crop, mean, std = (how[k] for k in ("image_size", "crop", "mean", "std"))
  if how["crop_mode"] != "center" or crop is None:
    sys.exit(f"{crop=}, crop_mode={how['crop_mode']!r}: this example cuts centres alone; add yours")
  image = image.convert("L" if len(mean) == 1 else "RGB")
  if image.size != (width, height) or max(image.size) > 32:   # such are left whole
    need_h, need_w = int(height / crop), int(width / crop)
    ratio = min(image.height / need_h, image.width / need_w)
    size = round(image.width / ratio), round(image.height / ratio)
    if need_h == need_w:   # rounded down
      size = tuple(int(need_h * side / min(image.size)) for side in image.size)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.resize(size, Image.Resampling[how["interpolation"].upper()]).crop(
        (left, top, left + width, top + height))
  pixels = np.asarray(image).reshape(1, height, width, len(mean))
  return pixels if about["input"] == "pixels" else (
      (np.float32(pixels) / 255 - np.float32(mean)) / np.float32(std))


def classify(image):
  """The five likeliest classes."""
  logits = session.run(["logits"], {"images": prepare(image, about)})[0][0]
  chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
  return [{"index": int(k), "name": names[k] if names else str(k),
           "probability": float(chances[k])} for k in (-chances).argsort()[:5]]


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"] or 0))
    try:
      image = Image.open(io.BytesIO(body)).convert("RGB")
    except Exception as error:   # there is no list of what a damaged file makes Pillow raise
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
  classify(Image.new("RGB", (64, 64)))   # what is not supported is said before anybody asks
  server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
  print(f"http://127.0.0.1:{server.server_port}", flush=True)
  server.serve_forever()
