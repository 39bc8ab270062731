"""Conversion: PyTorch's logits, lossless round trips, and an error that names every mistake."""
import argparse
import contextlib
import functools
import json
import pathlib
import re
import resource
import struct
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

import vitcompact as vc
from tests import tiny
from tests.cli import command
from tests.models import parity
from vitcompact import convert, fit, pytorch, torch_names, trees

FAMILIES = ("deit", "compact_deit")   # tests/models has those of the others


@functools.cache
def runs(family):
  return parity.runs(family)


def plain():
  return runs("deit")[0]


def same(got, wanted):
  return got.keys() == wanted.keys() and all(
      np.array_equal(got[name], wanted[name]) for name in wanted)


def zeros(name):
  """Returns a state dict of zeros for a named model."""
  model = vc.create_model(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tiny.images(model, batch=1))
  return vc.to_torch(model, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))


@pytest.mark.parametrize("family,index", [("deit", i) for i in range(8)] +
                         [("compact_deit", i) for i in range(6)])
def test_logits_are_those_of_pytorch(family, index):
  assert parity.difference(runs(family)[index]) < 1e-4


def test_a_wrong_epsilon_would_be_noticed():
  plain, probed = (run._replace(model=run.model.clone(epsilon=1e-5)) for run in runs("deit")[:2])
  assert parity.difference(plain) < 1e-4       # ordinary activations hide it
  assert parity.difference(probed) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_the_identity_bit_for_bit(family):
  for run in runs(family):
    if run.name.split("-")[1] != "48x32":   # positions are resized for that one
      variables = vc.from_torch(run.model, run.state)
      assert same(vc.to_torch(run.model, variables), run.state)
      assert same(vc.to_torch(run.model, variables, names="authors"), run.state)


def test_a_compacted_model_goes_to_pytorch_and_back():
  model = tiny.deit()
  plan = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(), blocks={1: {"ffn": None}})
  with pytest.warns(UserWarning, match="without calibration images"):
    small = vc.compact(model, tiny.init(model), plan)
  with pytest.raises(ValueError, match="fold a compact DeiT to write it"):
    vc.to_torch(*small)
  deploy, folded = vc.fold(*small)
  state = vc.to_torch(deploy, folded)
  assert state["blocks.0.attn.qkv.weight"].shape == ((2 + 2 + 4) * 6, 24)
  assert state["blocks.0.mlp.fc2.a.weight"].shape == (12, 96)
  assert {name for name in state if name.startswith("blocks.1.mlp")} == {
      f"blocks.1.mlp.fc{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}
  assert trees.digest(vc.from_torch(deploy, state)) == trees.digest(folded)


def test_containers_prefixes_and_half_precision_are_understood():
  run = plain()
  expected = trees.digest(vc.from_torch(run.model, run.state))
  wrapped = {f"module._orig_mod.{name}": array for name, array in run.state.items()}
  for checkpoint in (wrapped, {"model": wrapped, "epoch": 3}):
    assert trees.digest(vc.from_torch(run.model, checkpoint)) == expected
  half = {name: array.astype(np.float16) for name, array in run.state.items()}
  got = vc.from_torch(run.model, half)
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}
  np.testing.assert_array_equal(got["params"]["norm"]["bias"], np.float32(half["norm.bias"]))


def test_dropped_resized_and_reinitialised_tensors_are_reported():
  run = plain()
  state = {**run.state, "bn.num_batches_tracked": np.array(7)}
  loaded = convert.read_state_dict(run.model, state)
  assert (loaded.dropped, loaded.resized, loaded.reset) == (["bn.num_batches_tracked"], [], [])
  model = run.model.clone(image_size=48, num_classes=3)
  loaded = convert.read_state_dict(model, state, reset_head=True)
  assert loaded.resized == ["pos_embed"] and loaded.reset == ["head.weight", "head.bias"]
  assert loaded.variables["params"]["head"]["kernel"].shape == (24, 3)
  assert 0.005 < loaded.variables["params"]["head"]["kernel"].std() < 0.04
  features = convert.read_state_dict(run.model.clone(num_classes=0), state, reset_head=True)
  assert {"head.weight", "head.bias"} <= set(features.dropped)
  assert "head" not in features.variables["params"]


