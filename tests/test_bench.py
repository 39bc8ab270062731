"""Benchmarks are fair: candidates take turns, ratios stay within a round, tables match results."""
import importlib
import json
import statistics
import subprocess
import sys

import numpy as np
import pytest

import vitcompact as vc
from experiments import bench as program
from experiments.benchmarks import (
  data,
  exits,
  gemm,
  goals,
  layer,
  measure,
  methods,
  methods_tables,
  model,
  peer,
  results,
  startup,
  tables,
  tokens,
  train,
)
from experiments.benchmarks.measure import Candidate, Setting
from tests import tiny
from vitcompact import bench
from vitcompact.count import Count, Macs

SMALL = {"width": 8, "heads": 2, "image_size": 64}


class Remote:
  """Reports the given seconds one after another, and logs each request."""

  def __init__(self, name="", seconds=(1.0,), log=None):
    self.name, self.left, self.log = name, list(seconds), [] if log is None else log

  def seconds(self, calls):
    self.log.append((self.name, calls))
    return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def test_candidates_take_turns_in_a_rotating_order():
  log = []
  taken = bench.rounds_of({name: Remote(name, log=log) for name in "abc"}, rounds=4,
                          min_seconds=3.0)
  # A first call, one to see how long it takes, then three calls per turn.
  assert "".join(name for name, _ in log) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"
  assert {calls for _, calls in log[6:]} == {3}
  assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4, "c": 4}
  # If one call is enough for every candidate, the call that showed this was the first round.
  log.clear()
  taken = bench.rounds_of({name: Remote(name, [9, 1, 2, 3], log) for name in "ab"}, rounds=3,
                          min_seconds=1.0)
  assert "".join(name for name, _ in log) == "ab" + "ab" + "ba" + "ab" and taken["a"] == [1, 2, 3]
  # The warm-up calls of a turn are not counted.
  log.clear()
  taken = bench.rounds_of({name: Remote(name, [9, 7, 1, 7, 2], log) for name in "ab"}, rounds=2,
                          min_seconds=0, warmup_calls=1)
  assert "".join(name for name, _ in log) == "ab" + "aabb" + "bbaa" and taken["b"] == [1, 2]


def test_ratios_stay_within_a_round_so_that_slowdowns_cancel():
  noise = [1, 1, 1.5, 10, 0.2, 7]
  timing = bench.paired({"a": Remote(seconds=noise), "b": Remote(seconds=[s / 2 for s in noise])},
                        rounds=5, min_seconds=1e-3)
  assert timing["b"].speedup == timing["b"].low == timing["b"].high == 2
  assert timing["a"].seconds == statistics.median(noise[1:])


def test_compilation_is_timed_separately_and_results_are_awaited():
  import jax.numpy as jnp
  program = bench.compiled(lambda x: x @ x, jnp.ones((256, 256)))
  timing = bench.paired({"product": program.call}, rounds=2, min_seconds=0)
  assert program.seconds > timing["product"].seconds > 0 and program.call()[0, 0] == 256
  assert timing["product"].clock == "cpu"


