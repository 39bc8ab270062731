"""A finished run's receipt describes its deployed file."""
import errno
import hashlib
import json

import pytest
from ml_collections import FrozenConfigDict

import vitcompact as vc
from tests import tiny
from vitcompact import convert, files, trees
from vitcompact.run import loop, report


@pytest.mark.usefixtures("shared")
def test_the_receipt_and_the_file_describe_the_folded_model(built, tmp_path):
  """In bfloat16, whose rounding must not count as a difference of the two functions."""
  model = built.model.clone(dtype="bfloat16")
  variables = tiny.init(model)
  metrics = {"test_accuracy": 0.5, "val_accuracy": 0.25,
             "params_digest": trees.digest(variables["params"])}
  config = FrozenConfigDict({**built.config, "export": "stablehlo,safetensors"})
  report.report(loop.Result(config, model, None, variables, metrics), tmp_path)
  receipt = json.loads((tmp_path / "receipt.json").read_text())
  assert receipt["fold"]["ok"] and receipt["fold"]["images"] == report.TIMED_IMAGES
  deploy, folded = vc.fold(model, variables)
  found, loaded = convert.load(tmp_path / "deploy.safetensors")
  assert found == deploy
  assert convert.classes_of(tmp_path / "deploy.safetensors") == receipt["classes"]
  assert receipt["classes"] == list("0123456789")
  assert trees.digest(loaded["params"]) == receipt["deploy_digest"] == trees.digest(
      folded["params"])
  for name in ("trained", "deploy"):
    file = (tmp_path / f"{name}.safetensors").read_bytes()
    assert receipt[f"{name}_sha256"] == hashlib.sha256(file).hexdigest()
  assert "val_is_test" not in receipt
  for name, kind in (("HMHSA", vc.HMHSA), ("CFFN", vc.CFFN)):
    assert receipt[f"source of {name}"] == "; ".join(kind.provenance)
  [program] = receipt["exports"]   # deploy.safetensors is always written
  assert program["sha256"] == hashlib.sha256(
      (tmp_path / "deploy.stablehlo").read_bytes()).hexdigest()
  assert program["largest_difference"] < 1e-5
  rows = receipt["models"]
  assert [row["name"] for row in rows] == ["dense", "trained", "deployed"]
  assert rows[2]["params"] == trees.size(folded["params"]) < rows[0]["params"]
  assert rows[0]["test_accuracy"] is None and rows[1]["test_accuracy"] == 0.5
  correct = rows[2]["test_accuracy"] * 360
  assert correct == pytest.approx(round(correct), abs=1e-4) and correct > 0
  text = (tmp_path / "receipt.md").read_text()
  assert "same function" in text and "NOT" not in text and f"{rows[2]['params']:,}" in text
  assert text.count(program["sha256"]) == 1 and "exports" not in text
  assert f"| deploy.stablehlo | {program['runtime']} | " in text and "images | not run |" in text


def test_exported_files_are_listed_with_digest_proof_and_latency(tmp_path):
  pytest.importorskip("jax2onnx")
  model = tiny.deit()
  model, variables = vc.fold(model, tiny.init(model))
  onnx, weights = report.exports(("onnx", "safetensors"), tmp_path, model, variables,
                                 preprocess=vc.preprocess(model))
  for told in (onnx, weights):
    data = (tmp_path / told["file"]).read_bytes()
    assert told["sha256"] == hashlib.sha256(data).hexdigest() and told["largest_difference"] < 1e-5
  assert onnx["file"] == "deploy.onnx" and "ONNX Runtime" in onnx["runtime"]
  middle, low, high = onnx["speed_xla_is_1"]
  assert 0 < low <= middle <= high and "speed_xla_is_1" not in weights


def test_the_error_for_a_full_disk_says_that_the_run_is_done(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  model = tiny.deit()
  monkeypatch.setattr(files.os, "replace", full)
  with pytest.raises(OSError, match=r"the run is done, but .*deploy\.safetensors cannot be w"):
    report.write(tmp_path, tiny.receipt(), {"deploy": (model, tiny.init(model))})


@pytest.mark.parametrize("method, share", [
    (vc.Sparsifiner(keep=0.25, rank=4), 5 / 17),
    (vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0), 2 / 4),
    (vc.BiFormer(top_k=1, regions=2, min_tokens=0), 1 / 4)])
def test_the_receipt_states_the_share_of_scored_pairs(method, share):
  model = tiny.deit(vc.Plan(attention=method))
  [found] = report.method_facts(model, tiny.init(model), tiny.images(model)).values()
  assert found == pytest.approx(share, abs=0.06)   # the class token's row is dense
  assert report.method_facts(tiny.deit(), None, None) == {}
