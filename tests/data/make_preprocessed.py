"""Writes tests/data/references/preprocessed.npz: unusual files, and what timm's evaluation
transform makes of them.

  python tests/data/make_preprocessed.py     # with a Python that has torch, timm and torchvision

"file/NAME" holds the bytes of a file; "NAME/MODE/CROP/INTERPOLATION/HEIGHTxWIDTH" holds the uint8
pixels, before normalisation, that timm's transform gives for the image that timm's loader opens.
MEAN is also the colour used by "border".
"""
import io
import itertools
import pathlib
import tempfile

import numpy as np
import torch
from PIL import Image

# Schemas that torchvision's compiled part would declare: enough to import it with a CPU torch.
_SCHEMAS = torch.library.Library("torchvision", "DEF")
_SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.data import ImageDataset, create_transform, resolve_data_config  # noqa: E402
from timm.data.readers import add_img_extensions  # noqa: E402

OUT = pathlib.Path(__file__).parent / "references" / "preprocessed.npz"
MEAN = (0.485, 0.456, 0.406)
PLAIN = ("center", 0.9, "bicubic", (16, 16))
EVERY = tuple(itertools.product(("center", "squash", "border"), (0.875, 0.9, 0.95, 1.0),
                                ("bicubic", "bilinear"), ((16, 16), (12, 20))))


def texture(width, height, channels, seed) -> np.ndarray:
  """Returns uint8 (height, width, channels): waves, some noise, and something at every edge."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  planes = []
  for _ in range(channels):
    (across, down), phase = rng.uniform(0.05, 0.6, (2, 3)), rng.uniform(0, 6, 3)
    waves = sum(np.sin(a * x + d * y + p) for a, d, p in zip(across, down, phase, strict=True))
    planes.append(128 + 38 * waves + rng.normal(0, 6, (height, width)))
  return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def image(mode, width, height, seed) -> Image.Image:
  if mode == "1":
    return image("L", width, height, seed).point(lambda value: 255 * (value > 128), "1")
  if mode == "P":
    return image("RGB", width, height, seed).quantize(64)
  if mode == "I;16":
    return Image.fromarray(texture(width, height, 1, seed)[..., 0].astype(np.uint16) * 256 + 77)
  channels = len(Image.new(mode, (1, 1)).getbands())
  return Image.frombytes(mode, (width, height), texture(width, height, channels, seed).tobytes())


def orientation_tag(orientation) -> Image.Exif:
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


def files():
  """Yields (name, image, save options)."""
  jpeg = {"quality": 90}
  for i in range(1, 9):
    yield f"exif{i}.jpg", image("RGB", 31, 23, i), {"exif": orientation_tag(i), **jpeg}
  for kind in ("png", "tif", "webp"):
    yield f"exif6.{kind}", image("RGB", 31, 23, 9), {"exif": orientation_tag(6)}
  yield "progressive.jpg", image("RGB", 41, 30, 10), {"progressive": True, **jpeg}
  yield "grey.jpg", image("L", 41, 30, 11), jpeg
  yield "cmyk.jpg", image("CMYK", 41, 30, 12), jpeg   # Pillow writes it inverted, as Adobe does
  yield "cmyk.tif", image("CMYK", 41, 30, 13), {}
  yield "grey16.png", image("I;16", 41, 30, 14), {}
  yield "palette.png", image("P", 41, 30, 15), {}
  yield "palette_one_clear.png", image("P", 41, 30, 16), {"transparency": 3}
  yield "palette_half_clear.png", image("P", 41, 30, 17), {"transparency": bytes(range(0, 256, 4))}
  for i, mode in enumerate(("1", "L", "LA", "RGBA")):
    yield f"{mode}.png", image(mode, 30, 41, 20 + i), {}
  yield "ycbcr.tif", image("YCbCr", 41, 30, 30), {}
  yield "lzw.tif", image("RGB", 41, 30, 31), {"compression": "tiff_lzw"}
  yield "lossy.webp", image("RGB", 41, 30, 32), {"quality": 80}
  yield "alpha.webp", image("RGBA", 41, 30, 33), {"lossless": True}
  frames = [image("P", 41, 30, 34 + i) for i in range(2)]
  yield "frames.gif", frames[0], {"save_all": True, "append_images": frames[1:], "transparency": 5}
  for width, height in ((1, 1), (3, 5), (16, 16), (17, 16), (150, 9), (9, 150), (61, 47), (47, 61)):
    yield f"{width}x{height}.png", image("RGB", width, height, 40), {}


def main():
  add_img_extensions((".webp", ".tif", ".gif"))
  arrays = {}
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root) / "class"
    folder.mkdir()
    for name, picture, options in files():
      data = io.BytesIO()
      kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2])
      picture.save(data, kind, **options)
      (folder / name).write_bytes(data.getvalue())
      arrays[f"file/{name}"] = np.frombuffer(data.getvalue(), np.uint8)
    for setting in EVERY:
      mode, crop, interpolation, size = setting
      config = resolve_data_config(
          {"input_size": (3, *size), "crop_pct": crop, "crop_mode": mode, "mean": MEAN,
           "std": (1, 1, 1), "interpolation": interpolation}, pretrained_cfg={})
      dataset = ImageDataset(root, transform=create_transform(**config, is_training=False))
      for index, (path, _) in enumerate(dataset.reader.samples):
        name = pathlib.Path(path).name
        if setting == PLAIN or name in ("61x47.png", "47x61.png"):
          normalised = dataset[index][0].numpy().transpose(1, 2, 0)
          key = f"{name}/{mode}/{crop}/{interpolation}/{size[0]}x{size[1]}"
          arrays[key] = np.round((normalised + np.float32(MEAN)) * 255).astype(np.uint8)
  OUT.parent.mkdir(exist_ok=True)
  np.savez_compressed(OUT, **arrays)
  print(f"{OUT}: {len(arrays)} arrays, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
  main()
