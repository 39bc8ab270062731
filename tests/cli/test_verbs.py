"""Each verb does what its help says."""
import importlib
import importlib.metadata
import pathlib
import re
import resource
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import cli, convert

ROOT = pathlib.Path(__file__).parents[2]
VERBS = {"bench", "card", "compact", "compare", "convert", "count", "draw", "export", "measure",
         "models", "page", "predict", "prepare", "push", "verify"}


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
  """A folded compact model in a file."""
  model = tiny.deit(vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()), depth=1)
  path = tmp_path_factory.mktemp("compact") / "deploy.safetensors"
  vc.save(path, *vc.fold(model, tiny.init(model)))
  return path


def test_help_lists_all_verbs_quickly_without_loading_jax():
  code = ("import sys; sys.argv = ['vitcompact', '--help']\n"
          "from vitcompact.cli import main\n"
          "try: main()\n"
          "finally: assert not {'jax', 'numpy', 'PIL'} & set(sys.modules)")
  spent = resource.getrusage(resource.RUSAGE_CHILDREN)
  shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                         cwd=ROOT).stdout
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
  listed = shown.partition("Commands:")[2]
  assert set(re.findall(r"^  (\w+)", listed, re.M)) == VERBS == set(cli.main.commands)
  assert seconds < 1.0    # CPU time, which load hardly changes; usually 0.1


def test_without_arguments_help_is_shown():
  assert CliRunner().invoke(cli.main, []).output == command.succeeds("--help")


def test_every_verb_shows_help_without_running():
  for verb, known in cli.main.commands.items():
    assert known.help.splitlines()[0] in command.succeeds(verb, "--help")
    for below in getattr(known, "commands", ()):
      assert "--out" in command.succeeds(verb, below, "--help")


def test_the_entry_point_is_declared_and_a_checkout_runs_uninstalled():
  declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
  assert declared == {"vitcompact": "vitcompact.cli:main"}
  shown = subprocess.run([sys.executable, "-m", "vitcompact", "--version"], check=True,
                         capture_output=True, text=True, cwd=ROOT).stdout
  assert shown == f"vitcompact, version {vc.__version__}\n"
  assert (entry := {point.name: point for point in importlib.metadata.entry_points(
      group="console_scripts")}.get("vitcompact")) is None or entry.load() is cli.main


@pytest.mark.parametrize("arguments, words", [
    (["modles"], "'modles'"), (["models", "resnet*"], "no model matches 'resnet*'"),
    (["count", "--imagesize", "3"], "--imagesize"), (["draw"], "vitcompact draw --help"),
    (["convert", "a.pth"], "Missing option '--out'"), (["count", "resnet50"], "'resnet50'; known"),
    (["count", "pvt_tiny", "--plan", "{"], "must be JSON"),
    (["predict", "/nowhere.safetensors", "a.png"], "/nowhere.safetensors"),
    (["prepare", "folder", "--path", "/nowhere", "--out", "/tmp/out"], "/nowhere")])
def test_a_mistake_is_reported_in_one_line(arguments, words):
  assert words in command.fails(*arguments)


@pytest.mark.parametrize("place", [0, 2])
def test_verbose_shows_the_traceback(place):
  arguments = ["models", "resnet*"]
  arguments.insert(place, "--verbose")
  assert isinstance(CliRunner().invoke(cli.main, arguments).exception, ValueError)


def test_a_long_error_is_truncated(compact, tmp_path):
  """It would have a line for each missing parameter."""
  empty = tmp_path / "empty.safetensors"
  convert.write_safetensors(empty, {}, convert.read_safetensors(compact)[1])
  message = command.fails("count", empty)
  assert "does not fit" in message and re.search(r"and \d+ more: --verbose shows them$", message)


def test_models_are_listed():
  assert command.succeeds("models").split() == vc.list_models()
  assert command.succeeds("models", "pvt_v2*").split() == vc.list_models("pvt_v2*")


def test_a_file_is_counted_with_its_own_plan(compact):
  row = command.succeeds("count", compact).splitlines()[-1].split(" | ")
  model, _ = vc.load(compact)
  assert row[0] == f"| {compact}"
  assert row[2] == f"{vc.count(model).params / 1e6:.2f} M"
  assert row[1] == f"{vc.count(model.clone(plan=vc.Plan())).params / 1e6:.2f} M"
  assert "has its own plan" in command.fails("count", compact, "--plan", "")


