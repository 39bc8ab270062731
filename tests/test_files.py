"""Our files are verified when read and small on request; any other file is named for what it is."""
import dataclasses
import json
import pathlib
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import convert, files, trees
from vitcompact import pytorch as program
from vitcompact.run import report
from vitcompact.train import start

MODEL = tiny.deit(depth=1)
VARIABLES = jax.tree.map(np.asarray, tiny.init(MODEL))


@pytest.fixture
def ours(tmp_path):
  path = tmp_path / "ours.safetensors"
  vc.save(path, MODEL, VARIABLES)
  return path


@pytest.fixture
def theirs(tmp_path):
  """A file as timm writes it."""
  path = tmp_path / "timm.safetensors"
  state = vc.to_torch(MODEL, VARIABLES)
  safetensors.numpy.save_file(state, path, metadata={"format": "pt"})
  return path


def refusal(function, *arguments, **options):
  with pytest.raises((ValueError, OSError)) as error:
    function(*arguments, **options)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_file_with_a_flipped_bit_is_not_loaded(ours):
  data = ours.read_bytes()
  header = 8 + int.from_bytes(data[:8], "little")
  rng = np.random.default_rng(0)
  for place in [*rng.integers(header, len(data), 60), *rng.integers(0, header, 60)]:
    broken = bytearray(data)
    broken[place] ^= 1 << rng.integers(8)
    ours.write_bytes(broken)
    try:
      model, variables = vc.load(ours)
    except ValueError as error:
      assert str(ours) in str(error)
    else:   # the key of the digest itself; nothing else can have changed
      assert place < header and model == MODEL
      assert trees.digest(variables) == trees.digest(VARIABLES)


def test_a_change_of_the_metadata_is_detected(ours):
  arrays, about = convert.read_safetensors(ours)
  whole = safetensors.safe_open(ours, framework="numpy").metadata()
  assert whole.keys() - about.keys() == {"sha256"}
  fields = json.loads(about["fields"])
  whole["fields"] = json.dumps({**fields, "drop_path_rate": 0.5})
  safetensors.numpy.save_file(arrays, ours, metadata=whole)
  assert "is damaged: its contents do not match the sha256" in refusal(vc.load, ours)


def test_a_file_has_the_usual_read_permissions(ours):
  other = ours.with_name("other")
  other.touch()
  assert ours.stat().st_mode == other.stat().st_mode


