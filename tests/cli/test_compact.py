"""vitcompact measure, compact and verify."""
import dataclasses
import types

import pytest
from click.testing import CliRunner

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import cli
from vitcompact.cli import compact
from vitcompact.run import path
from vitcompact.train import config as configs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A dense model of digits' size, its deployed form, and another model."""
  folder = tmp_path_factory.mktemp("models")
  model = vc.create_model("deit_tiny_patch16_224", image_size=16, patch_size=8, width=8, depth=1,
                          heads=2, num_classes=10)
  variables = tiny.init(model)
  vc.save(folder / "dense.safetensors", model, variables)
  vc.save(folder / "deploy.safetensors", *vc.fold(model, variables))
  vc.save(folder / "other.safetensors", model, tiny.init(model, seed=5))
  return folder


def test_verify_says_whether_two_files_compute_the_same(files):
  dense, deploy, other = (str(files / f"{n}.safetensors") for n in ("dense", "deploy", "other"))
  assert "same function: on 32 random images" in command.succeeds("verify", dense, deploy)
  assert "images of digits" in command.succeeds("verify", dense, deploy, "--data", "digits")
  command.succeeds("verify", dense, deploy, "--dtype", "bfloat16")
  result = CliRunner().invoke(cli.main, ["verify", dense, other])
  assert result.exit_code == 1 and "NOT the same function" in result.output
  assert "first arises in blocks_0" in result.output


def test_measure_writes_a_report(files, tmp_path):
  out = command.succeeds("measure", str(files / "dense.safetensors"), "--data", "digits",
                         "--images", "32", "--sensitivity", "none", "--out", str(tmp_path / "r"))
  assert "report.html" in out and (tmp_path / "r" / "report.html").exists()
  assert vc.Report.load(tmp_path / "r").images == 32


def stderr_of(*arguments):
  """Returns what a successful command writes to stderr."""
  result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments],
                              catch_exceptions=False)
  assert result.exit_code == 0, result.output
  return result.stderr


def test_differing_class_names_cause_a_warning(files, tmp_path, monkeypatch):
  monkeypatch.setattr(vc, "measure", lambda *_: types.SimpleNamespace(save=lambda out, force: out))
  dense, digits = files / "dense.safetensors", list("0123456789")
  named = {}
  for name, classes in (("ours", digits), ("theirs", digits[::-1])):
    named[name] = tmp_path / f"{name}.safetensors"
    vc.save(named[name], *vc.load(dense), classes=classes)
  options = ("--data", "digits", "--images", 8, "--sensitivity", "none", "--out")
  difference = "has other classes than {}: output 0 is {} there and {} in {} (the same names in"
  assert f"{named['theirs']} {difference.format('the data', repr('9'), repr('0'), 'the data')}" in \
      stderr_of("measure", named["theirs"], *options, tmp_path / "a")
  assert not stderr_of("measure", named["ours"], *options, tmp_path / "b")
  told = stderr_of("verify", named["ours"], named["theirs"], "--images", 2)
  assert f"{named['ours']} has other classes than {named['theirs']}: output 0 is '0' there" in told
  assert not stderr_of("verify", dense, named["ours"], "--images", 2)
  assert "in the data" in stderr_of("verify", named["theirs"], dense, "--data", "digits")


@pytest.mark.parametrize(("crop", "wanted"), [(0.9, ("crop", None)), (0.8, ("crop", 0.8)),
                                              (None, ("warp", None))])
def test_images_are_cropped_as_the_file_says(files, tmp_path, crop, wanted):
  model, variables = vc.load(files / "dense.safetensors")
  pre = dataclasses.replace(vc.preprocess(model), crop=crop)
  vc.save(tmp_path / "a.safetensors", model, variables, preprocess=pre)
  config = compact.settings(str(tmp_path / "a.safetensors"), "folder:images")
  assert (config.data.get("eval_fit", "crop"), config.data.get("eval_crop")) == wanted
  assert path.preprocess_of(configs.complete(config), model) == pre


@pytest.fixture
def path_arguments(monkeypatch):
  """The arguments with which `path.run` was called."""
  found = []
  receipt = types.SimpleNamespace(ok=True, to_markdown=lambda: "# a receipt")
  monkeypatch.setattr(path, "run", lambda config, out, say: found.append((config, out)) or receipt)
  return found


def test_compact_without_distilling_trains_nothing(files, path_arguments):
  out = command.succeeds("compact", str(files / "dense.safetensors"), "--data", "digits",
                         "--macs", "0.7", "--out", "small")
  (config, where), = path_arguments
  assert "# a receipt" in out and where == "small"
  assert config.compact.macs == 0.7 and not config.compact.distil
  assert config.model.width == 8 and config.data.augment == "none"
  assert set(config.get("loss", {})) == set()


def test_compact_distils_for_epochs_from_the_dense_model(files, path_arguments):
  command.succeeds("compact", str(files / "dense.safetensors"), "--data", "digits", "--params",
                   "0.5", "--out", "small", "--distil", "2ep", "--batch-size", "32")
  (config, _), = path_arguments
  assert config.compact.distil and config.compact.params == 0.5
  assert config.total_steps == compact.steps_of("2ep", "digits", 32) > 1
  assert (config.loss.labels, config.loss.logits, config.loss.patches) == (0, 1, 1)


def test_a_receipt_with_a_failed_proof_gives_exit_code_1(files, path_arguments, monkeypatch):
  broken = types.SimpleNamespace(ok=False, to_markdown=lambda: "# a receipt")
  monkeypatch.setattr(path, "run", lambda *_, **__: broken)
  result = CliRunner().invoke(cli.main, ["compact", str(files / "dense.safetensors"), "--data",
                                         "digits", "--macs", "0.7", "--out", "small"])
  assert result.exit_code == 1


def test_a_goal_can_be_a_time_and_there_is_exactly_one(files, path_arguments):
  arguments = ["compact", str(files / "dense.safetensors"), "--data", "digits", "--out", "small"]
  command.succeeds(*arguments, "--latency-ms", "2.5", "--latency-batch", "8")
  (config, _), = path_arguments
  assert path.budget_of(config) == {"latency_ms": 2.5} and config.compact.latency_batch == 8
  for goals in ([], ["--macs", "0.5", "--speedup", "2"]):
    message = command.fails(*arguments, *goals)
    assert "give one of --macs, --params, --speedup, --latency-ms or --plan" in message


@pytest.mark.parametrize("option", ["--macs", "--params", "--speedup", "--latency-ms", "--images",
                                    "--batch-size", "--learning-rate"])
def test_an_option_out_of_its_range_is_named_as_it_was_typed(files, option):
  message = command.fails("compact", str(files / "dense.safetensors"), "--data", "digits", "--out",
                          "small", option, "0")
  assert f"'{option}': 0" in message and "is not in the range" in message


@pytest.mark.parametrize("text", ["5 epochs", "-1", "0ep", "ep", "0.2", "0"])
def test_an_invalid_length_of_distillation_is_refused(text):
  with pytest.raises(ValueError, match=r"--distil .*: must be epochs, such as 5ep"):
    compact.steps_of(text, "digits", 64)


def test_steps_are_computed_from_epochs():
  images = path.pipeline.num_examples("digits", "train")
  assert compact.steps_of("5ep", "digits", 64) == round(5 * images / 64)
  assert compact.steps_of("250", "digits", 64) == 250 and compact.steps_of(None, "digits", 64) == 0
