"""Watching a run: how much of the device it uses, a profile of some steps, mirrors of its log."""
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
# makers' data sheets. A v2 or v3 chip is two devices. What is not here needs --peak_tflops.
PEAK_TFLOPS = {
    "TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197,
    "TPU v5p": 459, "TPU v5": 459, "TPU v6 lite": 918, "TPU v6e": 918,
    "NVIDIA A100": 312, "NVIDIA H100 PCIe": 756, "NVIDIA H100": 989, "NVIDIA H200": 989,
}
PICTURES = 16


@dataclasses.dataclass(frozen=True)
class Watching:
  """What else a run shall show. profile: "START:STEPS"; wandb: a project's name."""
  profile: str = ""
  wandb: str = ""
  peak_tflops: float = 0.0

  def __post_init__(self):
    if self.peak_tflops < 0:
      raise ValueError(f"--peak_tflops={self.peak_tflops} must be positive")
    profiled_steps(self.profile)


def profiled_steps(profile: str) -> range:
  """The steps that "START:STEPS" names; empty for ""."""
  if not profile:
    return range(0)
  start, _, count = profile.partition(":")
  if not (start.isdecimal() and count.isdecimal() and int(start) and int(count)):
    raise ValueError(f"--profile={profile!r} is not START:STEPS, as in --profile=100:5")
  return range(int(start), int(start) + int(count))


class Profile:
  """Traces some steps into WORKDIR/profile, for TensorBoard or Perfetto. Process 0 alone."""

  def __init__(self, steps: range, directory: pathlib.Path):
    self.steps, self.directory, self.running = steps, directory, False

  def before(self, step: int, state) -> float:
    """To be called before each step, with the state that is waited for at both ends.

    Returns the seconds that beginning or writing a trace took, which the run's speed is without.
    """
    begins = step in self.steps and not self.running and jax.process_index() == 0
    if not begins and not (self.running and step not in self.steps):
      return 0.0
    jax.block_until_ready(state)
    start = time.perf_counter()
    if begins:
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
  """TFLOP/s of a device kind, by the longest name that it begins with; None where unknown."""
  known = [name for name in PEAK_TFLOPS if kind.startswith(name)]
  return PEAK_TFLOPS[max(known, key=len)] if known else None


def utilisation(run, peak_tflops: float) -> float:
  """Model FLOP/s utilisation at one image a second; 0 where the device's peak is not known.

  A multiply-accumulate is 2 FLOP, and backward takes twice forward; what a rematerialised block
  computes again does not count.
  """
  devices = run.mesh.devices.ravel()
  tflops = peak_tflops or peak_tflops_of(devices[0].device_kind)
  if not tflops:
    return 0.0
  return 3 * 2 * vc.count(run.model).macs / (tflops * 1e12 * len(devices))


def montage(images: np.ndarray) -> np.ndarray:
  """uint8 (n, H, W, 3) -> one picture, in rows of ceil(sqrt n)."""
  count, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  padded = np.zeros((rows * columns, height, width, channels), np.uint8)
  padded[:count] = images
  grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
  return grid.reshape(rows * height, columns * width, channels)


def augmented(run, key, batch: dict) -> np.ndarray:
  """A picture of some images of a batch as the first step sees them: erased, mixed, in pixels.

  batch: this process's share. Some images of it alone are mixed here, so the pairs are others.
  """
  some = {name: array[:PICTURES] for name, array in batch.items()}
  images = np.asarray(jax.jit(run.augment)(key, some)[0])
  return montage((255 * run.preprocess.pixels(images)).round().astype(np.uint8))


def wandb_mirror(project: str, config, directory: pathlib.Path):
  """A run of Weights & Biases in `project`, the same one when the workdir is resumed.

  Its id lies in the workdir, whose name alone others may have too.
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