def test_equal_contents_are_equal_bytes(tmp_path):
  """The order of the metadata would otherwise be random, and so would a receipt's digests."""
  about = {f"key {number}": "é\n\"" * number for number in range(12)}
  arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float16)}
  paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
  for path, order in zip(paths, (sorted, lambda items: sorted(items, reverse=True)), strict=True):
    files.write_safetensors(path, arrays, dict(order(about.items())))
  assert paths[0].read_bytes() == paths[1].read_bytes()
  back, metadata = files.read_safetensors(paths[0])
  assert metadata == about and all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_older_files_without_a_digest_load(ours):
  arrays, about = convert.read_safetensors(ours)
  safetensors.numpy.save_file(arrays, ours, metadata=about)
  assert trees.digest(vc.load(ours)[1]) == trees.digest(VARIABLES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file_and_comes_back_as_float32(tmp_path, ours, dtype):
  path = tmp_path / "half.safetensors"
  vc.save(path, MODEL, VARIABLES, dtype=dtype)
  assert path.stat().st_size < 0.55 * ours.stat().st_size
  model, variables = vc.load(path)
  assert model == MODEL
  kind = files.DTYPES[dtype]
  expected = jax.tree.map(lambda leaf: leaf.astype(kind).astype(np.float32), VARIABLES)
  assert trees.digest(variables) == trees.digest(expected) != trees.digest(VARIABLES)
  vc.save(path, *vc.load(path), dtype=dtype, force=True)     # saving again changes nothing
  assert trees.digest(vc.load(path)[1]) == trees.digest(expected)


def test_values_beyond_half_precision_are_refused(tmp_path):
  large = jax.tree.map(np.copy, VARIABLES)
  large["params"]["norm"]["bias"][0] = 1e5
  path = tmp_path / "half.safetensors"
  said = refusal(vc.save, path, MODEL, large, dtype="float16")
  assert said.startswith("params/norm/bias has values too large for float16; save it as bfloat16")
  vc.save(path, MODEL, large, dtype="bfloat16")
  assert "must be one of float32, float16" in refusal(vc.save, path, MODEL, large, dtype="int8")


def test_pytorch_half_precision_in_safetensors_is_read(tmp_path):
  state = vc.to_torch(MODEL, VARIABLES)
  path = tmp_path / "half.safetensors"
  half = {name: value.astype(ml_dtypes.bfloat16) for name, value in state.items()}
  safetensors.numpy.save_file(half, path)
  got = vc.from_torch(MODEL, program.read_checkpoint(path))
  assert trees.digest(got) == trees.digest(
      vc.from_torch(MODEL, {name: value.astype(np.float32) for name, value in half.items()}))
  state["head.bias"] = state["head.bias"].astype(ml_dtypes.float8_e4m3fn)
  safetensors.numpy.save_file(state, path)
  assert "head.bias is F8_E4M3, which cannot be read" in refusal(program.read_checkpoint, path)


def test_nan_is_neither_saved_nor_loaded_unless_requested(tmp_path):
  broken = jax.tree.map(np.copy, VARIABLES)
  broken["params"]["norm"]["bias"][:2] = np.nan
  path = tmp_path / "nan.safetensors"
  message = refusal(vc.save, path, MODEL, broken)
  assert message.startswith("variables: params/norm/bias has 2 values that are NaN or infinite; ")
  vc.save(path, MODEL, broken, allow_nonfinite=True)
  assert f"{path}: params/norm/bias has 2 values" in refusal(vc.load, path)
  assert f"{path}: params/norm/bias has 2 values" in refusal(start.load_variables, str(path), MODEL,
                                                             None)
  _, variables = vc.load(path, allow_nonfinite=True)
  assert trees.digest(variables) == trees.digest(broken)


def test_class_names_are_kept_in_the_file(tmp_path, ours):
  path = tmp_path / "named.safetensors"
  names = ["cat", "Kätzchen", "crane", "crane", ""]
  vc.save(path, MODEL, VARIABLES, classes=names)
  assert convert.classes_of(path) == names and convert.classes_of(ours) is None
  assert vc.load(path)[0] == MODEL
  for wrong, words in ((names[:4], "4 names of classes for a model with num_classes=5"),
                       ("abcde", "must be a sequence of names"),
                       ([1, 2, 3, 4, 5], "must be a sequence of names")):
    assert words in refusal(vc.save, tmp_path / "b.safetensors", MODEL, VARIABLES, classes=wrong)
  arrays, about = convert.read_safetensors(path)
  for wrong in ('["a"]', "{]", "3", '{"a": 1}'):
    safetensors.numpy.save_file(arrays, path, metadata={**about, "classes": wrong})
    assert "no valid class names" in refusal(vc.load, path)
    assert "no valid class names" in refusal(convert.classes_of, path)


@pytest.mark.parametrize("crop", [0.5, 1, None])
def test_the_crop_of_a_runs_evaluation_is_kept_in_the_file(tmp_path, ours, crop):
  """The model's own crop is 0.9: serving used to crop differently from the run that measured it."""
  pre = dataclasses.replace(vc.preprocess(MODEL), crop=crop)
  path, out = tmp_path / "run.safetensors", tmp_path / "out.safetensors"
  report.write(tmp_path, tiny.receipt(), {"run": (MODEL, VARIABLES)}, pre)
  assert vc.preprocess(path) == vc.preprocess(str(path)) == pre != vc.preprocess(MODEL)
  assert vc.load(path)[0] == MODEL
  assert vc.preprocess(ours) == vc.preprocess(MODEL)      # a file without a crop
  image = tmp_path / "x.png"
  pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  Image.fromarray(pixels).save(image)
  chances = jax.nn.softmax(MODEL.apply(VARIABLES, pre(image)[None]))[0]
  best = f"{chances.argmax()} {100 * chances.max():.2f}"
  assert command.succeeds("predict", path, image, "--top", 1) == f"{image}\t{best}\n"
  command.succeeds("convert", path, "--dtype", "float16", "--out", out)
  assert vc.preprocess(out) == pre
  command.succeeds("convert", path, "--image-size", 16, "--out", out, "--force")
  assert vc.preprocess(out).crop == 0.9                   # at another size


@pytest.mark.parametrize("crop", ["2", "-1", "NaN", "true", '"half"', "{", "[" * 100_000])
def test_an_invalid_crop_is_refused_in_one_line(ours, crop):
  arrays, about = convert.read_safetensors(ours)
  safetensors.numpy.save_file(arrays, ours, metadata={**about, "crop": crop})
  for read in (vc.load, vc.preprocess):
    assert "its metadata has no valid crop" in refusal(read, ours)


def test_class_names_pass_from_file_to_file_through_every_verb(tmp_path):
  """compact, fold and tune return models, which have no class names: only files have."""
  names, (dense, small, deploy, larger) = list("vwxyz"), (
      tmp_path / f"{name}.safetensors" for name in ("dense", "small", "deploy", "larger"))
  vc.save(dense, MODEL, VARIABLES, classes=names)
  model, variables = vc.load(dense)
  vc.save(small, *vc.compact(model, variables, vc.Plan(ffn=vc.CFFN())),
          classes=vc.classes_of(dense))
  folded = vc.fold(*vc.load(small))
  vc.save(deploy, *vc.tune(*folded, tiny.images(MODEL, 1)), classes=vc.classes_of(small))
  command.succeeds("convert", deploy, "--image-size", 48, "--dtype", "bfloat16", "--out", larger)
  assert vc.classes_of(larger) == names


def test_class_names_stay_when_convert_changes_the_image_size(tmp_path):
  path, out, text = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "names.txt"))
  text.write_text("a\nb\nc\n")
  vc.save(path, MODEL, VARIABLES, classes=list("vwxyz"))
  command.succeeds("convert", path, "--image-size", 16, "--out", out)
  assert convert.classes_of(out) == list("vwxyz")
  command.succeeds("convert", path, "--num-classes", 3, "--reset-head", "--out", out,
              "--force")
  assert convert.classes_of(out) is None
  command.succeeds("convert", path, "--num-classes", 3, "--reset-head", "--out", out,
              "--force", "--classes", text)
  assert convert.classes_of(out) == ["a", "b", "c"]


