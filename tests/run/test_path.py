"""The path from a dense model to a smaller one: its stages, their files, and resuming."""
import json
import math
import types

import numpy as np
import pytest

import vitcompact as vc
from configs import compact_digits
from tests import tiny
from vitcompact import trees
from vitcompact.run import loop, path
from vitcompact.train import config as configs


@pytest.fixture(scope="module")
def finished_path(tmp_path_factory):
  """(config, workdir, receipt, printed lines) of a path that takes seconds."""
  workdir, printed = tmp_path_factory.mktemp("path") / "run", []
  config = compact_digits.get_config("runlocal")
  config.model.depth, config.compact.macs = 1, 0.8
  with pytest.MonkeyPatch.context() as patch:
    tiny.few_options(patch)
    receipt = path.run(config, workdir, printed.append)
  return config, workdir, receipt, printed


def test_each_stage_writes_its_file(finished_path):
  _, workdir, receipt, printed = finished_path
  there = {file.name for file in workdir.iterdir()}
  assert {"dense", "report.json", "report.html", "plan.json", "plan.txt", "compact.safetensors",
          "distilled.safetensors", "deploy.safetensors", "receipt.json", "receipt.md",
          "receipt.html"} <= there
  assert [row.name for row in receipt.rows] == ["dense", "compacted", "distilled", "deployed"]
  assert printed[0].startswith("dense model: 20 steps") and printed[-1].startswith("plan: MACs")


def test_the_receipt_states_budget_reasons_proofs_and_intervals(finished_path):
  _, workdir, receipt, _ = finished_path
  written = json.loads((workdir / "receipt.json").read_text())
  dense, *_, deployed = written["models"]
  assert deployed["macs"] <= 0.8 * dense["macs"] and written["budget"] == {"macs": 0.8}
  assert written["plan_reasons"][0].startswith("MACs") and written["kept"] in ("start", "end")
  assert written["fold"]["ok"] and written["fold"]["random images"]["ok"] and receipt.ok
  for row in written["models"]:
    low, high = row["accuracy_interval"]
    assert low < row["test_accuracy"] < high and row["test_images"] == 360
  assert written["dense_sha256"] == path.sha256(written["compacted_from"])
  images = path.calibration_images(configs.complete(finished_path[0]), path.preprocess_of(
      configs.complete(finished_path[0]), vc.load(workdir / "compact.safetensors")[0]))
  assert written["calibration_images"] == "64"
  assert written["calibration_images_digest"] == trees.digest({"images": images}) == json.loads(
      (workdir / "report.json").read_text())["images_digest"]
  page = (workdir / "receipt.html").read_text()
  assert "<table>" in page and "95 % intervals" in page


def test_the_deployed_file_matches_the_receipt(finished_path):
  _, workdir, receipt, _ = finished_path
  model, _ = vc.load(workdir / "deploy.safetensors")
  assert model.deploy and model.plan == vc.Plan.parse(str(workdir / "plan.json"))
  assert vc.count(model).macs == receipt.rows[-1].count.macs


def test_every_file_of_the_path_names_its_classes(finished_path):
  _, workdir, receipt, _ = finished_path
  assert receipt.classes == tuple("0123456789")
  for name in ("dense/trained", "dense/deploy", "compact", "distilled", "deploy"):
    assert vc.classes_of(workdir / f"{name}.safetensors") == list(receipt.classes), name


def test_the_same_command_resumes_without_measuring_again(finished_path, monkeypatch):
  config, workdir, receipt, _ = finished_path
  for verb in ("measure", "compact"):
    monkeypatch.setattr(vc, verb, lambda *_, **__: pytest.fail("done already"))
  monkeypatch.setattr(vc.Report, "explain", lambda *_, **__: pytest.fail("explained already"))
  again = path.run(config, workdir, lambda line: None)
  assert again.facts["deploy_digest"] == receipt.facts["deploy_digest"]


def test_an_edited_plan_needs_a_new_directory(finished_path, tmp_path):
  config, workdir, _, _ = finished_path
  for name in ("report.json", "report.html", "compact.safetensors"):
    (tmp_path / name).write_bytes((workdir / name).read_bytes())
  (tmp_path / "plan.json").write_text(vc.Plan(ffn=vc.CFFN(rank_ratio=0.9)).to_json())
  config = config.copy_and_resolve_references()
  config.init_from = str(workdir / "dense" / "trained.safetensors")
  with pytest.raises(ValueError, match="is of another plan or another dense model; for another"):
    path.prepare(config, tmp_path, lambda line: None)
  assert not (tmp_path / "plan.txt").exists()
  (tmp_path / "compact.safetensors").write_bytes(b"")
  with pytest.raises(ValueError, match=r"compact\.safetensors.*; remove it to compact again"):
    path.prepare(config, tmp_path, lambda line: None)
  (tmp_path / "compact.safetensors").unlink()
  path.prepare(config, tmp_path, lambda line: None)
  reasons = (tmp_path / "plan.txt").read_text()
  assert "by hand: MACs" in reasons and "which does not reach macs=0.8; no predicted KL" in reasons


