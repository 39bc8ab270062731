"""Times the training pipeline on one core, compared with a plain loop over PIL."""
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import psutil
from PIL import Image

from configs import deit_s
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Candidate, Setting
from vitcompact.data import augment, pipeline

IMAGES, SIZE, BATCH = 96, (500, 375), 32   # SIZE: that of a typical ImageNet photograph
CODE = "import sys; from experiments.benchmarks import data; data.timed(*sys.argv[1:])"


def run(setting: Setting, images: int = IMAGES, batch: int = BATCH,
        count: int = 12) -> Iterator[dict]:
  """Times all variants. count: batches per turn."""
  with tempfile.TemporaryDirectory() as root:
    write_jpegs(pathlib.Path(root) / "train" / "one", images)
    write_jpegs(pathlib.Path(root) / "val" / "one", 1)

    def child(kind, *cores):
      # A new process for each turn: filling a buffer while another candidate is being timed would
      # be work that nobody times.
      words = (kind, root, batch, count, *cores)
      return Candidate(measure.Child(CODE, *map(str, words)), {})

    case = {"what": "CPU seconds of a batch", "batch": batch}
    one_core = {kind: child(kind) for kind in ("PIL loop", "threads", "2 workers")}
    yield from measure.rows(case, one_core, setting, min_seconds=0)
    workers = {kind: child(kind, *setting.cores) for kind in ("1 worker", "2 workers")}
    if len(setting.cores) < 2:
      workers = {kind: Candidate(None, {"reason": "the run had one core"}) for kind in workers}
    yield from measure.rows({"what": "wall seconds of a batch", "batch": batch}, workers, setting,
                              min_seconds=0)


def timed(kind: str, root: str, batch: str, count: str, *cores: str):
  """Prints seconds per batch: CPU seconds of all processes involved, or with `cores` wall seconds.
  """
  if cores:
    os.sched_setaffinity(0, map(int, cores))
  batch, count = int(batch), int(count)
  if kind == "PIL loop":
    batches = pil_loop(sorted(pathlib.Path(root).glob("train/*/*.jpg")), batch)
  else:
    workers = {"threads": 0, "1 worker": 1, "2 workers": 2}[kind]
    data = deit_s.get_config().data
    data.update({"name": f"folder:{root}", "augment": "flip_crop", "workers": workers,
                 "replicas": 1, "repeats": 1})
    batches = pipeline.train_batches(data, image_size=224, batch_size=batch, seed=0)
  # The buffers are empty when the clock starts and when it stops, because taking a batch is faster
  # than producing one.
  for _ in range(count):
    next(batches)
  now = time.perf_counter if cores else cpu_seconds
  start = now()
  for _ in range(count):
    next(batches)
  seconds = (now() - start) / count
  batches.close()
  print(seconds)


def cpu_seconds() -> float:
  this = psutil.Process()
  times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
  return sum(t.user + t.system for t in times)


def write_jpegs(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
  """Writes JPEGs with about the size and detail of photographs: smooth shapes with some noise."""
  folder.mkdir(parents=True)
  rng, paths = np.random.default_rng(0), []
  for i in range(count):
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(SIZE)
    pixels = np.asarray(coarse, np.int16) + rng.integers(-16, 17, (*SIZE[::-1], 3), np.int16)
    paths.append(folder / f"{i}.jpg")
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
  return paths


def pil_loop(files, batch: int):
  """Yields batches forever, the obvious way: decode, random resized crop, flip, stack."""
  rng, paths = np.random.default_rng(0), itertools.cycle(files)
  while True:
    images = []
    for path in itertools.islice(paths, batch):
      with Image.open(path) as image:
        image = image.convert("RGB")
      image = image.crop(augment.crop_box(*image.size, rng))
      image = image.resize((224, 224), Image.Resampling.BICUBIC)
      if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
      images.append(np.asarray(image))
    yield np.stack(images)