def test_positions_are_resized_as_pytorch_resizes_them():
  # The squares of 0..8 on a 3x3 grid, resized to 4x4 by torch's bicubic interpolate.
  tokens = np.concatenate([[[-5.0]], (np.arange(9.0)[:, None] ** 2)])[None]
  got = torch_names.resize_positions(tokens, (3, 3), torch_names.Positions((4, 4), 1))[0, :, 0]
  assert got[0] == -5
  np.testing.assert_allclose(got[1:5], [-0.6869, -0.5641, 0.9118, 2.6771], atol=1e-4)
  np.testing.assert_allclose(got[-4:], [36.9740, 44.8336, 58.4047, 67.9069], atol=1e-4)
  line = torch_names.resize_matrix(2, 4, "bilinear") @ [0, 1]
  np.testing.assert_allclose(line, [0, 0.25, 0.75, 1])
  for method in ("bicubic", "bilinear"):
    np.testing.assert_array_equal(torch_names.resize_matrix(5, 5, method), np.eye(5))
    np.testing.assert_allclose(torch_names.resize_matrix(7, 4, method).sum(axis=1), 1)


def test_resized_kernels_respond_to_enlarged_patches_as_before():
  rng = np.random.default_rng(0)
  kernel, patches = rng.normal(size=(5, 3, 4, 4)), rng.normal(size=(7, 3, 4, 4))
  enlarged = jax.image.resize(patches, (7, 3, 6, 8), "cubic")
  response = np.einsum("nchw,ochw->no", enlarged, torch_names.resize_patches(kernel, (6, 8)))
  np.testing.assert_allclose(response, np.einsum("nchw,ochw->no", patches, kernel), atol=1e-4)
  # The squares of 0..15, resized to 2 x 2 by timm's resample_patch_embed.
  smaller = torch_names.resize_patches(np.arange(16.0).reshape(1, 1, 4, 4) ** 2, (2, 2))
  np.testing.assert_allclose(smaller[0, 0], [[-34.2625, 11.4296], [456.1894, 707.0040]], rtol=1e-4)


