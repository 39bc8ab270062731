"""Weights by name: what is fetched, cached, verified and refused; a local server is the hub."""
import dataclasses
import hashlib
import json
import os
import re
import sys
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from PIL import Image

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import convert, hub, pytorch, trees
from vitcompact.cli import bench as cli_bench
from vitcompact.cli import count as cli_count
from vitcompact.hub import config, download
from vitcompact.models import tags
from vitcompact.train import build

REPO = "timm/deit_tiny_patch16_224.fb_in1k"
NAME = "deit_tiny_patch16_224"
SIZES = {key: tiny.SIZES[key] for key in ("width", "heads", "image_size", "patch_size")}
SIZES |= {"depth": 1}
ARGS = {"embed_dim": 24, "num_heads": 4, "img_size": 32, "patch_size": 8, "depth": 1}


def network(seed=1, name=NAME, **fields):
  """Returns (model, variables, timm's file) of a small model of a thousand classes."""
  model = vc.create_model(name, **{**SIZES, **fields})
  variables = tiny.init(model, seed)
  return model, variables, safetensors.numpy.save(vc.to_torch(model, variables))


def same(variables, others) -> bool:
  return not trees.differences(variables, others) and jax.tree.all(
      jax.tree.map(lambda a, b: np.array_equal(a, b), variables, others))


