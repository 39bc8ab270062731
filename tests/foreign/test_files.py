"""Foreign directories, indices and files: one call reads them, or one line says what is wrong."""
import contextlib
import json
import re
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import vitcompact as vc
from tests import tiny
from tests.cli import command
from tests.foreign.cases import cases, one_image
from vitcompact import convert, files, foreign_config, pytorch, trees
from vitcompact.models import fields_of

CASES = cases()
VIT, NPZ = CASES["transformers ViT"], CASES["Google vision_transformer"]
NAMES = ["tench", "goldfish", "shark", "ray", "cock"]
TOLD = [name for name, case in CASES.items() if case.config and case.model in vc.list_models()]


@pytest.fixture
def folder(tmp_path):
  """A transformers ViT in two shards of bfloat16, with its config."""
  labels = {str(i): name for i, name in enumerate(NAMES)}
  (tmp_path / "config.json").write_text(json.dumps({**VIT.config, "id2label": labels}))
  names = sorted(VIT.state)
  shards = {"model-00001-of-00002.safetensors": names[:20],
            "model-00002-of-00002.safetensors": names[20:]}
  for file, part in shards.items():
    safetensors.numpy.save_file({name: VIT.state[name].astype(ml_dtypes.bfloat16)
                                 for name in part}, tmp_path / file)
  weight_map = {name: file for file, part in shards.items() for name in part}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
      {"metadata": {"total_size": 1}, "weight_map": weight_map}))
  return tmp_path


def refusal(call, *arguments, **options):
  with pytest.raises((ValueError, OSError)) as error:
    call(*arguments, **options)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_transformers_directory_is_converted_without_naming_the_model(folder, tmp_path):
  out = tmp_path / "out.safetensors"
  printed = command.succeeds("convert", folder, "--out", out).splitlines()
  assert printed[0].startswith(f"{out}: vit_tiny_patch16_224, ")
  assert printed[1].startswith("config.json: vit_tiny_patch16_224, width=24, depth=2, ")
  assert printed[2:] == ["names: transformers', read as timm's",
                         "prefix taken off the names: vit."]
  model, variables = vc.load(out)
  assert convert.classes_of(out) == NAMES
  half = {name: value.astype(ml_dtypes.bfloat16) for name, value in VIT.state.items()}
  assert trees.digest(variables) == trees.digest(vc.from_torch(model, half))
  got = tiny.apply(model, variables, one_image(32))
  np.testing.assert_allclose(got, VIT.expected, atol=0.05)
  other = tmp_path / "other.safetensors"     # from the index itself, with other classes
  printed = command.succeeds("convert", folder / "model.safetensors.index.json", "--num-classes", 3,
                             "--reset-head", "--out", other)
  assert "initialised anew: head.weight, head.bias" in printed
  assert convert.classes_of(other) is None and vc.load(other)[0].num_classes == 3


def test_errors_name_the_index_of_a_single_shard_and_missing_parts(folder):
  shard = folder / "model-00002-of-00002.safetensors"
  message = refusal(pytorch.read_checkpoint, shard)
  assert message == (f"{shard} is one of 2 files of one model; give "
                     f"{folder}/model.safetensors.index.json")
  safetensors.numpy.save_file({"classifier.bias": np.zeros(5)}, shard)
  message = refusal(pytorch.read_checkpoint, folder)
  assert message.startswith(f"{shard} holds no vit.") and "fetch both again" in message
  shard.unlink()
  message = refusal(pytorch.read_checkpoint, folder)
  assert message.startswith(f"{shard}: no such file, but model.safetensors.index.json lists")


@pytest.mark.parametrize("text, words", [
    ("{", "is not an index of weights"), ("[]", "is not an index of weights"), ("{}", "KeyError"),
    ('{"weight_map": {}}', "its weight_map is empty"), ('{"weight_map": 3}', "is not an index"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "'../b.safetensors', which is not the name of"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "is not the name of a file in its directory"),
    ('{"weight_map": {"a": 3}}', "is not the name of a file in its directory")])
def test_an_empty_or_misdirected_index_is_refused(folder, text, words):
  path = folder / "model.safetensors.index.json"
  path.write_text(text)
  message = refusal(pytorch.read_checkpoint, folder)
  assert str(path) in message and words in message