def test_a_layer_is_compiled_and_timed_and_its_memory_is_counted():
  rows = list(layer.run(Setting("cpu", rounds=2), shapes=((4, 2),), width=8, heads=2))
  assert {row["pass"] for row in rows} == {"forward", "forward and backward"}
  assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in rows)
  assert all(row["tokens"] == 17 and row["temporary_bytes"] > 0 for row in rows)
  by_name = {row["name"]: row for row in rows if row["pass"] == "forward"}
  assert by_name["hMHSA"]["macs"] < by_name["dense"]["macs"]
  assert by_name["dense"]["inputs_and_outputs_bytes"] == 2 * (2 * 17 * 8 * 4)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """A folder of small results of every suite; nothing was compiled, every row takes one second."""
  folder = tmp_path_factory.mktemp("results")
  one = Candidate(Remote(), {"temporary_bytes": 1, "compile_seconds": 1.0})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(measure, "compiled", lambda function, *args, **facts: Candidate(
        Remote(), {**one.facts, **facts}))
    patch.setattr(train, "_candidate", lambda *args, **facts: Candidate(Remote(), facts))
    patch.setattr(measure, "Child", lambda *args, **kwargs: Remote())
    patch.setattr(measure, "random_variables", lambda *args: {})
    patch.setattr(layer, "macs_of", lambda *args: Macs(1))
    patch.setattr(vc, "count", lambda model: Count(1, 1, 1, 1, 1))
    patch.setattr(startup, "_program", lambda *args: ())
    patch.setattr(startup, "_Compilation", lambda *args: Remote())
    patch.setattr(exits, "exits", lambda _, batch, plan, folder: {
        f"{name}: {plan}": Candidate(Remote(), {"macs": 1}) for name in exits.RUNTIMES.values()})
    setting = Setting("cpu", rounds=3, cores=(0, 1))
    suites = {
        "gemm": gemm.run(setting), "layer": layer.run(setting, width=8, heads=2),
        "model": model.run(setting, (8,), depth=10, **SMALL),
        "exits": exits.run(setting), "train": train.run(setting, depth=1, **SMALL),
        "tokens": tokens.run(setting, (4, 6), width=8, heads=2),
        "methods": methods.run(setting, ((224, 8),)),
        "startup": startup.run(setting, depth=1, **SMALL), "data": data.run(setting, images=1)}
    for name, rows in suites.items():
      about = {"suite": name, "platform": "cpu", "processor": "a processor", "dtype": "float32",
               "jax": "1.2", "clock": "cpu", "torch": None, "rounds": 3, "load": [0.0, 0.0],
               "commit": "abc", "date": "2000-01-01", "command": f"bench {name}", "device": "cpu"}
      program.write(folder / f"{name}_cpu.json", {**about, "rows": list(rows)})
  return folder


def test_every_goal_finds_its_measurement_in_the_results(measured):
  lines = goals.table(measured).splitlines()
  # Without a Python that has torch, its rows exist and say so; all others were measured.
  assert all("torch" in line for line in lines if "cpu, " in line and "not measured" in line)
  assert "| cpu, dense over plain Linen, batch 8 | 1.00 | >= 1.05 | within 5% |" in lines
  assert "| cpu, heads, batch 8 | 1.00 | >= 1.1 | NO |" in lines
  assert lines[-2:] == [f"| gpu, {suite} | | | not measured |" for suite in ("model", "layer")]


def timed(folder, suite, seconds):
  """Returns a suite's results, in which a measured row took `seconds(row)`."""
  found = json.loads((folder / f"{suite}_cpu.json").read_text())
  for row in found["rows"]:
    if row["seconds"] is not None:
      row["seconds"] = row["temporary_bytes"] = seconds(row)
      row["rounds"] = 3 * [row["seconds"]]
  return found


def reached(make, found):
  return {goal.what: goal.measured for goal in make(found)}


def test_goals_of_layers_are_ratios_to_the_fastest_dense_layer_of_their_case(measured):
  taken = {"forward": {"dense": 6, "dense, einsum": 5, "dense, tiled": 7, "hMHSA": 4,
                       "hMHSA, logits site": 8, "block-sparse 25%": 2},
           "forward and backward": {"dense": 60, "dense, einsum": 50, "dense, tiled": 30,
                                    "hMHSA": 24, "hMHSA, logits site": 80, "block-sparse 25%": 12}}
  growth = {197: 1, 577: 4, 1025: 8, 4097: 64}

  def seconds(row):
    slower = 2 if (row["name"], row["tokens"]) == ("dense", 4097) else 1
    return slower * taken[row["pass"]][row["name"]] * growth[row["tokens"]]

  found = timed(measured, "layer", seconds)
  got = reached(goals.layer_goals, found)
  assert [got[f"hMHSA layer, {tokens} tokens, forward"] for tokens in growth] == 4 * [5 / 4]
  assert got["hMHSA layer, 1025 tokens, forward and backward"] == 30 / 24
  assert got["block-sparse 25% layer, 4097 tokens, forward"] == 5 / 2
  assert got["block-sparse 25% layer, 1025 tokens, forward and backward"] == 30 / 12
  assert got["hMHSA, logits site layer, 577 tokens, forward"] == 5 / 8
  assert got["hMHSA, logits site, temporary memory over dense, 577 tokens"] == 8 / 5
  for name in ("dense", "hMHSA", "block-sparse 25%"):
    assert got[f"{name}: time per token, 4097 over 1025"] == pytest.approx(8 * 1025 / 4097)
    assert got[f"{name}: temporary memory, 4097 over 1025 tokens, forward"] == 8
  size = 2 * 4 * 4097 * 8
  assert got["hMHSA: temporary memory over input and output, 4097 tokens, forward"] == 256 / size