def timm_config(**about) -> bytes:
  """Returns a config.json as timm writes it."""
  return json.dumps({
      "architecture": NAME, "num_classes": 3, "num_features": 24, "global_pool": "token",
      "label_names": ["cat", "dog", "fish"], "model_args": ARGS,
      "pretrained_cfg": {"tag": "fb_in1k", "input_size": [3, 32, 32], "fixed_input_size": True,
                         "interpolation": "bilinear", "crop_pct": 0.95, "crop_mode": "center",
                         "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "num_classes": 3},
      **about}).encode()


# --- names with tags ---

WITH_WEIGHTS = [name for name in vc.list_models() if name in tags.table()]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_plain_name_preprocesses_images_for_its_default_weights(name):
  tag, _ = tags.row_of(name)
  plain, tagged = vc.create_model(name), vc.create_model(f"{name}.{tag}")
  assert vc.preprocess(plain) == vc.preprocess(tagged)
  assert (plain.num_classes, plain.image_size) == (tagged.num_classes, tagged.image_size)


def test_the_tag_decides_classes_size_and_preprocessing():
  model = vc.create_model("nextvit_small.bd_in1k_384")
  assert (model.image_size, vc.preprocess(model).crop, model.num_classes) == (384, 1.0, 1000)
  assert vc.create_model("vit_small_patch16_224.augreg_in21k").num_classes == 21843
  dino = vc.create_model("vit_small_patch16_224.dino")
  assert dino.num_classes == 0 and vc.preprocess(dino).mean == (0.485, 0.456, 0.406)
  assert vc.preprocess(vc.create_model("vit_small_patch16_224")).mean == (0.5, 0.5, 0.5)
  assert vc.create_model("vit_small_patch16_224.dino", num_classes=7).num_classes == 7


def test_the_tag_is_saved_with_the_model(tmp_path):
  model = vc.create_model("vit_tiny_patch16_224.augreg_in21k", **SIZES, num_classes=3)
  vc.save(tmp_path / "a.safetensors", model, tiny.init(model))
  assert vc.load(tmp_path / "a.safetensors")[0] == model
  assert convert.with_fields(model, image_size=16).variant == model.variant


def test_every_listed_name_with_a_tag_can_be_created():
  assert vc.list_models("vit_small_patch16_224", pretrained=True) == [
      f"vit_small_patch16_224.{tag}"
      for tag in ("augreg_in21k_ft_in1k", "augreg_in1k", "augreg_in21k", "dino")]
  assert vc.list_models("*.dino", pretrained=True)
  for name in vc.list_models(pretrained=True):
    assert vc.create_model(name).variant == name
    row = tags.row_of(*name.split("."))[1]
    assert ("hub" in row) != ("url" in row)
  # timm has these networks without weights, or does not have them.
  assert {name for name in set(vc.list_models()) - set(WITH_WEIGHTS)
          if not name.startswith(("inline_", "biformer_", "transnext_"))} <= {
      "vit_large_patch14_224", "davit_large", "davit_huge", "davit_giant"}


@pytest.mark.parametrize("name, words", [
    ("deit_tiny_patch16_224.fb_in2k", "did you mean deit_tiny_patch16_224.fb_in1k"),
    ("vit_small_patch16_224.augreg", "augreg_in21k_ft_in1k, augreg_in1k, augreg_in21k, dino"),
    ("deit_tini_patch16_224.fb_in1k", "did you mean deit_tiny_patch16_224"),
    ("deit", "unknown model"), ("", "not a name of weights"), (3, "not a name of weights")])
def test_an_unknown_name_or_tag_is_refused_with_the_known_ones(name, words):
  with pytest.raises(ValueError, match=re.escape(words)) as error:
    vc.pretrained(name)
  assert "\n" not in str(error.value)
  if isinstance(name, str) and "." in name:
    with pytest.raises(ValueError, match=re.escape(words)):
      vc.create_model(name)


# --- the hub ---

def test_weights_by_name_are_fetched_once(server):
  _, variables, file = network()
  commit = server.add(REPO, model__safetensors=file)
  got, weights = vc.pretrained(NAME, **SIZES)
  assert got == vc.create_model(f"{NAME}.fb_in1k", **SIZES) and same(weights, variables)
  assert server.gets("/large/") == 1
  found = hub.fetch(f"{NAME}.fb_in1k", **SIZES)
  assert server.gets("/large/") == 1 and same(found.variables, variables)
  assert found.source == f"hf-hub:{REPO}@{commit}"
  assert found.digest == hashlib.sha256(file).hexdigest()


def test_a_revision_keeps_its_weights(server):
  _, old, file = network(1)
  commit = server.add(REPO, model__safetensors=file)
  vc.pretrained(NAME, **SIZES)
  _, new, file = network(2)
  server.add(REPO, model__safetensors=file)
  before = len(server.asked)
  assert same(vc.pretrained(NAME, revision=commit, **SIZES)[1], old)
  assert len(server.asked) == before      # a commit never changes: no request
  assert same(vc.pretrained(NAME, **SIZES)[1], new)
  with pytest.raises(ValueError, match="no revision 'v2'; leave it out"):
    vc.pretrained(NAME, revision="v2", **SIZES)


@pytest.mark.parametrize("by_environment", [False, True])
def test_offline_the_cache_is_used_and_errors_say_how_to_fetch(server, monkeypatch,
                                                               by_environment):
  _, variables, file = network()
  server.add(REPO, model__safetensors=file)
  options = {"offline": True, **SIZES}
  if by_environment:
    monkeypatch.setenv(download.ASK_OFFLINE, "1")
    options = SIZES
  with pytest.raises(FileNotFoundError, match=re.escape(
      f"model.safetensors of hf-hub:{REPO} is not in the cache, and offline; with a network this "
      f"fetches it: hf download {REPO} model.safetensors")):
    vc.pretrained(NAME, **options)
  assert not server.asked
  vc.pretrained(NAME, **{**options, "offline": False})
  before = len(server.asked)
  assert same(vc.pretrained(NAME, **options)[1], variables)
  assert len(server.asked) == before


def test_the_cache_is_used_if_the_hub_does_not_answer(server, monkeypatch):
  _, variables, file = network()
  server.add(REPO, model__safetensors=file)
  vc.pretrained(NAME, **SIZES)
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")     # no server there
  waits = []
  monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
  assert same(vc.pretrained(NAME, **SIZES)[1], variables)
  with pytest.raises(FileNotFoundError, match="is not in the cache, and no answer from the hub"):
    vc.pretrained("deit_small_patch16_224")
  # Only for the first file, though any of four could hold the weights.
  assert 0 < len(waits) <= 5


def test_the_suggested_command_names_the_users_cache(server, tmp_path):
  with pytest.raises(FileNotFoundError, match=f"--revision v1 --cache-dir {tmp_path}/mine"):
    vc.pretrained(NAME, offline=True, revision="v1", cache_dir=tmp_path / "mine")


def test_damage_is_detected_in_transfer_and_in_the_cache(server):
  _, _, file = network()
  server.add(REPO, model__safetensors=file)
  bad = file[:-1] + bytes([file[-1] ^ 1])
  server.lies[hashlib.sha256(file).hexdigest()] = bad
  with pytest.raises(ValueError, match="is damaged, or another file: its sha256 is .*"
                     f"`hf download {REPO} model.safetensors --force-download` fetches it again"):
    vc.pretrained(NAME, **SIZES)


def test_a_digest_from_the_user_is_checked(server):
  _, variables, file = network()
  server.add(REPO, model__safetensors=file)
  digest = hashlib.sha256(file).hexdigest()
  assert same(vc.pretrained(NAME, sha256=digest[:12].upper(), **SIZES)[1], variables)
  with pytest.raises(ValueError, match="not 0123456789"):
    vc.pretrained(NAME, sha256="0123456789", **SIZES)
  with pytest.raises(ValueError, match="must be 8 to 64 hexadecimal digits"):
    vc.pretrained(NAME, sha256="abc", **SIZES)


def test_missing_repositories_weights_and_configs_are_distinguished(server):
  with pytest.raises(ValueError, match="no such repository, or a private one"):
    vc.pretrained("hf-hub:org/nothing")
  server.add("org/name", **{"config.json": timm_config(), "README.md": b"# hi"})
  with pytest.raises(ValueError, match=r"no file of weights; looked for: model\.safetensors"):
    vc.pretrained("hf-hub:org/name")
  server.add("org/weights", model__safetensors=network()[2])
  with pytest.raises(ValueError, match=r"org/weights has no config\.json"):
    vc.pretrained("hf-hub:org/weights")
  server.gated.add("org/name")
  with pytest.raises(ValueError, match="wants its licence accepted"):
    vc.pretrained("hf-hub:org/name")
  with pytest.raises(ValueError, match="expected hf-hub:org/name"):
    vc.pretrained("hf-hub:org name")
  with pytest.raises(ValueError, match="two revisions"):
    vc.pretrained("hf-hub:org/name@a", revision="b")


def test_the_error_for_a_missing_extra_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=re.escape("pip install 'vitcompact[hub]'")):
    vc.pretrained(NAME)