@pytest.mark.parametrize("name", ["deploy.safetensors", "receipt.json"])
def test_the_results_of_another_run_are_not_overwritten(finished_path, tmp_path, name):
  config = finished_path[0].copy_and_resolve_references()
  config.init_from = str(finished_path[1] / "dense" / "trained.safetensors")
  (tmp_path / name).write_text("mine")
  with pytest.raises(ValueError, match=f"{name} exists, and is not of a run like this"):
    path.prepare(config, tmp_path, lambda line: None)
  assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_report_of_another_model_is_refused(finished_path, tmp_path):
  config, workdir, _, _ = finished_path
  tree = json.loads((workdir / "report.json").read_text())
  (tmp_path / "report.json").write_text(json.dumps({**tree, "digest": "0" * 64}))
  (tmp_path / "report.html").write_text("")
  config = config.copy_and_resolve_references()
  config.init_from = str(workdir / "dense" / "trained.safetensors")
  with pytest.raises(ValueError, match="measure again"):
    path.prepare(config, tmp_path, lambda line: None)


@pytest.mark.parametrize("change", [{"compact.macs": 0.6}, {"compact.images": 128},
                                    {"plan": vc.Plan(ffn=vc.CFFN()).to_json()}])
def test_different_settings_in_the_same_workdir_are_refused(finished_path, change):
  config = configs.complete(finished_path[0])
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match="began with other settings: "):
    path.prepare(config, finished_path[1], lambda line: None)


def test_wrong_models_classes_and_plans_are_refused_before_any_work(
    finished_path, tmp_path):
  dense = finished_path[1] / "dense" / "trained.safetensors"
  model, variables = vc.load(dense)
  vc.save(tmp_path / "renamed.safetensors", model, variables, classes=[f"c{i}" for i in range(10)])
  for change, words in (({"model.depth": 2}, "not what config.model and config.data ask for"),
                        ({"init_from": str(tmp_path / "renamed.safetensors")}, "classes"),
                        ({"init_from": str(finished_path[1] / "deploy.safetensors")},
                         "dense, unfolded"),
                        ({"plan": vc.Plan(heads=vc.HMHSA(real_heads=9)).to_json()}, "has only")):
    config = configs.complete(finished_path[0])
    config.update_from_flattened_dict({"init_from": str(dense), **change})
    with pytest.raises(ValueError, match=words):
      path.prepare(config, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_file_may_differ_from_the_config_only_in_how_it_was_trained(finished_path):
  dense, config = finished_path[1] / "dense" / "trained.safetensors", configs.complete(
      finished_path[0])
  config.model = {"name": "lvvit_t", "mix_token": False}
  fields = {"num_classes": 10, "drop_path_rate": 0.3, "dtype": "bfloat16"}
  path.check_dense(config, dense, vc.create_model("lvvit_t", **fields))
  for name, sizes in (("lvvit_t", {"depth": 3}), ("pvt_tiny", {})):
    model = vc.create_model(name, **sizes, **fields)
    with pytest.raises(ValueError, match=f"holds {name}, not what config"):
      path.check_dense(config, dense, model)
  config.model = {"name": "pvt_tiny"}
  with pytest.raises(ValueError, match="holds lvvit_t, not what config"):
    path.check_dense(config, dense, vc.create_model("lvvit_t", **fields))


def test_without_distillation_nothing_is_trained(finished_path, tmp_path, monkeypatch):
  for name in ("report.json", "report.html", "plan.json", "compact.safetensors"):
    (tmp_path / name).write_bytes((finished_path[1] / name).read_bytes())
  config = configs.complete(finished_path[0])
  config.init_from = str(finished_path[1] / "dense" / "trained.safetensors")
  config.compact.distil = False
  monkeypatch.setattr(path.loop, "train", lambda *_, **__: pytest.fail("trained"))
  receipt = path.run(config, tmp_path, lambda line: None)
  assert [row.name for row in receipt.rows] == ["dense", "compacted", "deployed"]


def test_the_path_starts_from_foreign_weights(finished_path, tmp_path):
  """It continues as if they had been converted first: nothing is measured again."""
  for name in ("report.json", "report.html", "plan.json", "compact.safetensors"):
    (tmp_path / name).write_bytes((finished_path[1] / name).read_bytes())
  model, variables = vc.load(finished_path[1] / "dense" / "trained.safetensors")
  np.savez(tmp_path / "theirs.npz", **{f"module.{name}": value for name, value in
                                       vc.to_torch(model, variables).items()})
  config, printed = configs.complete(finished_path[0]), []
  config.init_from = str(tmp_path / "theirs.npz")
  begun = path.prepare(config, tmp_path, printed.append)
  assert begun.dense == tmp_path / "dense.safetensors" == path.pathlib.Path(
      begun.config.teacher.file)
  assert trees.digest(vc.load(begun.dense)[1]) == trees.digest(variables)
  assert printed[0] == f"dense model: {tmp_path / 'theirs.npz'} as dense.safetensors"
  assert begun.facts["source"] == str(tmp_path / "theirs.npz")
  assert begun.facts["source_sha256"] == path.sha256(tmp_path / "theirs.npz")


def test_a_refused_plan_leaves_nothing_of_foreign_weights(finished_path, tmp_path):
  config = configs.complete(finished_path[0])
  (tmp_path / "theirs.npz").write_bytes(b"not read")
  config.init_from = str(tmp_path / "theirs.npz")
  config.plan = vc.Plan(heads=vc.HMHSA(real_heads=1000)).to_json()
  with pytest.raises(ValueError, match="real_heads=1000"):
    path.prepare(config, tmp_path / "run", lambda line: None)
  config.init_from = ""    # nor is the dense model trained first
  with pytest.raises(ValueError, match="real_heads=1000"):
    path.prepare(config, tmp_path / "run", lambda line: None)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change,words", [
    ({"compact.params": 0.5}, "give one of macs, params"),
    ({"compact.dense_steps": 0}, "config.init_from is empty"),
    ({"compact.macs": 1.5}, "at most 1")])
