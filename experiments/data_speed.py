"""Times the production of training images, compared with a bare loop and by worker processes.

  python -m experiments.data_speed
  python -m experiments.data_speed --name arrayrecord:OUT --augment randaugment --rounds 9

Without --name, 96 noisy JPEG images of 500 x 375 are written to a temporary folder. The bare loop
opens a file, decodes, crops, resizes and flips it with Pillow, with the same random draws as our
pipeline; rounds of both alternate in this process, and the ratio is that of their CPU times. The
bare loop reads files, so this needs --name=folder:PATH or no --name.

For 1, 2, ... worker processes it prints images per second of wall time, and CPU time per image of
the workers and of the process that consumes the batches. If neither CPU time grows, 2 workers on
idle cores are twice as fast as 1.
"""
import argparse
import pathlib
import statistics
import tempfile
import time

import ml_collections
import numpy as np
import psutil
from PIL import Image, ImageOps

from vitcompact.data import augment, pipeline
from vitcompact.data.folder import Folder

BATCH = 32


def write_images(root: pathlib.Path, count: int = 96) -> str:
  rng = np.random.default_rng(0)
  for split, n in (("train", count), ("val", 1)):
    (root / split / "a").mkdir(parents=True)
    for i in range(n):
      coarse = Image.fromarray(rng.integers(0, 255, (47, 63, 3), dtype=np.uint8))
      pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
      noisy = np.clip(pixels + rng.integers(-12, 12, pixels.shape), 0, 255).astype(np.uint8)
      Image.fromarray(noisy).save(root / split / "a" / f"{i}.jpg", quality=90)
  return f"folder:{root}"


def config(name: str, augmentation: str, workers: int):
  return ml_collections.ConfigDict({
      "name": name, "augment": augmentation, "workers": workers, "replicas": 1, "repeats": 1,
      "on_bad": "stop", "max_bad": 0})


def bare_loop(images: Folder, order, step: int, size: int) -> None:
  """Makes a batch with Pillow's calls only, and with the same random draws as ours."""
  for row in range(BATCH):
    place = order.place(step, row)
    rng = order.generator(place)
    with Image.open(images.path(place.index)) as image:
      image = image.convert("RGB")
    image = image.crop(augment.crop_box(*image.size, rng)).resize((size, size), augment.BICUBIC)
    if rng.random() < 0.5:
      image = ImageOps.mirror(image)
    np.asarray(image)


def against_bare(name: str, size: int, rounds: int, batches: int = 3) -> str:
  """Returns a line with the CPU time of the bare loop over ours, the median of alternating rounds.
  """
  stream = pipeline.train_batches(config(name, "flip_crop", 0), image_size=size, batch_size=BATCH,
                                  seed=0)
  order = pipeline.train_order(config(name, "flip_crop", 0), BATCH, seed=0)
  images = Folder(name.partition(":")[2], "train")

  def seconds(make, steps) -> float:
    start = time.process_time()
    for step in steps:
      make(step)
    return (time.process_time() - start) / len(steps) / BATCH

  pairs = []
  for i in range(-1, rounds):  # the first warms up
    steps = range((i + 1) * batches, (i + 2) * batches)
    ours, bare = stream.dataset.__getitem__, lambda s: bare_loop(images, order, s, size)
    both = {f: seconds(f, steps) for f in ((ours, bare), (bare, ours))[i % 2]}
    if i >= 0:
      pairs.append((both[bare], both[ours]))
  ratios = [bare / ours for bare, ours in pairs]
  return (f"bare loop {1e3 * statistics.median(p[0] for p in pairs):.3f} ms per image, "
          f"ours {1e3 * statistics.median(p[1] for p in pairs):.3f} ms: "
          f"{statistics.median(ratios):.3f}x its speed ({min(ratios):.3f} to {max(ratios):.3f})")


def with_workers(name: str, augmentation: str, size: int, workers: int, batches: int = 24) -> str:
  """Returns a line with images per second of wall time, and where the CPU time goes."""
  stream = pipeline.train_batches(config(name, augmentation, workers), image_size=size,
                                  batch_size=BATCH, seed=0)
  this = psutil.Process()

  def cpu_seconds():
    """Returns the CPU seconds of this process and of its children."""
    seconds = [p.cpu_times().user + p.cpu_times().system
               for p in (this, *this.children(recursive=True))]
    return np.array([seconds[0], sum(seconds[1:])])

  for _ in range(4 * workers):  # until the workers have started and filled their buffers
    next(stream)
  start, before = time.perf_counter(), cpu_seconds()
  for _ in range(batches):
    next(stream)
  elapsed = time.perf_counter() - start
  consumer, producers = 1e3 * (cpu_seconds() - before) / batches / BATCH
  stream.close()
  return (f"{workers} workers: {batches * BATCH / elapsed:.0f} images per second; CPU time per "
          f"image: workers {producers:.3f} ms, consuming process {consumer:.3f} ms")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--name", help="a data set, as in config.data.name")
  parser.add_argument("--augment", default="flip_crop", help="for the workers")
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    name = args.name or write_images(pathlib.Path(folder))
    if name.startswith("folder:") and args.rounds:
      print(against_bare(name, args.size, args.rounds), flush=True)
    for workers in args.workers:
      print(with_workers(name, args.augment, args.size, workers), flush=True)


if __name__ == "__main__":
  main()