def test_another_number_of_classes_keeps_the_backbone_and_warns(server):
  _, variables, file = network()
  server.add(REPO, model__safetensors=file)
  with pytest.warns(UserWarning, match="the one of 1000 classes was left out; a new one of 5 "):
    model, weights = vc.pretrained(NAME, num_classes=5, **SIZES)
  assert model.num_classes == 5 and weights["params"]["head"]["kernel"].shape == (24, 5)
  assert not trees.differences(weights, tiny.init(model))
  assert same(weights["params"]["blocks_0"], variables["params"]["blocks_0"])


@pytest.mark.filterwarnings("error")
def test_zero_classes_drop_the_classifier_silently(server):
  server.add(REPO, model__safetensors=network()[2])
  model, weights = vc.pretrained(NAME, num_classes=0, **SIZES)
  assert model.num_classes == 0 and "head" not in weights["params"]


def test_a_plan_for_pretrained_weights_is_refused(server):
  server.add(REPO, model__safetensors=network()[2])
  with pytest.raises(ValueError, match=r"load them, then use vc\.compact"):
    vc.pretrained(NAME, plan=vc.Plan(heads=vc.HMHSA()), **SIZES)


def test_sharded_weights_are_fetched_and_verified_one_by_one(server):
  index = json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}})
  server.add("org/large", **{"model.safetensors.index.json": index.encode(),
                             "part-1.safetensors": b"one", "part-2.safetensors": b"two"})
  found = hub.find("hf-hub:org/large", model=NAME)
  assert [part.path.read_bytes() for part in found.parts] == [b"one", b"two"]
  assert found.parts[0].digest == hashlib.sha256(b"one").hexdigest()
  bad = json.dumps({"weight_map": {"a": "../secret.safetensors"}})
  server.add("org/bad", **{"model.safetensors.index.json": bad.encode()})
  with pytest.raises(ValueError, match="is not the name of a file in its directory"):
    hub.find("hf-hub:org/bad", model=NAME)


# --- URLs ---