def test_goals_of_models_and_steps_are_ratios_of_the_named_rows(measured):
  names = list(goals.MODEL_TARGETS)
  taken = {"plain Linen": 18, "dense": 12, **{name: 12 / (2 + i) for i, name in enumerate(names)}}
  found = timed(measured, "model", lambda row: taken.get(row["name"], 100))
  got = reached(goals.model_goals, found)
  assert got["dense over plain Linen, batch 8"] == 1.5
  assert [got[f"{name}, batch 8"] for name in names] == pytest.approx(range(2, 2 + len(names)))
  taken = {"dense": 6, "plain Linen + Optax": 9, "ffn, one bare branch": 4, "heads + ffn": 5}
  got = reached(goals.train_goals, timed(measured, "train", lambda row: taken.get(row["name"], 1)))
  assert got["step over plain Linen + Optax"] == 1.5 and got["step, ffn, one bare branch"] == 1.5
  found = timed(measured, "tokens", lambda row: {"dense": 3, "attention": 2}.get(row["name"], 1))
  assert set(reached(goals.tokens_goals, found).values()) == {1.5}


def test_gpu_goals_are_ratios_to_cudnn_and_to_compiled_torch(measured):
  taken = {"dense": 5, "dense, einsum": 9, "hMHSA": 4, "block-sparse 25%": 2}
  found = timed(measured, "layer", lambda row: taken.get(row["name"], 6))
  for row in found["rows"]:
    row["name"] = row["name"].replace("tiled", "cudnn")
  assert reached(goals.device_layer_goals, found) == {
      f"{name} layer over cuDNN's dense, {tokens} tokens": ratio for tokens in (1025, 4097)
      for name, ratio in (("hMHSA", 1.5), ("block-sparse 25%", 3))}
  found = timed(measured, "model", lambda row: {"dense": 6, "EViT 0.7": 4}.get(row["name"], 2))
  assert reached(goals.device_model_goals, found) == {
      "dense over torch.compile bf16, batch 8": None, "EViT 0.7, batch 8": 1.5,
      f"{goals.ALL}, batch 8": 3}


def test_tables_say_which_rows_were_not_measured(measured):
  text = tables.markdown(measured)
  assert text.endswith("On GPU and TPU: **not measured**.")
  torch = next(line for line in text.splitlines() if line.startswith("| torch f32 |"))
  assert torch == "| torch f32 |  | not measured |  |  |"
  heads = next(line for line in text.splitlines() if line.startswith("| heads |"))
  assert heads.endswith("| not measured |") and "1.00x [1.00, 1.00]" in heads
  (measured / "part").mkdir(exist_ok=True)
  (measured / "part" / "gemm_gpu.json").write_text((measured / "gemm_cpu.json").read_text())
  assert tables.markdown(measured / "part").endswith(
      "On GPU, suites model, exits, layer, train, tokens, methods, startup, data: **not "
      "measured**.\n\nOn CPU and TPU: **not measured**.")
  assert tables.markdown(measured / "nothing") == "On CPU and GPU and TPU: **not measured**."


