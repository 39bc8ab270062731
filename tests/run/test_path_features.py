"""The whole path on a model without a classifier, with registers and LayerScale."""
import json

import numpy as np
import pytest

import vitcompact as vc
from configs import compact_digits
from tests import tiny
from vitcompact import convert
from vitcompact.data import pipeline
from vitcompact.run import loop, path
from vitcompact.train import build
from vitcompact.train import config as configs

NAME = "vit_small_patch14_reg4_dinov2"
SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "num_classes": 0}

SOURCE = {"source": f"hf-hub:timm/{NAME}.lvd142m@0123", "source_sha256": "4567"}


@pytest.fixture
def features(tmp_path):
  """A config of two steps for a file with a DINOv2 of one block."""
  config = compact_digits.get_config("runlocal")
  config.model.update(name=NAME, **SIZES)
  config.compact.update(macs=0.8, sensitivity="quick", images=32)
  config.total_steps = 2
  config.optim.warmup_steps = 0
  model = vc.create_model(f"{NAME}.lvd142m", **SIZES, drop_path_rate=0.0)
  vc.save(tmp_path / "dino.safetensors", model, tiny.init(model), about=SOURCE)
  config.init_from = str(tmp_path / "dino.safetensors")
  config.loss.update(logits=0.0, patches=1.0)
  return config


def test_a_model_without_a_classifier_completes_the_whole_path(features, tmp_path, monkeypatch):
  tiny.few_options(monkeypatch)
  receipt = path.run(features, tmp_path / "run", lambda line: None)
  told = json.loads((tmp_path / "run" / "receipt.json").read_text())
  assert [row.name for row in receipt.rows] == ["dense", "compacted", "distilled", "deployed"]
  assert receipt.ok and receipt.rows[-1].count.macs <= 0.8 * receipt.rows[0].count.macs
  assert {row["test_accuracy"] for row in told["models"]} == {None} and "classes" not in told
  assert {key: told[key] for key in SOURCE} == SOURCE
  for name in ("compact", "distilled", "deploy"):
    about = convert.read_metadata(tmp_path / "run" / f"{name}.safetensors")
    assert {key: about[key] for key in SOURCE} == SOURCE, name
  errors = told["feature_error"]
  assert errors["dense"] == 0 < errors["compacted"]
  assert errors["deployed"] == pytest.approx(errors["distilled"], rel=1e-3)
  if told["kept"] == "start":
    assert errors["distilled"] == errors["compacted"]
  deploy, variables = vc.load(tmp_path / "run" / "deploy.safetensors")
  assert deploy.num_classes == 0 and deploy.deploy
  pre = build.preprocess_of(configs.complete(features), deploy)
  count = pipeline.num_examples("digits", "test")
  images = pre.normalise(pipeline.sample(features.data, "test", count, pre))
  got, expected = tiny.apply(deploy, variables, images), vc.load(features.init_from)[0].apply(
      vc.load(features.init_from)[1], images)
  share = np.mean(np.sum((got - expected) ** 2, -1) / np.sum(expected ** 2, -1))
  assert share == pytest.approx(errors["deployed"], rel=1e-3)


@pytest.mark.parametrize("change,message", [
    ({"loss.logits": 1.0}, r"config.loss.logits=1.0 needs a classifier.*config.loss.patches"),
    ({"model.num_classes": 7}, r"num_classes=7, and digits has 10 classes; leave it out"),
    ({"init_from": "", "compact.dense_steps": 2}, r"config.loss.labels=1.0 needs a classifier")])
def test_settings_that_need_a_classifier_are_refused(features, tmp_path, change, message):
  features.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    config = configs.complete(features)
    if change.get("init_from") == "":
      path.prepare(config, tmp_path / "run", lambda line: None)
    config.update_from_flattened_dict({"teacher.file": features.init_from, "compact.macs": 0.0})
    loop.build(loop.resolve(config))