def test_a_url_is_downloaded_once_and_verified_by_its_name(server):
  _, variables, file = network()
  name = f"deit_tiny-{hashlib.sha256(file).hexdigest()[:8]}.safetensors"
  server.files[name] = file
  address = f"{server.address}/files/{name}"
  options = {"model": NAME, **SIZES}
  with pytest.raises(FileNotFoundError, match=f"curl -L .*{name}"):
    vc.pretrained(address, offline=True, **options)
  assert same(vc.pretrained(address, **options)[1], variables)
  assert same(vc.pretrained(address, offline=True, **options)[1], variables)
  assert server.gets(name) == 1
  server.files[name] = file[:-1] + b"x"
  other = f"{server.address}/files/{name}?again"
  with pytest.raises(ValueError, match="it was not kept; check the address"):
    vc.pretrained(other, **options)
  with pytest.raises(ValueError, match="it was not kept"):     # and indeed it was not
    vc.pretrained(other, **options)
  with pytest.raises(ValueError, match="404"):
    vc.pretrained(f"{server.address}/files/nothing.pth", model=NAME)
  with pytest.raises(ValueError, match="must end in"):
    vc.pretrained(f"{server.address}/files/", model=NAME)


def test_a_url_without_a_digest_is_verified_against_the_first_download(server, tmp_path):
  server.files["weights.safetensors"] = network()[2]
  address = f"{server.address}/files/weights.safetensors"
  with pytest.raises(ValueError, match="name it with model=NAME"):
    vc.pretrained(address)
  found = hub.fetch(address, model=NAME, cache_dir=tmp_path / "mine", **SIZES)
  assert found.source == address
  (path,) = (tmp_path / "mine").rglob("weights.safetensors")
  path.write_bytes(path.read_bytes()[:-1] + b"x")
  with pytest.raises(ValueError, match=r"damaged.*remove it to download"):
    hub.fetch(address, model=NAME, cache_dir=tmp_path / "mine", **SIZES)


def test_the_authors_weights_come_from_their_url(server, monkeypatch):
  sizes = {"widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1),
           "image_size": 64}
  model = vc.create_model("pvt_tiny", **sizes)
  variables = tiny.init(model)
  server.files["pvt_tiny.safetensors"] = safetensors.numpy.save(
      vc.to_torch(model, variables, names="authors"))
  _, row = tags.row_of("pvt_tiny")
  assert row["url"].startswith("https://github.com/whai362/PVT/releases/download/")
  monkeypatch.setitem(row, "url", f"{server.address}/files/pvt_tiny.safetensors")
  assert same(vc.pretrained("pvt_tiny", **sizes)[1], variables)
  with pytest.raises(ValueError, match="is not a repository, and has no revisions"):
    vc.pretrained("pvt_tiny", revision="main")


# --- foreign repositories and folders ---

def test_a_timm_repository_describes_its_model_and_images(server):
  model, variables, file = network(num_classes=3)
  server.add("me/pets", **{"config.json": timm_config(), "model.safetensors": file})
  found = hub.fetch("hf-hub:me/pets")
  assert found.model == model.clone(variant=f"{NAME}.fb_in1k") and same(found.variables, variables)
  assert found.classes == ["cat", "dog", "fish"]
  assert found.preprocess == dataclasses.replace(
      vc.preprocess(model), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), crop=0.95,
      interpolation="bilinear")
  assert vc.preprocess("hf-hub:me/pets") == found.preprocess
  with pytest.warns(UserWarning, match="the one of 3 classes"):
    vc.pretrained("hf-hub:me/pets", num_classes=2)


def test_a_local_folder_is_read_like_a_repository(tmp_path):
  model, variables, file = network(num_classes=3)
  (tmp_path / "config.json").write_bytes(timm_config())
  (tmp_path / "model.safetensors").write_bytes(file)
  for name in (tmp_path, f"local-dir:{tmp_path}"):
    got, weights = vc.pretrained(name)
    assert got == model.clone(variant=f"{NAME}.fb_in1k") and same(weights, variables)
  with warnings.catch_warnings(action="error"):   # the number of classes is as requested
    named, weights = vc.pretrained(tmp_path / "model.safetensors", model=NAME, num_classes=3,
                                   **SIZES)
  assert named == model and same(weights, variables)
  with pytest.warns(UserWarning, match="a new one of 4 classes is initialised"):
    vc.pretrained(tmp_path / "model.safetensors", model=NAME, num_classes=4, **SIZES)
  (tmp_path / "config.json").unlink()
  with pytest.raises(ValueError, match="does not say which model it is of"):
    vc.pretrained(tmp_path)
  with pytest.raises(FileNotFoundError, match="no such file or folder"):
    vc.pretrained(tmp_path / "nothing")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="no file of weights"):
    vc.pretrained(tmp_path / "empty")


