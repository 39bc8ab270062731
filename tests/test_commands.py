"""Every complete command in the docs runs, at a size that a test can afford.

tests/doc_commands.py says how each is made smaller, or which other test runs it. test_docs.py finds
the commands; it also checks the options of those that stand in the text.
"""
import ast
import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import types
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import main
import vitcompact as vc
from experiments import survive
from tests import tiny
from tests.cli import command as cli
from tests.cli.test_bench_torch import stand_ins
from tests.data.test_records import write_tars
from tests.doc_commands import ELSEWHERE, NOT_RUN, RUN
from tests.hub_server import serving
from tests.test_docs import PAGES, ROOT, commands, words_of
from vitcompact import bench
from vitcompact.export import page
from vitcompact.models import VARIANTS, tags

# The named models are this small here, and no other names exist.
SIZES = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 4, "num_classes": 10}
# A pyramid of four stages.
PYRAMID = {"image_size": 32, "widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1),
           "heads": (1, 1, 2, 2), "num_classes": 10}
SMALL = {"deit_small_patch16_224": SIZES, "deit_tiny_patch16_224": SIZES,
         "deit_base_patch16_224": SIZES, "vit_small_patch16_224": SIZES, "pvt_v2_b2": PYRAMID}
ANIMALS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"]


def complete() -> set[str]:
  """Returns the complete commands of all pages, with single spaces."""
  return {" ".join(command.split()) for page in PAGES for command, whole in commands(page) if whole}


def files(folder: pathlib.Path):
  """Writes the files that the commands name: models, images, data."""
  dense = vc.create_model("deit_small_patch16_224")
  variables = tiny.init(dense, spread=0.1)
  for name in ("dense", "deit_s"):
    vc.save(folder / f"{name}.safetensors", dense, variables)
  (folder / "deit_small_patch16_224.pth").write_bytes(pickle.dumps(vc.to_torch(dense, variables)))
  evit = vc.EViT(keep=0.5, blocks=(0,))
  for name, plan in (("evit", vc.Plan(tokens=evit)),
                     ("sparse", vc.Plan(attention=vc.Sparsifiner())),
                     ("deploy", vc.Plan(heads=vc.HMHSA(), tokens=evit, ffn=vc.CFFN()))):
    model = dense.clone(plan=plan)
    variables = tiny.init(model, spread=0.1)
    model, variables = vc.fold(model, variables) if name == "deploy" else (model, variables)
    vc.save(folder / f"{name}.safetensors", model, variables, classes=ANIMALS)
  (folder / "plan.json").write_text(vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()).to_json())
  rng = np.random.default_rng(0)
  images = [*(f"{name}.jpg" for name in ("cat", "dog", "photo", "photos/a", "photos/more/b")),
            *(f"imagenet/{split}/n{label:02}/{i}.jpg" for split, many in (("train", 4), ("val", 2))
              for label in range(10) for i in range(many))]
  for name in images:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name)
  (folder / "TARS").mkdir()
  write_tars(folder / "TARS")
  runtime = folder / "node_modules/onnxruntime-web/dist"
  runtime.mkdir(parents=True)
  for name in (page.SCRIPT, page.WEBASSEMBLY):
    (runtime / name).write_bytes(b"something")


def make_small(patch):
  """Shrinks pretrained weights, measuring and timing; gives each run one device."""
  for name, sizes in SMALL.items():
    for row in tags.table()[name].values():
      patch.setitem(row, "num_classes", 10)
      patch.setitem(row, "image_size", sizes["image_size"])
  tiny.few_options(patch)
  rounds, every = bench.rounds_of, jax.devices()
  patch.setattr(bench, "rounds_of",
                lambda *given, **options: rounds(*given, **{**options, "min_seconds": 0}))
  patch.setattr(jax, "devices", lambda *_: every[:8 if "--mode=memory" in sys.argv else 1])


@contextlib.contextmanager
def pytorch():
  """Stand-ins for PyTorch, which reads pickled dicts of arrays here, and for timm."""
  with pytest.MonkeyPatch.context() as patch:
    stand_ins(patch)
    sys.modules["torch"].load = lambda path, **_: pickle.loads(pathlib.Path(path).read_bytes())
    sys.modules["torch"].serialization = types.SimpleNamespace(
        safe_globals=lambda _: contextlib.nullcontext())
    yield


def fill_hub(hub):
  """Puts the weights that the commands name onto a stand-in for the hub."""
  model = vc.create_model("deit_small_patch16_224")
  state = safetensors.numpy.save(vc.to_torch(model, tiny.init(model, spread=0.1)))
  hub.add("timm/deit_small_patch16_224.fb_in1k", model__safetensors=state)
  hub.add("org/name", model__safetensors=state, config__json=json.dumps(
      {"architecture": "deit_small_patch16_224", "num_classes": 10}).encode())