def test_our_models_are_resized_with_their_positions_and_patches(tmp_path):
  run = plain()
  start = vc.from_torch(run.model, run.state)
  model, variables = convert.resized(run.model, start, patch_size=run.model.patch_size // 2)
  assert model.grid == tuple(2 * n for n in run.model.grid)
  same = convert.resized(model, variables, patch_size=model.patch_size)[1]
  assert trees.digest(same) == trees.digest(variables)
  with pytest.raises(ValueError, match="not a multiple of patch_size=5"):
    convert.resized(run.model, start, patch_size=5)
  source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
  convert.save(source, run.model, start)
  lines = pytorch.from_checkpoint(str(source), None, out, patch_size=run.model.patch_size // 2)
  assert lines[1] == "resized: pos_embed, patch_embed.proj.weight"
  assert trees.digest(convert.load(out)[1]) == trees.digest(variables)


@pytest.mark.parametrize("size", [(16, 48), (16, 64)])   # the second: as many as 32 x 32
def test_positions_of_non_square_images_are_resized_from_their_grid(tmp_path, size):
  wide = tiny.deit(depth=1, image_size=size)
  variables = tiny.init(wide)
  positions = variables["params"]["pos_embed"]
  grid = positions[0, 1:].reshape(*wide.grid, -1)
  rows, columns = (torch_names.resize_matrix(old, 4, "bicubic") for old in wide.grid)
  expected = np.einsum("hi,wj,ijd->hwd", rows, columns, grid).reshape(16, -1)
  got = convert.resized(wide, variables, image_size=32)[1]
  np.testing.assert_allclose(got["params"]["pos_embed"][0, 1:], expected, atol=1e-6)
  np.testing.assert_array_equal(got["params"]["pos_embed"][:, 0], positions[:, 0])
  source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
  convert.save(source, wide, variables)
  assert pytorch.from_checkpoint(source, None, out, image_size=32)[1] == "resized: pos_embed"
  assert trees.digest(convert.load(out)[1]) == trees.digest(got)


def test_all_misfits_are_listed_at_once():
  run = plain()
  state = {**run.state, "extra.weight": np.zeros(3), "norm.weight": np.zeros(25)}
  del state["cls_token"], state["blocks.1.mlp.fc2.bias"]
  with pytest.raises(ValueError) as error:
    vc.from_torch(run.model, state)
  first, *lines = str(error.value).split("\n")
  assert "2 missing, 1 unexpected, 1 misshapen" in first and "closest" not in first
  assert sorted(lines) == ["missing blocks.1.mlp.fc2.bias (24,)", "missing cls_token (1, 1, 24)",
                           "norm.weight is (25,), not (24,)", "unexpected extra.weight (3,)"]


def test_another_classifier_is_refused_unless_requested():
  run = plain()
  count = run.model.num_classes
  with pytest.raises(ValueError, match=rf"it has {count} classes, the model 3: create the model "
                     rf"with num_classes={count} .*or pass reset_head \(--reset-head\) to keep"):
    vc.from_torch(run.model.clone(num_classes=3), run.state)
  without = {name: value for name, value in run.state.items() if not name.startswith("head")}
  with pytest.raises(ValueError, match=r"num_classes=0 .* to have features, or pass reset_head"):
    vc.from_torch(run.model, without)


def test_a_model_without_classes_leaves_the_classifier_out():
  run = plain()
  loaded = convert.read_state_dict(run.model.clone(num_classes=0), run.state)
  assert loaded.lines() == ["dropped: head.weight, head.bias"]
  assert "head" not in loaded.variables["params"]


def test_a_checkpoint_of_another_model_is_identified():
  state = zeros("pvt_v2_b0")
  with pytest.raises(ValueError, match="the closest model is pvt_v2_b0\n"):
    vc.from_torch(vc.create_model("pvt_v2_b1"), state)
  theirs = {vc.create_model("pvt_v2_b0").authors_name(name): array for name, array in state.items()}
  assert theirs.keys() != state.keys()
  assert convert.closest_model({name: a.shape for name, a in theirs.items()}) == "pvt_v2_b0"
  assert convert.closest_model({"unheard.of": (3,)}) is None


def test_the_closest_model_is_found_without_tracing_every_model(monkeypatch):
  """A dozen models share DeiT's names: the first misfit used to take ten seconds."""
  depths, trace = [], fit.variable_shapes
  monkeypatch.setattr(fit, "variable_shapes",
                      lambda model: depths.append(model.depth) or trace(model))
  fit._tensors.cache_clear()
  shapes = {name: array.shape for name, array in zeros("vit_tiny_patch16_224").items()}
  shapes.pop("norm.bias")
  assert convert.closest_model(shapes) in ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
  assert len(depths) > 5 and set(depths) == {1}


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "lvvit_t", "pvt_v2_b0"])
def test_shapes_for_comparing_models_are_those_of_their_tensors(name):
  assert dict(fit._tensors(name)[0]) == {key: array.shape for key, array in zeros(name).items()}


def test_values_that_are_not_weights_are_refused():
  run = plain()
  for value in (np.zeros(24, np.int32), "text"):
    with pytest.raises(ValueError, match=r"norm\.bias is .*not an array of floating point"):
      vc.from_torch(run.model, {**run.state, "norm.bias": value})
  with pytest.raises(ValueError, match="'timm' or 'authors'"):
    vc.to_torch(run.model, {}, names="theirs")
  with pytest.raises(ValueError, match=r"do not fit .*: no 'params'"):
    vc.to_torch(run.model, {"params": {}})