def test_squashed_images_and_other_channels_are_read_from_a_config():
  about = json.loads(timm_config(model_args={**ARGS, "in_chans": 1}))
  about["pretrained_cfg"] |= {"crop_mode": "squash", "input_size": [1, 32, 32]}
  described = config.read("here", about)
  assert described.images["crop_mode"] == "squash" and described.fields["in_chans"] == 1
  model = vc.create_model(described.name, **described.fields)
  prepared = config.prepared(model, described.images)
  assert prepared.mean == pytest.approx((0.4,))
  assert prepared.crop is None or prepared.crop_mode == "squash"


@pytest.mark.parametrize("change, words", [
    ({"architecture": "resnet50"}, "unknown model 'resnet50'"),
    ({"model_args": {"qk_norm": True}}, "qk_norm=True"),
    ({"pretrained_cfg": {"mean": "white"}}, "has unknown settings for preparing images"),
    ({"pretrained_cfg": []}, "config.json")])
def test_an_unsupported_config_is_refused_in_one_line(tmp_path, change, words):
  (tmp_path / "config.json").write_bytes(timm_config(**change))
  (tmp_path / "model.safetensors").write_bytes(network(num_classes=3)[2])
  with pytest.raises(ValueError, match=re.escape(words)) as error:
    hub.fetch(tmp_path, **SIZES)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("about, name, fields", [
    ({"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
      "intermediate_size": 3072, "patch_size": 16, "image_size": 224, "num_channels": 3,
      "architectures": ["ViTModel"]}, "vit_base_patch16_224", {"num_classes": 0}),
    ({"model_type": "vit", "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3,
      "intermediate_size": 384, "patch_size": 8, "image_size": 96, "hidden_act": "gelu",
      "architectures": ["ViTForImageClassification"], "id2label": {"1": "dog", "0": "cat"}},
     "vit_tiny_patch16_224",
     {"depth": 4, "patch_size": 8, "image_size": 96, "mlp_ratio": 2.0, "num_classes": 2}),
    ({"model_type": "deit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
      "intermediate_size": 1536, "patch_size": 16, "image_size": 224,
      "architectures": ["DeiTForImageClassificationWithTeacher"],
      "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "deit_small_distilled_patch16_224",
     {"num_classes": 2}),
    ({"model_type": "pvt_v2", "hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2],
      "num_attention_heads": [1, 2, 5, 8], "image_size": {"height": 224, "width": 224},
      "architectures": ["PvtV2ForImageClassification"], "num_labels": 1000}, "pvt_v2_b0",
     {"num_classes": 1000})])
def test_a_transformers_config_gives_the_model_of_its_sizes(about, name, fields):
  described = config.read("here", about)
  assert vc.create_model(described.name, **described.fields) == vc.create_model(name, **fields)
  if "id2label" in about:
    assert described.classes == (["cat", "dog"] if "dog" in str(about) else None)


def test_class_names_are_ordered_by_number():
  names = {str(i): f"class {i}" for i in reversed(range(12))}     # as text, 10 comes before 2
  about = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "id2label": names}
  assert config.read("here", about).classes == [f"class {i}" for i in range(12)]
  about = json.loads(timm_config(num_classes=12, label_names=names))
  assert config.read("here", about).classes == [f"class {i}" for i in range(12)]
  about = json.loads(timm_config(label_names=["two", "names"]))    # for three classes
  assert config.read("here", about).classes is None


