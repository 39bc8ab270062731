"""What a run shows besides its metrics."""
import sys
import time
import types

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests.tiny_run import lines
from vitcompact.run import loop, watch


@pytest.mark.parametrize("text", ["5", "5:", ":5", "0:5", "5:0", "a:b", "-1:5"])
def test_an_invalid_profile_setting_is_refused(text):
  with pytest.raises(ValueError, match="must be START:STEPS"):
    watch.Watching(profile=text)


def test_a_profile_traces_only_the_requested_steps(tmp_path, monkeypatch):
  events = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: events.append(("start", path)))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
  profile = watch.Profile(watch.profiled_steps("3:2"), tmp_path)
  for step in range(1, 8):
    profile.before(step, np.zeros(1))
    events.append(step)
  profile.close()
  assert events == [1, 2, ("start", str(tmp_path / "profile")), 3, 4, "stop", 5, 6, 7]


@pytest.mark.usefixtures("shared")
def test_writing_a_profile_does_not_count_as_a_slow_run(config, tmp_path, monkeypatch):
  """Here starting and writing a trace seem to take 1000 seconds each."""
  real, more = time.perf_counter, [0.0]
  monkeypatch.setattr(time, "perf_counter", lambda: real() + more[0])
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: more.append(more.pop() + 1000))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: more.append(more.pop() + 1000))
  loop.train(config, tmp_path, until=20, watching=watch.Watching(profile="13:2"))
  assert more == [2000.0]
  [*_, last] = [line for line in lines(tmp_path) if "images_per_second" in line]
  assert last["step"] == 20
  assert last["images_per_second"] > 1.0


@pytest.mark.parametrize("kind, tflops", [
    ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v4", 275), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("cpu", None), ("GeForce", None)])
def test_the_peak_of_a_device_is_found_by_its_kind(kind, tflops):
  assert watch.peak_tflops_of(kind) == tflops


def test_utilisation_counts_the_models_own_work_on_all_devices(built):
  """At 1 TFLOP/s per device, with 6 FLOP per multiply-accumulate for forward and backward."""
  macs = vc.count(built.model).macs
  assert watch.utilisation(built, 1.0) == pytest.approx(6 * macs / (8 * 1e12))
  assert watch.utilisation(built, 0.0) == 0.0     # a CPU's peak is unknown


def test_a_montage_has_every_image_in_its_position():
  images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 4, 3), np.uint8)
  picture = watch.montage(images)
  assert picture.shape == (4, 12, 3)
  assert picture[::2, ::4, 0].tolist() == [[0, 1, 2], [3, 4, 0]]


def test_the_first_batch_is_shown_as_the_step_sees_it(built):
  """Grey mixed with grey stays grey, so any other pixels were erased."""
  batch = {"image": np.full((20, 8, 8, 3), 200, np.uint8), "label": np.zeros(20, np.int32)}
  picture = watch.augmented(built, jax.random.key(0), batch)
  assert picture.shape == (32, 32, 3)
  kept = np.all(picture == 200, axis=-1).mean()
  assert 0.5 < kept < 1.0


def test_wandb_is_imported_lazily_and_its_absence_is_reported(monkeypatch, built, tmp_path):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match=r"--wandb needs .* pip install wandb"):
    watch.wandb_mirror("project", built.config, tmp_path)
  asked = {}
  fake = types.SimpleNamespace(init=lambda **keywords: asked.update(keywords) or "run")
  monkeypatch.setitem(sys.modules, "wandb", fake)
  ids = []
  for name in ("a/deit", "a/deit", "b/deit"):    # resumed; another workdir of the same name
    directory = tmp_path / name
    directory.mkdir(parents=True, exist_ok=True)
    assert watch.wandb_mirror("project", built.config, directory) == "run"
    assert (asked["project"], asked["name"], asked["resume"]) == ("project", "deit", "allow")
    ids.append(asked["id"])
  assert ids[0] == ids[1] != ids[2]
  assert asked["config"]["optim"]["b1"] == 0.9
