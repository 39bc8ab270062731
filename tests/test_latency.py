"""Measured times of options on this device: how they add up, and how they are cached in a file."""
import json
import types

import pytest

import vitcompact as vc
from tests.test_measure import options_of
from vitcompact import bench, latency
from vitcompact.methods.ffn import cffn
from vitcompact.planner import Costs


@pytest.fixture
def timed(monkeypatch, tmp_path):
  """(report on two equal blocks, the plans that were timed): a model takes 1 ms plus a microsecond
  per thousand MACs."""
  timed_plans = []

  def call(self, model):
    timed_plans.append(model.plan)
    return model

  def paired(models, rounds):
    del rounds
    seconds = {name: 1e-3 + 1e-9 * vc.count(model).macs for name, model in models.items()}
    first = next(iter(seconds.values()))
    return {name: types.SimpleNamespace(seconds=taken, speedup=first / taken)
            for name, taken in seconds.items()}

  monkeypatch.setattr(latency.Times, "_call", call)
  monkeypatch.setattr(bench, "paired", paired)
  monkeypatch.setattr(latency, "default_file", lambda: tmp_path / "latency.json")
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  model = vc.create_model("deit_tiny_patch16_224", image_size=32, patch_size=8, width=24, depth=2,
                          heads=4, num_classes=5)
  return options_of(model), timed_plans


def seconds(model):
  return 1e-3 + 1e-9 * vc.count(model).macs


def test_the_time_saved_is_divided_among_the_equal_blocks_timed_together(timed):
  report, _ = timed
  times, model = report.times(1), report.costs.model
  method = vc.CFFN(rank_ratio=0.25)
  both = seconds(model) - seconds(model.clone(plan=vc.Plan(ffn=method)))
  assert times.dense == pytest.approx(seconds(model))
  assert times.saved("blocks_0", "ffn", method) == pytest.approx(both / 2)


def test_a_plan_for_a_speedup_reaches_it(timed):
  report, _ = timed
  for expected in ({"speedup": 1.05}, {"latency_ms": 1e3 * report.times(1).dense / 1.05}):
    plan = report.plan(**expected)
    deployed = report.costs.model.clone(plan=plan)
    assert seconds(deployed) <= report.times(1).dense / 1.05 * 1.001
    assert report.milliseconds(plan) == pytest.approx(1e3 * seconds(deployed), rel=0.01)


def test_times_are_cached_and_a_damaged_file_is_measured_again(timed, tmp_path):
  report, timed_plans = timed
  report.plan(speedup=1.05)
  count = len(timed_plans)
  again = latency.Times(Costs(report.costs.model), 1)
  again.saved("blocks_0", "ffn", vc.CFFN(rank_ratio=0.25))
  assert len(timed_plans) == count
  assert all(" at 0x" not in key for key in json.loads((tmp_path / "latency.json").read_text()))
  (tmp_path / "latency.json").write_text("{")
  latency.Times(Costs(report.costs.model), 1)
  assert len(timed_plans) == count + 1


def test_an_unreachable_speedup_names_the_nearest(timed):
  report, _ = timed
  with pytest.raises(ValueError, match=r"speedup=50.0: no plan of .* goes above speedup=1\.\d+"):
    report.plan(speedup=50.0)
  for value in (0.5, 0, "fast", True):
    with pytest.raises(ValueError, match=r"speedup=.*must be a number of at least 1"):
      report.plan(speedup=value)