def test_the_preprocessing_of_transformers_is_read():
  about = {"model_type": "vit", "hidden_size": 768}
  told = {"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "resample": 2, "do_center_crop": True,
          "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
  assert config.read("here", about, told).images == {
      "mean": (0.5,) * 3, "std": (0.4,) * 3, "interpolation": "bilinear", "crop": 0.875}
  told = {"size": {"height": 224, "width": 224}, "resample": 3}
  assert config.read("here", about, told).images == {"interpolation": "bicubic", "crop": None}
  with pytest.raises(ValueError, match="'swin'"):
    config.read("here", {"model_type": "swin"})
  with pytest.raises(ValueError, match="architecture nor transformers' model_type"):
    config.read("here", {})


def test_the_preprocessing_of_foreign_weights_is_kept_along_the_path(tmp_path):
  model = tiny.deit()
  own = dataclasses.replace(vc.preprocess(model), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
                            interpolation="bilinear", crop=0.5)
  first, other = tmp_path / "first.safetensors", tmp_path / "other.safetensors"
  vc.save(first, model, tiny.init(model), preprocess=own)
  pytorch.from_checkpoint(str(first), None, other, image_size=64)
  assert vc.preprocess(other) == dataclasses.replace(own, image_size=(64, 64), crop=0.9)
  run = ConfigDict({"init_from": str(first),
                    "data": {"name": "folder:x", "eval_fit": "crop", "eval_crop": 0.7}})
  assert build.preprocess_of(run, model) == dataclasses.replace(own, crop=0.7)
  run.init_from = ""
  assert build.preprocess_of(run, model) == dataclasses.replace(vc.preprocess(model), crop=0.7)
  arrays, about = convert.read_safetensors(first)
  for pixels in ("{", "[1]", '{"mean": "x", "std": [1], "interpolation": "bicubic"}'):
    convert.write_safetensors(other, arrays, {**about, "pixels": pixels}, force=True)
    with pytest.raises(ValueError, match="its metadata has no valid mean and std"):
      vc.preprocess(other)


# --- push ---

@pytest.fixture(scope="module")
def small():
  """A folded compact model."""
  model = tiny.deit(vc.Plan(heads=vc.HMHSA(), tokens=vc.EViT(keep=0.5, blocks=(0,))), depth=1)
  return vc.fold(model, tiny.init(model))


def test_a_pushed_folder_is_read_back_bit_for_bit(small, tmp_path, monkeypatch):
  model, variables = small
  names = list("abcde")
  own = dataclasses.replace(vc.preprocess(model), mean=(0.1, 0.2, 0.3), crop=None)
  folder = vc.push(tmp_path / "out", model, variables, classes=names, preprocess=own)
  assert f"vc.pretrained({str(folder)!r})" in (folder / "README.md").read_text()
  assert sorted(os.listdir(tmp_path)) == ["out"]
  assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
  found = hub.fetch(folder)
  assert found.model == model and same(found.variables, variables)
  assert found.classes == names and found.preprocess == own == vc.preprocess(folder)
  about = json.loads((folder / "config.json").read_text())
  assert about["architecture"] == NAME and about["label_names"] == names
  assert about["pretrained_cfg"]["crop_mode"] == "squash"
  assert vc.Plan.parse(json.dumps(about["vitcompact"]["plan"])) == model.plan
  card = (folder / "README.md").read_text()
  assert f"{vc.count(model).params:,} | {vc.count(model).macs:,}" in card
  assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
  assert "Accuracy: not measured; no receipt of this model was given." in card and "warped" in card
  code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
  scope = {}
  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (40, 36)).save("photo.jpg")
  exec(code, scope)
  assert same(scope["variables"], variables) and scope["logits"].shape == (1, 5)


def test_a_pushed_repository_is_read_back_bit_for_bit(small, server, tmp_path):
  model, variables = small
  vc.push(tmp_path / "out", model, variables, card=False, repo="me/small")
  got, weights = vc.pretrained("hf-hub:me/small")
  assert got == model and same(weights, variables)
  other, weights = vc.pretrained("hf-hub:me/small", num_classes=0)
  assert other == model.clone(num_classes=0) and "head" not in weights["params"]


