"""Runs can start from weights by name, and use them as teacher, like our own files."""
import dataclasses
import json
import types

import numpy as np
import pytest
import safetensors.numpy

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import models, trees
from vitcompact.models import tags
from vitcompact.run import path
from vitcompact.train import build, start

REPO, NAME = "hf-hub:me/digits", "deit_tiny_patch16_224"
ARGS = {"embed_dim": 16, "num_heads": 2, "img_size": 8, "patch_size": 4, "depth": 2}
DIGITS = list("0123456789")


@pytest.fixture
def dense(built, server):
  """Returns (model, variables) of the tiny run's dense model, served in timm's format."""
  model = built.model.clone(plan=vc.Plan(), drop_path_rate=0.0)
  variables = tiny.init(model)
  about = {"architecture": NAME, "num_classes": 10, "label_names": DIGITS, "model_args": ARGS,
           "pretrained_cfg": {"input_size": [3, 8, 8], "crop_pct": 0.9, "num_classes": 10,
                              "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}}
  server.add("me/digits", **{"config.json": json.dumps(about).encode(), "model.safetensors":
                             safetensors.numpy.save(vc.to_torch(model, variables))})
  return model, variables


def test_run_starts_from_a_repository_and_uses_one_as_teacher(built, dense, server, config):
  model, variables = dense
  config.init_from = REPO
  assert build.preprocess_of(config, built.model).mean == (0.5, 0.4, 0.3)
  assert start.is_dense(REPO)
  images = start.calibration_images(built.config, built.preprocess)
  got = start.load_variables(REPO, built.model, lambda: images, DIGITS)
  _, expected = vc.compact(model, variables, built.model.plan, images=images)
  assert trees.digest(got) == trees.digest(expected)
  assert trees.digest(start.load_teacher(REPO, model, DIGITS)) == trees.digest(variables)
  requests = len(server.asked)
  server.add("me/digits", **{"model.safetensors": b"another"})
  start.load_teacher(REPO, model, DIGITS)
  assert len(server.asked) == requests    # a run uses a single commit


@pytest.mark.parametrize("tag", ["", ".fb_in1k"])
def test_run_starts_from_a_model_name(built, dense, server, monkeypatch, tag):
  model, variables = dense
  sizes = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 8}
  monkeypatch.setitem(models.VARIANTS, NAME, models.VARIANTS[NAME]._replace(sizes=sizes))
  for key, value in (("image_size", 8), ("num_classes", 10)):
    monkeypatch.setitem(tags.table()[NAME]["fb_in1k"], key, value)
  server.add(f"timm/{NAME}.fb_in1k", **{
      "model.safetensors": safetensors.numpy.save(vc.to_torch(model, variables))})
  assert trees.digest(start.load_teacher(NAME + tag, model)) == trees.digest(variables)


@pytest.mark.parametrize("written_by", ["push", "others", "others without config.json"])
def test_run_starts_from_a_folder(dense, tmp_path, config, written_by):
  model, variables = dense
  own_preprocess = dataclasses.replace(vc.preprocess(model), mean=(0.1, 0.2, 0.3))
  folder = tmp_path / "folder"
  if written_by == "push":
    vc.push(folder, model, variables, classes=DIGITS, preprocess=own_preprocess)
  else:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(
        safetensors.numpy.save(vc.to_torch(model, variables)))
    if written_by == "others":
      (folder / "config.json").write_text(json.dumps({
          "architecture": NAME, "num_classes": 10, "model_args": ARGS,
          "pretrained_cfg": {"mean": own_preprocess.mean}}))
    else:    # another program's, with no information on a model
      (folder / "config.json").write_text('{"learning_rate": 0.1}')
  assert trees.digest(start.load_teacher(str(folder), model)) == trees.digest(variables)
  config.init_from = str(folder)
  mean = build.preprocess_of(config, model).mean
  assert mean == (vc.preprocess(model).mean if "without" in written_by else own_preprocess.mean)


def test_other_classes_and_unknown_names_raise_one_line_errors(built, dense, server):
  model, _ = dense
  with pytest.raises(ValueError, match=r"init_from='hf-hub:me/digits'.*output 0 is '0' there"):
    start.load_variables(REPO, model, None, DIGITS[::-1])
  with pytest.raises(ValueError, match=r"teacher.file='deit_tini'|unknown model 'deit_tini'.*mean"):
    start.load_teacher("deit_tini", model)
  with pytest.raises(ValueError, match="hf-hub:me/nothing: no such repository") as error:
    start.is_dense("hf-hub:me/nothing")
  assert "\n" not in str(error.value)


def test_path_and_compact_command_accept_a_repository(dense, server, monkeypatch, tmp_path, config):
  """The dense model is the cached file, and nothing is converted a second time."""
  configs = []
  receipt = types.SimpleNamespace(ok=True, to_markdown=lambda: "# a receipt")
  with monkeypatch.context() as patch:
    patch.setattr(path, "run", lambda config, out, say: configs.append(config) or receipt)
    command.succeeds("compact", REPO, "--data", "digits", "--macs", "0.7", "--out", tmp_path / "a")
  assert trees.digest(vc.load(configs[0].init_from)[1]) == trees.digest(dense[1])
  (tmp_path / "run").mkdir()
  vc.save(tmp_path / "run/compact.safetensors", *dense)
  monkeypatch.setattr(path, "measure_plan_compact", lambda config, directory, *_: [
      (directory / name).write_text("{}") for name in ("plan.json", "plan.txt")])
  config.init_from, config.compact.macs = REPO, 0.7
  begun = path.prepare(config, tmp_path / "run", lambda line: None)
  assert str(begun.dense) == begun.config.teacher.file == configs[0].init_from
  assert begun.facts["source"] == f"{REPO}@{server.commit('me/digits', 0)}"
  assert np.array_equal(vc.load(begun.dense)[1]["params"]["cls_token"],
                        dense[1]["params"]["cls_token"])