def run_main(words: list[str]):
  """Runs main.py in this process."""
  with flagsaver.flagsaver(), mock.patch.object(sys, "argv", words):
    try:
      main.main(main.parse(words))
    finally:
      flags.FLAGS.unparse_flags()


def finished_run(arguments, directory, devices=1):
  """Stands in for the runs that `experiments.survive` kills; other tests kill real ones."""
  workdir, = (word.partition("=")[2] for word in arguments if word.startswith("--workdir="))
  shutil.copytree("DIR", workdir, dirs_exist_ok=True)
  says = r"print('resumed at step 2 of 2\nstep 2/2 val_accuracy\nstep 100/100')"
  return subprocess.Popen([sys.executable, "-c", says], stdout=subprocess.PIPE, text=True)


def run_experiment(name: str, words: list[str]):
  """Runs an experiment in this process; it writes into the current folder."""
  module, here = importlib.import_module(name), pathlib.Path.cwd()
  with mock.patch.object(sys, "argv", [name, *words]), pytest.MonkeyPatch.context() as patch:
    for place in {"RESULTS", "PAGE", "PICTURES"} & vars(module).keys():
      path = getattr(module, place)
      patch.setattr(module, place, shutil.copy(path, here / path.name) if path.is_file() else here)
    patch.setattr(survive, "start", finished_run)
    try:
      module.main()
    except SystemExit as ended:
      assert not ended.code


def execute(words: list[str]) -> str:
  """Runs a command in the current folder, and returns what it printed."""
  printed = io.StringIO()
  if ">" in words:
    words, (name,) = words[:words.index(">")], words[words.index(">") + 1:]
    pathlib.Path(name).write_text(text := execute(words))
    return text
  if words[0] == "vitcompact":
    with pytorch() if re.search("torch|[.]pth", " ".join(words)) else contextlib.nullcontext():
      return cli.succeeds(*words[1:])
  with contextlib.redirect_stdout(printed):
    if "--devices=64" in words:    # simulates them, so JAX must not have started
      print(subprocess.run([sys.executable, *words[1:]], check=True, text=True, cwd=ROOT,
                           stdout=subprocess.PIPE).stdout)
    elif words[:2] == ["python", "main.py"]:
      run_main(words[1:])
    elif words[:2] == ["python", "-m"]:
      run_experiment(words[2], words[3:])
    else:
      raise ValueError(f"{words[0]}: no way to run it here")
  return printed.getvalue()


class Outcome(NamedTuple):
  folder: pathlib.Path
  printed: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
  """A function that runs a command of RUN once, in a new folder, and returns its Outcome."""
  start = tmp_path_factory.mktemp("commands")
  small = {name: VARIANTS[name]._replace(sizes=sizes) for name, sizes in SMALL.items()}
  with (mock.patch.dict(VARIANTS, small, clear=True), pytest.MonkeyPatch.context() as patch,
        serving(patch, start / "hub") as hub):
    make_small(patch)
    fill_hub(hub)
    files(start)

    @functools.cache
    def ran(words, before) -> Outcome:
      folder = tmp_path_factory.mktemp("ran")
      for source in (start, *before):
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=lambda *_: ["configs"])
      (folder / "configs").symlink_to(ROOT / "configs")
      with mock.patch.dict(os.environ), contextlib.chdir(folder):
        return Outcome(folder, execute(list(words)))

    def outcome(command: str) -> Outcome:
      run, text = RUN[command], command
      for old, new in run.smaller.items():
        text = text.replace(old, new)
      assert text != command or not run.smaller, "the command has no text to replace"
      return ran(tuple(words_of(f"{text} {run.more}")),
                 tuple(outcome(earlier).folder for earlier in run.after))

    yield outcome


def test_every_complete_command_is_accounted_for_once():
  """A new command in the docs needs an entry, and an entry needs its command in the docs."""
  entries = [*RUN, *ELSEWHERE, *NOT_RUN]
  assert complete() - set(entries) == set(), "without an entry in tests/doc_commands.py"
  assert set(entries) - complete() == set(), "no longer in the docs"
  assert len(entries) == len(set(entries))


@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:90])
def test_a_command_of_the_docs_runs(command, outcome):
  run, (folder, printed) = RUN[command], outcome(command)
  assert run.leaves or run.prints, "nothing would be checked"
  assert re.search(run.prints, printed, re.DOTALL), printed
  assert (folder / run.leaves).stat().st_size


@pytest.mark.parametrize("command", ELSEWHERE, ids=lambda command: command[:90])
def test_the_test_that_runs_a_command_instead_exists(command):
  (name, _, test), text = ELSEWHERE[command][0].partition("::"), ELSEWHERE[command][1]
  code = (ROOT / name).read_text(encoding="utf-8")
  assert test in {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
  assert text in code


def test_a_command_that_fails_is_detected():
  with pytest.raises(AssertionError, match="no such file"):
    execute(["vitcompact", "count", "gone.safetensors"])
  with pytest.raises(SystemExit):
    execute(["python", "main.py", "--config=configs/gone.py", "--workdir=DIR"])