def test_only_a_usual_file_name_in_a_directory_is_chosen_automatically(tmp_path):
  assert "no file of weights is in it" in refusal(files.weights_in, tmp_path)
  for name in ("b.safetensors", "a.npz"):
    (tmp_path / name).write_bytes(b"x")
  assert "choose one: b.safetensors, a.npz" in refusal(files.weights_in, tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  assert files.weights_in(tmp_path) == tmp_path / "pytorch_model.bin"
  (tmp_path / "model.safetensors").write_bytes(b"x")
  assert files.weights_in(tmp_path) == tmp_path / "model.safetensors"
  assert files.weights_in(tmp_path / "a.npz") == tmp_path / "a.npz"


@pytest.mark.parametrize("name", TOLD)
def test_a_transformers_config_determines_model_and_sizes(name):
  case = CASES[name]
  spec = foreign_config.model_spec(case.config)
  got, expected = (fields_of(vc.create_model(model, **fields)) for model, fields in (
      (spec.model, spec.fields), (case.model, case.fields)))
  assert {**got, "drop_path_rate": 0} == {**expected, "drop_path_rate": 0}
  assert spec.classes is None   # LABEL_0, LABEL_1 are not real names


def test_published_configs_give_the_published_models():
  base = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 768,
          "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
          "image_size": 320, "id2label": {"1": "b", "0": "a"}, "hidden_act": "gelu"}
  spec = foreign_config.model_spec(base)
  assert spec == ("vit_base_patch16_224", {"image_size": 320, "num_classes": 2}, ["a", "b"])
  assert foreign_config.model_spec({"model_type": "vit", "architectures": ["ViTModel"]}) == (
      "vit_base_patch16_224", {"num_classes": 0}, None)
  timm = {"architecture": "deit_small_patch16_224", "num_classes": 3, "global_pool": "avg",
          "model_args": {"img_size": 384}, "label_names": ["x", "y", "z"],
          "pretrained_cfg": {"input_size": [3, 224, 224]}}
  assert foreign_config.model_spec(timm) == (
      "deit_small_patch16_224", {"image_size": 384, "num_classes": 3, "global_pool": "avg"},
      ["x", "y", "z"])
  timm |= {"label_names": {"2": "z", "10": "w", "0": "x"}}   # in numeric order
  assert foreign_config.model_spec(timm).classes == ["x", "z", "w"]
  pyramid = {"model_type": "pvt_v2", "image_size": {"height": 224, "width": 320},
             "hidden_act": "gelu", "mlp_ratios": [8, 8, 4, 4], "depths": [2, 2, 2, 2],
             "hidden_sizes": [32, 64, 160, 256], "num_attention_heads": [1, 2, 5, 8],
             "sr_ratios": [8, 4, 2, 1], "architectures": ["PvtV2Model"]}
  assert foreign_config.model_spec(pyramid) == (
      "pvt_v2_b0", {"image_size": (224, 320), "num_classes": 0}, None)
  # Its classifier reads class token and mean together, unlike our model.
  dino = {"model_type": "dinov2", "architectures": ["Dinov2ForImageClassification"],
          "id2label": {"0": "a", "1": "b"}}
  spec = foreign_config.model_spec(dino)
  assert spec.classes is None and "num_classes" not in spec.fields
  pvt = {"architecture": "pvt_v2_b0", "num_classes": 1000, "global_pool": "avg"}
  assert foreign_config.model_spec(pvt) == ("pvt_v2_b0", {}, None)


@pytest.mark.parametrize("config, words", [
    ("{", "Expecting"), ("[3]", ""), ("{}", "neither timm's architecture nor transformers'"),
    ('{"model_type": "swin"}', "no model here is of model_type 'swin'"),
    ('{"model_type": "vit", "hidden_act": "relu"}', "its hidden_act is 'relu'"),
    ('{"architecture": "resnet50"}', "unknown model 'resnet50'"),
    ('{"architecture": "pvt_v2_b0", "model_args": {"linear": true}}', "is not an option of pvt")])
def test_a_config_without_a_known_model_is_refused_with_a_remedy(folder, config, words):
  (folder / "config.json").write_text(config)
  message = refusal(pytorch.from_checkpoint, folder, None, folder / "out.safetensors")
  assert message.startswith(f"{folder / 'config.json'} does not describe a known model")
  assert words in message
  assert "as in --model deit_small_patch16_224" in message
  (folder / "config.json").unlink()
  message = refusal(pytorch.from_checkpoint, folder, None, folder / "out.safetensors")
  assert message.startswith("--model is missing, and there is no config.json next to")


def test_googles_npz_is_read_in_bfloat16_and_for_another_size(tmp_path):
  path, out = tmp_path / "S_16.npz", tmp_path / "out.safetensors"
  half = {name: value.astype(ml_dtypes.bfloat16) for name, value in NPZ.state.items()}
  np.savez(path, **half)
  assert all(value.dtype == ml_dtypes.bfloat16 for value in pytorch.read_checkpoint(path).values())
  model = vc.create_model(NPZ.model, **NPZ.fields)
  got = vc.from_torch(model, pytorch.read_checkpoint(path))
  assert trees.digest(got) == trees.digest(vc.from_torch(model, half))
  large = convert.read_state_dict(model.clone(image_size=48), NPZ.state)
  assert large.lines() == ["names: Google's, read as timm's",
                           "left out, the layer before the classifier of pre-training: "
                           "pre_logits/bias, pre_logits/kernel", "resized: pos_embed"]
  message = refusal(pytorch.from_checkpoint, path, None, out)
  assert "--model is missing" in message and not out.exists()


