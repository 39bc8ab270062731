"""Watching a run: device utilisation, a profile of some steps, sample images, Weights & Biases."""
import dataclasses
import importlib
import json
import math
import pathlib
import secrets
import time

import jax
import numpy as np

import vitcompact as vc

# Dense bfloat16 TFLOP/s of one JAX device, by the first words of its `device_kind`, from the
# vendors' data sheets. A v2 or v3 chip is two devices. Other devices need --peak_tflops.
PEAK_TFLOPS = {
    "TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197,
    "TPU v5p": 459, "TPU v5": 459, "TPU v6 lite": 918, "TPU v6e": 918,
    "NVIDIA A100": 312, "NVIDIA H100 PCIe": 756, "NVIDIA H100": 989, "NVIDIA H200": 989,
}
PICTURES = 16


@dataclasses.dataclass(frozen=True)
class Watching:
  """Options for watching a run. profile: "START:STEPS"; wandb: the name of a project; peak_tflops:
  of one device, 0: that of PEAK_TFLOPS."""
  profile: str = ""
  wandb: str = ""
  peak_tflops: float = 0.0

  def __post_init__(self):
    if self.peak_tflops < 0:
      raise ValueError(f"--peak_tflops={self.peak_tflops} must be positive")
    profiled_steps(self.profile)


def profiled_steps(profile: str) -> range:
  """The range of steps in "START:STEPS"; empty for ""."""
  if not profile:
    return range(0)
  start, _, count = profile.partition(":")
  if not (start.isdecimal() and count.isdecimal() and int(start) and int(count)):
    raise ValueError(f"--profile={profile!r} must be START:STEPS, as in --profile=100:5")
  return range(int(start), int(start) + int(count))


class Profile:
  """Traces some steps into WORKDIR/profile, for TensorBoard or Perfetto; only in process 0."""

  def __init__(self, steps: range, directory: pathlib.Path):
    self.steps, self.directory, self.running = steps, directory, False

  def before(self, step: int, state) -> float:
    """Starts or stops the trace; to be called before each step.

    state: waited for before a start or stop. Returns the seconds that it took, to be left out of
    the measured speed.
    """
    starts = step in self.steps and not self.running and jax.process_index() == 0
    if not starts and not (self.running and step not in self.steps):
      return 0.0
    jax.block_until_ready(state)
    start = time.perf_counter()
    if starts:
      jax.profiler.start_trace(str(self.directory / "profile"))
      self.running = True
    else:
      self.close()
    return time.perf_counter() - start

  def close(self):
    if self.running:
      jax.profiler.stop_trace()
    self.running = False


def peak_tflops_of(kind: str) -> float | None:
  """TFLOP/s of a device kind, by the longest known name that it begins with; None if unknown."""
  known = [name for name in PEAK_TFLOPS if kind.startswith(name)]
  return PEAK_TFLOPS[max(known, key=len)] if known else None


def utilisation(run, peak_tflops: float) -> float:
  """Model FLOP/s utilisation at one image per second; 0 if the device's peak is unknown.

  A multiply-accumulate counts as 2 FLOP, and the backward pass as twice the forward pass;
  recomputation in rematerialised blocks does not count.
  """
  devices = run.mesh.devices.ravel()
  tflops = peak_tflops or peak_tflops_of(devices[0].device_kind)
  if not tflops:
    return 0.0
  return 3 * 2 * vc.count(run.model).macs / (tflops * 1e12 * len(devices))


def montage(images: np.ndarray) -> np.ndarray:
  """uint8 (n, H, W, 3) -> one picture with ceil(sqrt n) images in a row."""
  count, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  padded = np.zeros((rows * columns, height, width, channels), np.uint8)
  padded[:count] = images
  grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
  return grid.reshape(rows * height, columns * width, channels)


def augmented(run, key, batch: dict) -> np.ndarray:
  """A picture of some images of a batch after device augmentation (erased and mixed), as pixels.

  batch: this process's part. Only these images are mixed here, so the pairs differ from the step's.
  """
  part = {name: array[:PICTURES] for name, array in batch.items()}
  images = np.asarray(jax.jit(run.augment)(key, part)[0])
  return montage((255 * run.preprocess.pixels(images)).round().astype(np.uint8))


def wandb_mirror(project: str, config, directory: pathlib.Path):
  """A Weights & Biases run in `project`, the same one when the workdir is resumed.

  Its id is stored in the workdir, as the name of the workdir need not be unique.
  """
  try:
    wandb = importlib.import_module("wandb")
  except ImportError as error:
    raise ValueError("--wandb needs a package that is not installed: pip install wandb") from error
  path = directory / "wandb.id"
  known = path.read_text() if path.exists() else ""
  if not known:
    known = secrets.token_hex(8)
    path.write_text(known)
  return wandb.init(project=project, dir=str(directory), id=known, name=directory.name,
                    resume="allow", config=json.loads(config.to_json()))