def test_each_processor_has_its_own_table(measured, tmp_path):
  found = json.loads((measured / "gemm_cpu.json").read_text())
  for name, processor in (("gemm_cpu", "One"), ("gemm_cpu_other", "Another")):
    (tmp_path / f"{name}.json").write_text(json.dumps({**found, "processor": processor}))
  text = tables.markdown(tmp_path)
  assert text.count("The ceiling here") == 2
  assert text.index("one core of One") < text.index("one core of Another")


@pytest.mark.parametrize("suite", program.SUITES)
def test_an_unmeasured_candidate_leaves_the_other_rows_intact(suite, measured, tmp_path):
  """It did not compile on that device, or is newer than the file."""
  path = tmp_path / f"{suite}_cpu.json"
  full = json.loads((measured / path.name).read_text())
  keys = ("model", "image_size", "tokens", "batch", "pass", "what", "name", "product")
  for number, row in enumerate(full["rows"]):
    failed = {key: row[key] for key in keys if key in row} | {
        "seconds": None, "rounds": None, "reason": "XlaRuntimeError: no memory"}
    for rows in ([failed], []):
      rows = full["rows"][:number] + rows + full["rows"][number + 1:]
      path.write_text(json.dumps({**full, "rows": rows}))
      assert goals.table(tmp_path).count("\n") > 2 and suite in tables.markdown(tmp_path)
  path.write_text("{")
  with pytest.raises(ValueError, match=f"{path.name} holds no results"):
    goals.table(tmp_path)


def test_a_speed_row_shows_the_accuracy_of_the_longest_training(measured):
  row = {"name": "heads", "data": "digits", "accuracy": 0.9861, "difference": -0.005,
         "interval": 0.0123, "steps": 900}
  for name, steps, accuracy in (("x", 900, 0.9861), ("y", None, 0.9), ("z", 30, 0.8)):
    rows = [{**row, "steps": steps, "accuracy": accuracy}]
    (measured / f"accuracy_{name}.json").write_text(json.dumps({"rows": rows}))
  heads = next(line for line in tables.markdown(measured).splitlines()
               if line.startswith("| heads |"))
  cell = "98.61% on digits (-0.50 ± 1.23, 900 steps)"
  assert heads.endswith(f"| {cell} |")
  text = tables.markdown(measured)
  assert f"Accuracies as above: hMHSA {cell}; block-sparse 25% not measured." in text
  assert f"Accuracies as above: heads {cell}; attention not measured; " in text


def test_the_tables_match_the_results(tmp_path):
  """Writing them again changes nothing."""
  for path, name, table in ((tables.ROOT / "README.md", "front", tables.front()),
                            (results.FOLDER / "README.md", "speed", tables.markdown()),
                            (tables.ROOT / "docs/methods.md", "legal", methods_tables.legal())):
    copy = tmp_path / f"{name}.md"
    copy.write_text(path.read_text())
    tables.put(copy, name, table)
    assert copy.read_text() == path.read_text(), path


def test_results_are_read_back_as_written(tmp_path):
  written = {"suite": "x", "load": [1.0, 2.0], "rows": [{"name": "a", "seconds": 1.5},
                                                        {"name": "b", "seconds": None}]}
  program.write(tmp_path / "x_cpu.json", written)
  assert results.load("x", "cpu", tmp_path) == written
  assert results.load("y", "cpu", tmp_path) is None
  assert [path.name for path in tmp_path.iterdir()] == ["x_cpu.json"]


FAKE = """
import json, sys
for line in sys.stdin:
  question = json.loads(line)
  if question["do"] == "build" and question["kind"] == "f32":
    answer = {"id": 7}
  elif question["do"] == "build":
    answer = {"error": "ImportError: no such thing"}
  elif question["do"] == "time":
    answer = {"seconds": float(question["id"])}
  else:
    answer = {"torch": "9"}
  print(json.dumps(answer), flush=True)
"""