@contextlib.contextmanager
def loading(monkeypatch, load):
  """Replaces torch by a stand-in whose load is `load(allowed names)`."""
  allowed = {}

  @contextlib.contextmanager
  def safe_globals(classes):
    allowed.clear()
    allowed.update({entry[1]: entry[0] for entry in classes if isinstance(entry, tuple)})
    yield
  torch = types.SimpleNamespace(
      load=lambda *_, **__: load(allowed),
      serialization=types.SimpleNamespace(
          safe_globals=safe_globals,
          get_unsafe_globals_in_checkpoint=lambda _: sorted({"a.Box", "a.Thing"} - {*allowed})))
  monkeypatch.setitem(sys.modules, "torch", torch)
  yield


def test_classes_in_a_pickle_are_replaced_by_inert_ones_of_that_name(tmp_path, monkeypatch):
  path = tmp_path / "run.ckpt"
  path.write_bytes(b"x")
  state = vc.to_torch(tiny.deit(depth=1), tiny.init(tiny.deit(depth=1)))

  def load(allowed):
    for name in ("a.Thing", "a.Box"):
      if name not in allowed:
        raise RuntimeError(f"Unsupported global: GLOBAL {name} was not an allowed global")
    box = allowed["a.Box"]()
    if not isinstance(box, dict):
      raise RuntimeError(f"Can only SETITEMS for dict, but got {type(box)}")
    box.update(state)
    return {"model": box, "thing": allowed["a.Thing"](1, x=2)}

  with loading(monkeypatch, load):
    message = refusal(pytorch.read_checkpoint, path)
    assert "it holds more than weights, a.Box, a.Thing; " in message
    assert "--allow a.Box --allow a.Thing reads it without objects of these classes" in message
    message = refusal(pytorch.read_checkpoint, path, allow=["a.Box"])
    assert "more than weights, a.Thing; " in message
    for options in ({"allow": ["a.Box", "a.Thing"]}, {"ignore_records": True}):
      got = pytorch.read_checkpoint(path, **options)
      assert isinstance(got["thing"], pytorch.Record)
      assert trees.digest(vc.from_torch(tiny.deit(depth=1), got)) == trees.digest(
          vc.from_torch(tiny.deit(depth=1), state))
    out = tmp_path / "out.safetensors"
    message = command.fails("convert", path, "--model", "deit_tiny_patch16_224", "--out", out,
                            "--allow", "a.Box", "--allow", "a.Thing")
    assert "does not fit deit_tiny" in message and not out.exists()

  def refuse(_):
    raise RuntimeError("GLOBAL posix.system whose module posix is blocked")
  with loading(monkeypatch, refuse):
    message = refusal(pytorch.read_checkpoint, path, allow=["posix.system"], ignore_records=True)
    assert "more than weights, posix.system" in message and "--allow" not in message


class Box(dict):
  """Like Lightning's AttributeDict, a subclass of dict."""


class Line(list):
  pass


def touch(path):
  open(path, "w").close()


def test_torch_reads_allowed_classes_and_runs_none_of_their_code(tmp_path):
  torch = pytest.importorskip("torch")
  import collections
  state = {"a.weight": torch.ones(2, 2)}
  box = Box(state=state)
  box.extra = 3
  torch.save({"model": state, "box": box, "line": collections.deque([1, 2]),
              "counts": collections.defaultdict(list, {"a": [1]})}, tmp_path / "run.pth")
  message = refusal(pytorch.read_checkpoint, tmp_path / "run.pth")
  name = re.search(r"--allow (\S+Box)", message)[1]
  got = pytorch.read_checkpoint(tmp_path / "run.pth", allow=[name])
  assert got["box"]["state"].keys() == state.keys() and not isinstance(got["box"], Box)
  assert got["line"] == [1, 2] and got["counts"] == {"a": [1]}
  torch.save({"model": state, "line": Line([1])}, tmp_path / "line.pth")
  got = pytorch.read_checkpoint(tmp_path / "line.pth", ignore_records=True)
  assert got["line"] == [1] and not isinstance(got["line"], Line)
  ran = tmp_path / "ran"

  class Evil:
    def __reduce__(self):
      return touch, (str(ran),)
  torch.save({"model": state, "evil": Evil()}, tmp_path / "evil.pth")
  message = refusal(pytorch.read_checkpoint, tmp_path / "evil.pth")
  assert "more than weights" in message
  pytorch.read_checkpoint(tmp_path / "evil.pth", ignore_records=True)
  assert not ran.exists()