def test_an_invalid_path_is_refused(tmp_path, change, words):
  config = compact_digits.get_config("runlocal")
  for key, value in change.items():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=words):
    path.prepare(config, tmp_path / "run", lambda line: None)


def test_a_refused_budget_may_be_corrected_in_the_same_workdir(finished_path, tmp_path):
  config = configs.complete(finished_path[0])
  config.init_from = str(finished_path[1] / "dense" / "trained.safetensors")
  for name in ("report.json", "report.html"):
    (tmp_path / name).write_bytes((finished_path[1] / name).read_bytes())
  for macs in (0.01, 0.02):
    config.compact.macs = macs
    with pytest.raises(ValueError, match=f"macs={macs}: no plan"):
      path.prepare(config, tmp_path, lambda line: None)
  config.compact.images = 128   # the report is of 64
  with pytest.raises(ValueError, match="began with other settings: images was 64 and is 128"):
    path.prepare(config, tmp_path, lambda line: None)


def test_a_config_without_a_budget_is_not_a_path():
  config = compact_digits.get_config()
  assert path.budget_of(config) == {"macs": 0.5}
  config.compact.macs = 0.0
  assert path.budget_of(config) == {} and path.budget_of(configs.ConfigDict()) == {}


def test_calibration_images_that_memory_does_not_hold_are_left_out(finished_path, monkeypatch):
  config = configs.complete(finished_path[0])
  config.compact.images = 40
  preprocess = path.preprocess_of(config, vc.load(finished_path[1] / "deploy.safetensors")[0])
  values = math.prod(preprocess.image_size) * len(preprocess.mean)
  monkeypatch.setattr(path.batches, "MOST_VALUES", 12 * values + 1)
  with pytest.warns(UserWarning, match="of 40 calibration images only 12 are used"):
    assert len(path.calibration_images(config, preprocess)) == 12


def test_calibration_images_cover_all_classes(finished_path):
  config = configs.complete(finished_path[0])
  model, _ = vc.load(finished_path[1] / "dense" / "trained.safetensors")
  images = path.calibration_images(config, path.preprocess_of(config, model))
  assert images.shape == (64, 16, 16, 3) and images.dtype == np.float32


@pytest.mark.parametrize("scores,kept", [
    ({"start": (0.9, 0.3), "end": (0.8, 0.1)}, "start"),
    ({"start": (0.8, 0.1), "end": (0.9, 0.3)}, "end"),
    ({"start": (0.9, 0.2), "end": (0.9, 0.1)}, "end"),
    ({"start": (0.9, 0.1), "end": (0.9, 0.1)}, "start")])
def test_a_run_returns_the_better_of_its_initial_and_final_weights(monkeypatch, scores, kept):
  monkeypatch.setattr(loop, "fresh_state", lambda run: types.SimpleNamespace(teacher={}))
  monkeypatch.setattr(loop.steps, "eval_variables", lambda state, which: "start")
  monkeypatch.setattr(loop, "evaluate_split", lambda run, variables, split, stopping, teacher: dict(
      zip(("val_accuracy", "val_loss"), scores[variables], strict=True)))
  run = types.SimpleNamespace(config=types.SimpleNamespace(eval_params="raw"))
  variables, reported = loop.better_of_start_and_end(run, "end", None)
  assert variables == reported["kept"] == kept
  assert reported["start_val_accuracy"] == scores["start"][0]