def test_our_file_restores_model_and_variables(tmp_path):
  plan = vc.Plan(heads=vc.HMHSA(layout="grid"), ffn=vc.CFFN(), blocks={0: {"heads": None}})
  model = tiny.deit(plan, image_size=(32, 16))
  variables = tiny.init(model)
  path = tmp_path / "a.safetensors"
  convert.save(path, model, variables)
  again, loaded = convert.load(path)
  assert again == model and trees.digest(loaded) == trees.digest(variables)
  assert trees.differences(loaded, variables) == []


def test_nothing_is_overwritten_unless_requested(tmp_path):
  model = tiny.deit()
  path = tmp_path / "a.safetensors"
  path.write_text("precious")
  with pytest.raises(ValueError, match="exists; give another name"):
    convert.save(path, model, tiny.init(model))
  assert path.read_text() == "precious"
  convert.save(path, model, tiny.init(model), force=True)
  convert.load(path)
  with pytest.raises(ValueError, match=r"must end in \.safetensors"):
    convert.save(tmp_path / "a.bin", model, tiny.init(model))
  with pytest.raises(ValueError, match=r"do not fit .*: no 'params'"):
    convert.save(tmp_path / "b.safetensors", model, {"params": {}})
  assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
  model = tiny.deit()
  whole, path = tmp_path / "whole.safetensors", tmp_path / "bad.safetensors"
  convert.save(whole, model, tiny.init(model))
  data = whole.read_bytes()
  header = struct.pack("<Q", 2 ** 62) + data[8:]      # a header longer than the file
  for broken in (data[:100], data[:-4], b"", b"text", header):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a complete \.safetensors file"):
      convert.load(path)
  arrays, about = convert.read_safetensors(whole)
  for metadata, words in (
      (None, "is not one of our files"), ({**about, "model": "os.system"}, "unknown model"),
      ({**about, "fields": "[1]"}, "does not describe a model"),
      ({**about, "fields": '{"width": "wide"}'}, "does not describe a model"),
      ({**about, "plan": "{]"}, "must be JSON"),
      ({**about, "plan": "[" * 100_000}, "does not describe a model"),
      ({**about, "fields": '{"num_classes": -3}'}, "does not describe a model"),
      ({**about, "fields": '{"dtype": "float33"}'}, "does not describe a model"),
      ({**about, "fields": json.dumps({**json.loads(about["fields"]), "depth": 1})},
       "unexpected params/blocks_1")):
    safetensors.numpy.save_file(arrays, path, metadata=metadata)
    with pytest.raises(ValueError, match=re.escape(words)):
      convert.load(path)
  both = {**arrays, "params/head": np.zeros(3, np.float32)}   # also a prefix of others
  safetensors.numpy.save_file(both, path, metadata=about)
  with pytest.raises(ValueError, match=r"unexpected params/head \(3,\)"):
    convert.load(path)


def test_class_names_go_into_pytorch_files(tmp_path):
  model, names = tiny.deit(depth=1), ["a", "b", "c", "d", "e"]
  ours, home = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
  vc.save(ours, model, tiny.init(model), classes=names)
  pytorch.to_torch(ours, home)
  assert json.loads(convert.read_metadata(home)["classes"]) == names


def test_the_command_converts_both_ways(tmp_path):
  torch_file, ours, home = (tmp_path / f"{name}.safetensors" for name in ("t", "ours", "home"))
  state = zeros("deit_tiny_patch16_224")
  state["head.bias"] += 1
  safetensors.numpy.save_file(state, torch_file)
  convert_it, refused = (functools.partial(call, "convert")
                         for call in (command.succeeds, command.fails))
  assert "--model is missing" in refused(torch_file, "--out", ours)
  printed = convert_it(torch_file, "--model", "deit_tiny_patch16_224", "--out", ours)
  assert "deit_tiny_patch16_224, 5,717,416 parameters" in printed
  assert "exists; give another name" in refused(torch_file, "--model", "deit_tiny_patch16_224",
                                                "--out", ours)
  assert "deit_tiny_patch16_224, 152 tensors" in convert_it(ours, "--to-torch", "--out", home)
  assert same(convert.read_safetensors(home)[0], state)
  again = tmp_path / "again.safetensors"
  assert "--model is missing" in refused(home, "--out", again)
  assert "leave --model out" in refused(ours, "--model", "deit_tiny_patch16_224", "--out", again)
  assert "no such file" in refused(tmp_path / "none.pth", "--model", "x", "--out", home)