def test_the_command_can_do_what_python_can(tmp_path, ours):
  out = tmp_path / "out.safetensors"
  printed = command.succeeds("convert", ours, "--out", out, "--image-size", 16, 32,
                        "--in-chans", 1, "--dtype", "float16")
  assert "resized: pos_embed\nmade for other channels: patch_embed.proj.weight" in printed
  model, variables = vc.load(out)
  assert (model.image_size, model.in_chans) == ((16, 32), 1)
  assert trees.digest(variables) == trees.digest(jax.tree.map(
      lambda leaf: leaf.astype(np.float16).astype(np.float32),
      convert.resized(MODEL, VARIABLES, image_size=(16, 32), in_chans=1)[1]))
  message = command.fails("convert", ours, "--out", out, "--force", "--global-pool", "avg")
  assert "create the model with global_pool='token' (--global-pool token)" in message
  message = command.fails("convert", ours, "--out", out, "--force", "--weights", "model_ema")
  assert message.startswith("error: weights='model_ema' is not in the checkpoint; it has weights ")
  message = command.fails("convert", ours, "--out", out, "--force", "--image-size", 8, 8, 8)
  assert message.startswith("error: --image-size 8,8,8: must be a side, or height and width")


def test_the_command_says_which_weights_it_took(tmp_path):
  npz, state = tmp_path / "a.npz", vc.to_torch(MODEL, VARIABLES)
  np.savez(npz, **{f"{name}.{key}": np.full_like(value, name == "ema")
                   for name in ("model", "ema") for key, value in state.items()})
  for weights, told, value in ((None, "weights: ema, not model (--weights chooses)", 1),
                               ("model", "weights: model, not ema (--weights chooses)", 0)):
    out = tmp_path / f"{weights}.safetensors"
    lines = program.from_checkpoint(npz, MODEL.variant, out, weights=weights,
                                    **{**tiny.SIZES, "depth": 1})
    assert lines[1] == told
    assert vc.load(out)[1]["params"]["norm"]["bias"][0] == value


def pickled(path):
  path.write_bytes(b"\x80\x02}q\x00.")


def zipped(path, name="archive/data.pkl"):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(name, b"x" * 2000)