def test_a_network_is_counted_with_the_axes_of_the_default_plan_it_takes():
  row = command.succeeds("count", "biformer_tiny").splitlines()[-1].split(" | ")
  expected = vc.count(vc.create_model("biformer_tiny", plan=vc.Plan(ffn=vc.CFFN()), deploy=True))
  assert row[0] == "| biformer_tiny (cFFN alone)"
  assert row[2] == f"{expected.params / 1e6:.2f} M" and row[5] == f"{expected.macs / 1e9:.2f} G"


def test_bench_times_models_alternately(compact):
  head, _, dense, small, _, about = command.succeeds("bench", compact, "--batch", 2, "--rounds", 2
                                                     ).splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, dense, small)]
  assert len({len(row) for row in cells}) == 1
  assert cells[1][:2] == ["dense", "XLA"] and cells[1][6:] == ["1", ""]
  assert re.fullmatch(r"[\d.]+x \[[\d.]+, [\d.]+\]", cells[2][6]) and cells[2][7].endswith("%")
  assert "batch 2; CPU seconds, medians of 2 rounds" in about


def test_bench_takes_a_named_model_under_several_plans():
  plan = '{"tokens": {"method": "evit", "keep": 0.5}}'
  models = cli.bench.candidates("deit_tiny_patch16_224", [plan], 32)
  assert [(model.plan, model.deploy, model.image_size) for model in models.values()] == [
      (vc.Plan(), True, 32), (vc.Plan.parse(plan), True, 32)]


def test_predictions_match_the_model(compact, tmp_path):
  model, variables = vc.load(compact)
  rng = np.random.default_rng(0)
  paths = [tmp_path / f"{i}.png" for i in range(3)]
  for path in paths:
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
  labels = tmp_path / "labels.txt"
  labels.write_text("".join(f"class {i}\n" for i in range(5)))
  printed = command.succeeds("predict", compact, *paths, "--top", 2, "--labels", labels,
                             "--batch", 2)
  prepared = np.stack([vc.preprocess(model)(Image.open(path)) for path in paths])
  logits = np.asarray(tiny.apply(model, variables, prepared))
  for path, row, line in zip(paths, logits, printed.splitlines(), strict=True):
    name, *classes = line.split("\t")
    assert name == str(path)
    assert [text.rpartition(" ")[0] for text in classes] == [
        f"class {i}" for i in (-row).argsort()[:2]]
    share = np.exp(row.max()) / np.exp(row).sum()
    assert float(classes[0].split()[-1]) == pytest.approx(100 * share, abs=0.01)


def test_predict_names_an_unusable_file(compact, tmp_path):
  labels, broken = tmp_path / "labels.txt", tmp_path / "broken.png"
  labels.write_text("one\n")
  broken.write_text("no image")
  assert "has 1 lines, and the model 5 classes" in command.fails("predict", compact, broken,
                                                                 "--labels", labels)
  assert f"cannot read {broken}" in command.fails("predict", compact, broken)
  features = tiny.deit(num_classes=0)
  vc.save(tmp_path / "features.safetensors", features, tiny.init(features))
  assert "no classifier" in command.fails("predict", tmp_path / "features.safetensors", broken)


def test_prepared_images_are_read_back(tmp_path):
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      (tmp_path / split / name).mkdir(parents=True)
      value = len(name + split) + ord(name[0])
      Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / split / name / "a.png")
  out = tmp_path / "out"
  printed = command.succeeds("prepare", "folder", "--path", tmp_path, "--out", out)
  assert "{'train': 2, 'val': 2}, 2 classes" in printed
  assert "train: 2 images are unchanged since" in command.succeeds(
      "prepare", "verify", "--out", out, "--decode")


def test_draw_passes_on_its_options(monkeypatch):
  """The drawings themselves are tested with their methods."""
  passed = {}
  for name in ("tokens", "attention"):
    module = importlib.import_module(f"vitcompact.draw.{name}")
    monkeypatch.setattr(module, "run", lambda *paths, name=name, **options: passed.update(
        {name: (paths, options)}) or f"{name} drawn")
  assert command.succeeds("draw", "tokens", "a.pth", "b.png", "--out", "c.png", "--plan", "{}",
                          "--force") == "tokens drawn\n"
  assert command.succeeds("draw", "attention", "a.pth", "b.png", "--out", "c", "--query", "3,5",
                          "--query", "1,2", "--block", 0) == "attention drawn\n"
  assert passed == {
      "tokens": (("a.pth", "b.png", "c.png"), {"plan": "{}", "force": True}),
      "attention": (("a.pth", "b.png", "c"), {"queries": ("3,5", "1,2"), "blocks": (0,),
                                          "force": False})}