@pytest.mark.parametrize("option, value, words", [
    ("--patch-size", 0, "patch_size=0: must be a whole number of at least 1"),
    ("--patch-size", -8, "patch_size=-8: must be a whole number of at least 1"),
    ("--image-size", 0, "image_size=0: must be a whole number of at least 1"),
    ("--image-size", 36, "36 is not a multiple of patch_size=8; the nearest multiple: 32"),
    ("--num-classes", -1, "num_classes=-1: must be a whole number of at least 0")])
def test_impossible_sizes_are_refused_in_one_line(tmp_path, option, value, words):
  model, path = tiny.deit(depth=1), tmp_path / "a.safetensors"
  convert.save(path, model, tiny.init(model))
  message = command.fails("convert", path, option, value, "--out", tmp_path / "b.safetensors")
  assert words in message


def test_a_model_without_the_option_says_so(tmp_path):
  model = vc.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), image_size=64)
  with pytest.raises(ValueError, match=r"pvt_v2_b0 has no option 'patch_size'; did you mean"):
    convert.resized(model, {}, patch_size=8)


@pytest.mark.parametrize("folded", [False, True])
def test_mask_predictors_are_resized_or_refused_with_a_way_out(folded):
  model = tiny.deit(vc.Plan(attention=vc.Sparsifiner()), depth=1)
  variables = tiny.init(model)
  if folded:
    model, variables = vc.fold(model, variables)
  large, got = convert.resized(model, variables, image_size=64)
  assert large.plan.attention.rank == 2      # the default at 65 tokens would be 10
  for leaf, share in (("up", 1), ("down", 1 / 4)):   # W_down sums over four times the tokens
    rows = np.asarray(variables["params"]["blocks_0"]["links"][leaf])
    plane = jax.image.resize(rows[1:].reshape(4, 4, 2), (8, 8, 2), "linear", antialias=False)
    expected = share * np.concatenate([rows[:1], np.asarray(plane).reshape(64, 2)])
    np.testing.assert_allclose(got["params"]["blocks_0"]["links"][leaf], expected, rtol=1e-5,
                               atol=1e-6)
  with pytest.raises(ValueError, match=r"vitcompact\.convert\.resized makes them fit another"):
    vc.from_torch(large, vc.to_torch(model, variables))
  wider = model.clone(width=48)   # another model: resizing does not help
  with pytest.raises(ValueError) as error:
    vc.from_torch(wider, vc.to_torch(model, variables))
  assert "convert.resized" not in str(error.value)


def fake_torch(load):
  """Returns a stand-in with the part of torch that the program uses."""
  allowed = []

  @contextlib.contextmanager
  def safe_globals(classes):
    allowed.extend(classes)
    yield
  return types.SimpleNamespace(load=load, allowed=allowed,
                               serialization=types.SimpleNamespace(safe_globals=safe_globals))