def cut(path):
  zipped(path)
  path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize("name, write, words", [
    ("deit.pth", pickled, "is a PyTorch file, expected a .safetensors file of ours; "
     "`vitcompact convert"),
    ("deit.pth", zipped, "is a PyTorch file"), ("deit.safetensors", zipped, "is a PyTorch file"),
    ("deit.ckpt", cut, "is a PyTorch file"), ("deit.pth", lambda path: path.write_bytes(b"old"),
                                              "is a PyTorch file"),
    ("a.npz", lambda path: np.savez(path, a=np.ones(3)), "is a NumPy .npz file"),
    ("a.zip", lambda path: zipped(path, "a.txt"), "is a zip archive"),
    ("a.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
     "is a Git LFS pointer"),
    ("a.safetensors", lambda path: path.write_text("\n<!doctype html><html>"), "is a web page"),
    ("a.h5", lambda path: path.write_bytes(b"\x89HDF\r\n"), "is an HDF5 file"),
    ("a.safetensors", lambda path: path.write_text("weights"), "complete .safetensors file: text"),
    ("a.safetensors", lambda path: path.touch(), "is not a complete .safetensors file: empty"),
    ("a.safetensors", lambda path: path.write_bytes(b"\0\1\2\3"), "not a complete .safetensors"),
    ("a.safetensors", lambda path: None, "a.safetensors: no such file"),
    ("dir", lambda path: (path.mkdir(), (path / "trained.safetensors").touch()),
     "is a directory, not a file of weights; in it: trained.safetensors"),
    ("dir.safetensors", lambda path: path.mkdir(), "no file of weights is in it")])
def test_a_foreign_file_is_named_for_what_it_is(tmp_path, name, write, words):
  path = tmp_path / name
  write(path)
  for load in (vc.load, convert.classes_of, convert.read_metadata):
    message = refusal(load, path)
    assert str(path) in message and words in message
  # `convert` also reads foreign files; torch is not installed here.
  assert str(path) in refusal(start.load_variables, str(path), MODEL, None)


STARTS = st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"<html"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STARTS, st.binary(max_size=40), st.sampled_from([".safetensors", ".pth", ".npz", ""]))
def test_arbitrary_bytes_in_a_file_are_refused_in_one_line(tmp_path_factory, start, rest, suffix):
  path = tmp_path_factory.getbasetemp() / f"any{suffix}"
  path.write_bytes(start + rest)
  for load in (vc.load, convert.classes_of):
    assert str(path) in refusal(load, path)
  if files.kind_of(path) != "pytorch":   # those would need torch
    assert str(path) in refusal(program.read_checkpoint, path)


def test_arguments_that_are_not_paths_are_refused():
  for value in (None, 3, VARIABLES):
    assert "expected the path of a file" in refusal(vc.load, value)
  assert "a path that ends in .safetensors" in refusal(vc.save, None, MODEL, VARIABLES)
  assert "dict was given, expected a model" in refusal(vc.save, "a.safetensors", VARIABLES, MODEL)
  with pytest.raises(ValueError, match=r"only the parameters: give \{'params': \.\.\.\}"):
    vc.save("a.safetensors", MODEL, VARIABLES["params"])


def test_safetensors_with_pytorch_names_are_refused_with_a_command(tmp_path, theirs, ours):
  for load in (vc.load, convert.classes_of):
    message = refusal(load, theirs)
    assert f"{theirs} is not one of our files: its metadata has ['format']" in message
    assert f"`vitcompact convert {theirs} --model NAME --out NEW.safetensors`" in message
  home = tmp_path / "home.safetensors"
  program.to_torch(ours, home)
  assert "it has PyTorch names" in refusal(vc.load, home)
  assert "--model deit_tiny_patch16_224" in refusal(vc.load, home)


def test_the_command_reads_npz_and_names_other_formats(tmp_path, monkeypatch):
  state = vc.to_torch(MODEL, VARIABLES)
  path = tmp_path / "weights.npz"
  np.savez(path, **state)
  got = vc.from_torch(MODEL, program.read_checkpoint(path))
  assert trees.digest(got) == trees.digest(VARIABLES)
  np.savez(path, a=np.array([{}], dtype=object))
  assert "refused" in refusal(program.read_checkpoint, path)
  text = tmp_path / "weights.txt"
  text.write_text("hello")
  message = refusal(program.read_checkpoint, text)
  assert "is text; must be .safetensors, .npz or PyTorch's" in message
  monkeypatch.setitem(sys.modules, "torch", None)
  zipped(tmp_path / "weights.ckpt")
  message = refusal(program.read_checkpoint, pathlib.Path(tmp_path / "weights.ckpt"))
  assert "is a PyTorch file: reading it needs torch" in message