def test_push_overwrites_nothing_and_leaves_no_partial_folder(small, tmp_path, monkeypatch):
  model, variables = small
  folder = vc.push(tmp_path / "out", model, variables, card=False)
  (folder / "notes.txt").write_text("mine")
  before = (folder / "model.safetensors").read_bytes()
  with pytest.raises(ValueError, match=r"has model\.safetensors, config\.json already; name"):
    vc.push(folder, model, variables)
  with pytest.raises(ValueError, match="2 names of classes"):
    vc.push(folder, model, variables, classes=["a", "b"], force=True)
  assert (folder / "model.safetensors").read_bytes() == before
  assert os.listdir(tmp_path) == ["out"]
  vc.push(folder, model, variables, card=False, force=True)
  assert (folder / "notes.txt").read_text() == "mine"
  with pytest.raises(ValueError, match="is a file; name a folder"):
    vc.push(folder / "notes.txt", model, variables)
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match="pip install"):
    vc.push(tmp_path / "new", model, variables, repo="me/small")
  assert not (tmp_path / "new").exists()


def test_the_card_states_the_accuracy_in_the_models_receipt(small, tmp_path):
  model, variables = small
  row = {**vc.count(model)._asdict(), "name": "deployed", "test_accuracy": 0.875,
         "test_images": 1000, "accuracy_interval": [0.853, 0.894]}
  receipt = tmp_path / "receipt.json"
  receipt.write_text(json.dumps({"models": [row]}))
  folder = vc.push(tmp_path / "out", model, variables, receipt=tmp_path)
  text = (folder / "README.md").read_text()
  assert "Accuracy: 87.50% of 1,000 test images (95 % interval 85.30 to 89.40)" in text
  assert json.loads((folder / "receipt.json").read_text())["models"][0]["test_images"] == 1000
  command.succeeds("push", folder, "--out", tmp_path / "again", "--receipt", receipt)
  assert "87.50% of 1,000" in (tmp_path / "again/README.md").read_text()
  other = vc.create_model(NAME, **SIZES)
  with pytest.raises(ValueError, match="the receipt has no model of"):
    vc.push(tmp_path / "other", other, tiny.init(other), receipt=receipt)


# --- the command ---

def test_every_verb_accepts_weights_by_name(server, tmp_path):
  _, variables, file = network(num_classes=3)
  commit = server.add("me/pets", **{"config.json": timm_config(), "model.safetensors": file})
  Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save(tmp_path / "a.png")
  shown = command.succeeds("predict", "hf-hub:me/pets", tmp_path / "a.png")
  assert str(tmp_path / "a.png") in shown
  assert "| hf-hub:me/pets |" in command.succeeds("count", "hf-hub:me/pets")
  out = tmp_path / "pets.safetensors"
  printed = command.succeeds("convert", "hf-hub:me/pets", "--out", out)
  assert f"hf-hub:me/pets@{commit}" in printed and f"config.json: {NAME}.fb_in1k, " in printed
  model, weights = vc.load(out)
  assert same(weights, variables) and convert.classes_of(out) == ["cat", "dog", "fish"]
  about = convert.read_metadata(out)
  assert about["source"] == f"hf-hub:me/pets@{commit}"
  assert about["source_sha256"] == hashlib.sha256(file).hexdigest()
  assert vc.preprocess(out) == vc.preprocess("hf-hub:me/pets") != vc.preprocess(model)
  folder = tmp_path / "pushed"
  command.succeeds("push", out, "--out", folder)
  assert hub.fetch(folder).preprocess == vc.preprocess(out)
  assert f"hf-hub:me/pets@{commit}" in (folder / "README.md").read_text()
  assert "same function" in command.succeeds("verify", folder, "hf-hub:me/pets", "--images", 2)
  assert server.gets("/large/") == 1
  assert str(folder) in command.succeeds("count", folder)


def test_the_command_lists_tags_and_says_what_is_missing(server, monkeypatch):
  assert f"{NAME}.fb_in1k\n" in command.succeeds("models", "deit_*", "--pretrained")
  name = "vit_tiny_patch16_224.augreg_in21k"
  (row,) = cli_count.pairs([name], None, None)
  assert row[0] == name and [model.num_classes for model in row[2:]] == [21843, 21843]
  assert cli_bench.candidates(name, [], None)["dense"].num_classes == 21843
  monkeypatch.setenv(download.ASK_OFFLINE, "1")
  assert "hf download" in command.fails("predict", NAME, "a.png")
  assert "did you mean" in command.fails("predict", f"{NAME}.fb", "a.png")