def test_a_peer_in_another_python_takes_turns_and_says_what_it_lacks(tmp_path, monkeypatch):
  script = tmp_path / "fake.py"
  script.write_text(FAKE)
  monkeypatch.setattr(peer, "SCRIPT", script)
  setting = Setting("cpu", rounds=2, torch=peer.TorchPeer(sys.executable))
  candidates = {name: Candidate(*_built(setting, name)) for name in ("torch f32", "torch bf16")}
  rows = {row["name"]: row for row in measure.rows({}, candidates, setting)}
  assert rows["torch f32"]["rounds"] == [7.0, 7.0]
  assert rows["torch bf16"]["seconds"] is None
  assert rows["torch bf16"]["reason"] == "ImportError: no such thing"
  setting.torch.close()


def _built(setting, name):
  class Sizes:
    image_size, depth, width, heads = 32, 1, 8, 2
  candidate, = measure.torch_candidates(setting, [name], Sizes, batch=1).values()
  return candidate


def test_a_python_without_torch_is_refused_in_one_line(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="No such file or directory; give a Python that has torch"):
    peer.TorchPeer(str(tmp_path / "python"))
  script = tmp_path / "ends.py"
  script.write_text("raise SystemExit(3)")
  monkeypatch.setattr(peer, "SCRIPT", script)
  with pytest.raises(ValueError, match="the process of torch ended with 3"):
    peer.TorchPeer(sys.executable)


def test_batches_of_the_pipeline_and_the_loop_are_timed(tmp_path, capsys):
  data.write_jpegs(tmp_path / "train" / "one", 3)
  data.write_jpegs(tmp_path / "val" / "one", 1)
  loop = data.pil_loop(sorted(tmp_path.glob("train/*/*.jpg")), 4)
  assert next(loop).shape == (4, 224, 224, 3)
  data.timed("threads", str(tmp_path), "2", "1")
  assert float(capsys.readouterr().out) >= 0


@pytest.mark.parametrize("arguments,words", [
    (("all", "--out", "x.json"), "error: --out names one file"),
    (("gemm", "--out", "README.md/x.json"), "error: [Errno")])
def test_the_command_refuses_wrong_arguments_in_one_line(arguments, words):
  command = [sys.executable, "-m", "experiments.bench", *arguments]
  done = subprocess.run(command, cwd=tables.ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert done.stderr.startswith(words)


@pytest.mark.parametrize("name", program.SUITES)
def test_every_suite_has_a_module_a_table_and_goals(name):
  assert callable(importlib.import_module(f"experiments.benchmarks.{name}").run)
  assert name in tables.SUITES and name in goals.SUITES["cpu"]


# Methods that the table of methods calls exact.
EXACT = {"MoH": vc.MoH(active=1.0), "Sparsifiner": vc.Sparsifiner(keep=1.0),
         "BiFormer": vc.BiFormer(keep=1.0, regions=2, min_tokens=0),
         "KeyMerging": vc.KeyMerging(keep=1.0, min_tokens=0),
         "EViT": vc.EViT(keep=1.0, blocks=(0,)), "DynamicViT": vc.DynamicViT(keep=1.0, blocks=(0,)),
         "ToMe": vc.ToMe(r=0), "MCTF": vc.MCTF(r=0), "FastPath": vc.FastPath(keep=1, blocks=(0,))}


@pytest.mark.parametrize("name", EXACT)
def test_methods_called_exact_start_from_dense_weights_exactly(name):
  dense = tiny.deit()
  variables, x = tiny.init(dense), tiny.images(dense)
  model, got = vc.compact(dense, variables, vc.Plan(**{EXACT[name].axis: EXACT[name]}))
  np.testing.assert_allclose(tiny.apply(model, got, x), tiny.apply(dense, variables, x), rtol=1e-4,
                             atol=1e-5)


def test_what_the_table_says_about_how_methods_start_is_tested():
  assert methods.STARTS.keys() <= {kind.__name__ for kind in methods.kinds()}
  assert {name for name, how in methods.STARTS.items() if how.startswith("exactly")} == EXACT.keys()