def test_pickled_files_are_read_as_weights_only(tmp_path, monkeypatch):
  path = tmp_path / "deit.pth"
  path.write_bytes(b"x")
  seen = {}

  def load(file, **options):
    seen.update(options)
    return {"model": {"a": np.ones(2)}, "epoch": 1}

  torch = fake_torch(load)
  monkeypatch.setitem(sys.modules, "torch", torch)
  assert same(pytorch.read_checkpoint(path)["model"], {"a": np.ones(2)})
  assert seen["weights_only"] is True and argparse.Namespace in torch.allowed

  def refuse(file, **options):
    raise RuntimeError("Weights only load failed. Run with weights_only=False\n"
                       "WeightsUnpickler error: Unsupported global: GLOBAL posix.system was not")
  monkeypatch.setitem(sys.modules, "torch", fake_torch(refuse))
  with pytest.raises(ValueError) as error:
    pytorch.read_checkpoint(path)
  assert "posix.system" in str(error.value) and "weights_only" not in str(error.value)
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ValueError, match="needs torch"):
    pytorch.read_checkpoint(path)


def test_on_a_full_disk_the_file_is_named_and_the_old_one_stays(tmp_path):
  """With a real limit: safetensors raises an error of its own, which is not an OSError."""
  path = tmp_path / "a.safetensors"
  convert.write_safetensors(path, {"a": np.ones(4)}, {})
  before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    with pytest.raises(OSError, match=r"a\.safetensors cannot be written: .*File too large.*room"):
      convert.write_safetensors(path, {"a": np.ones(4000)}, {}, force=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_pickle_is_never_imported_and_torch_only_lazily():
  allowed = {"pytorch.py": [("    ", "torch")], "timm_network.py": [("  ", "torch")]}
  for path in pathlib.Path(convert.__file__).parent.rglob("*.py"):
    found = re.findall(r"^(\s*)(?:import|from) (torch|pickle)\b", path.read_text(), re.M)
    assert found == allowed.get(path.name, []), path


def test_the_pytorch_model_loads_the_exported_file(tmp_path):
  torch = pytest.importorskip("torch")
  from experiments import torch_deit
  run = runs("compact_deit")[0]
  ours, home = tmp_path / "ours.safetensors", tmp_path / "home.safetensors"
  convert.save(ours, run.model, vc.from_torch(run.model, run.state))
  pytorch.to_torch(ours, home)
  with torch.no_grad():
    got = torch_deit.load(home)(torch.from_numpy(run.images).permute(0, 3, 1, 2)).numpy()
  np.testing.assert_allclose(got, run.expected, atol=1e-5)


@pytest.mark.parametrize("plan", [
    vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()), vc.Plan(tokens=vc.DynamicViT(blocks=(1,))),
    vc.Plan(attention=vc.Sparsifiner()),
    vc.Plan(attention=vc.Sparsifiner(granularity="block", window=2), ffn=vc.CFFN())])
def test_the_command_resizes_a_training_form(tmp_path, plan):
  """It used to be refused: "has no PyTorch form"."""
  model = tiny.deit(plan)
  variables = jax.tree.map(np.asarray, tiny.init(model))
  trained, out = tmp_path / "trained.safetensors", tmp_path / "large.safetensors"
  convert.save(trained, model, variables, classes=list("abcde"))
  printed = command.succeeds("convert", trained, "--image-size", 64, "--out", out)
  assert "resized: pos_embed" in printed
  large, got = convert.load(out)
  expected, resized = convert.resized(model, variables, image_size=64)
  assert large == expected and trees.digest(got) == trees.digest(resized)
  assert convert.classes_of(out) == list("abcde")
  printed = command.succeeds("convert", trained, "--in-chans", 1, "--num-classes", 3,
                             "--reset-head", "--out", out, "--force")
  assert "made for other channels: patch_embed.proj.weight" in printed
  assert "initialised anew: head.weight, head.bias" in printed
  other, got = convert.load(out)
  assert (other.in_chans, other.num_classes, other.deploy) == (1, 3, False)
  same_leaves = {name for name, leaf in trees.named_leaves(got).items()
                 if np.array_equal(leaf, trees.named_leaves(variables)[name])}
  assert trees.named_leaves(got).keys() - same_leaves == {
      "params/patch_embed/proj/kernel", "params/head/kernel", "params/head/bias"}
  message = command.fails("convert", trained, "--global-pool", "avg", "--out", out, "--force")
  assert "--global-pool token" in message
