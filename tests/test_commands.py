"""Every complete command in the docs runs, at a size that a test can afford.

RUN has one entry for each command that runs here, ELSEWHERE the tests that run others, and NOT_RUN
those that nothing runs, with the reason. tests/test_docs.py finds the commands, and checks the
options in every other mention of a command.
"""
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
from tests import tiny
from tests.cli import command as cli
from tests.cli.test_bench_torch import stand_ins
from tests.data.test_records import write_tars
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


class Run(NamedTuple):
  """How a command runs here, and what must come of it.

  smaller: {text: its replacement}; more: further words; after: commands whose files it needs;
  leaves: a file that it writes; prints: a regular expression of what it says.
  """
  smaller: dict[str, str] = types.MappingProxyType({})
  more: str = ""
  after: tuple[str, ...] = ()
  leaves: str = ""
  prints: str = ""


STEPS = ("--config.total_steps=2 --config.checkpoint_every=2 --config.log_every=1 "
         "--config.batch_size=16 --config.model.depth=1")
FOLDER = f"{STEPS} --config.data.repeats=1"   # repeats need many images
PATH = f"{STEPS} --config.compact.images=32"
FEW = "--images 32 --batch-size 16"
MEMORY = "--config.model.depth=1 --config.eval_batch_size=64"
IMAGES = {"folder:/data/imagenet": "folder:imagenet", "folder:DATA": "folder:imagenet"}
TRAINED = r"test accuracy(.|\n)*Folding: same function"
COMPACTED = r"\| distilled (.|\n)*\| deployed (.|\n)*same function"


def local(name: str) -> dict[str, str]:
  """Returns the replacement that gives a config its argument `runlocal`."""
  return {f"configs/{name}": f"configs/{name}{',' if ':' in name else ':'}runlocal"}


def runtimes(*names: str) -> str:
  """Returns a pattern for a table with rows of these runtimes, the dense model first."""
  return r"(.|\n)*".join(rf"\| {re.escape(name)} \|" for name in names)


TRAIN = "python main.py --config=configs/digits.py --workdir=DIR"
TRAIN_PLAN = f"{TRAIN}2 --config.total_steps=400 --config.plan=plan.json"
COMPACT = "vitcompact compact deit_s.safetensors --data folder:"
COMPACT_DIGITS = ("python main.py --config=configs/compact_deit_s.py "
                  "--config.init_from=deit_s.safetensors --workdir=")
EXPORT = "vitcompact export deploy.safetensors deploy.onnx"
EXPORT_BOTH = ("vitcompact export dense.safetensors dense.onnx",
               "vitcompact export deploy.safetensors small.onnx --tokens")
BENCH = "vitcompact bench deit_small_patch16_224 --"
COMPACT_RUN = Run(IMAGES, FEW, leaves="small/deploy.safetensors", prints=COMPACTED)
DIGITS_RUN = Run({**local("compact_deit_s.py"), "DIR3": "small"}, PATH,
                 leaves="small/deploy.safetensors", prints=COMPACTED)
# Their model is the one that was just made.
IN_SMALL = {"card deploy": "card small/deploy", "runs/small": "small"}

RUN = {
    # Training
    TRAIN: Run(local("digits.py"), STEPS, leaves="DIR/receipt.md", prints=TRAINED),
    f"{TRAIN} --mode=eval": Run(local("digits.py"), STEPS, (TRAIN,), prints="test_accuracy"),
    TRAIN_PLAN: Run({**local("digits.py"), "=400": "=2"}, STEPS, leaves="DIR2/deploy.safetensors",
                    prints=TRAINED),
    "python main.py --config=configs/compact_deit_s.py:scratch "
    "--config.data.name=folder:/data/imagenet --workdir=DIR":
        Run({**IMAGES, **local("compact_deit_s.py:scratch")}, FOLDER, leaves="DIR/receipt.md",
            prints=TRAINED),
    "python main.py --config=configs/deit_s.py --workdir=runs/deit_s "
    "--config.data.name=folder:/data/imagenet --config.accumulate=4":
        Run({**IMAGES, **local("deit_s.py")}, f"{FOLDER} --config.data.replicas=4",
            leaves="runs/deit_s/receipt.md", prints=TRAINED),
    "python main.py --config=configs/sparsifiner_deit_s.py --config.init_from=deit_s.safetensors "
    "--config.teacher.file=deit_s.safetensors --workdir=DIR4":
        Run(local("sparsifiner_deit_s.py"), f"{STEPS} --config.loss.logits=0.5 "
            "--config.reconstruct.steps=1 --config.reconstruct.warmup_steps=1 "
            "--config.optim.warmup_steps=1", leaves="DIR4/deploy.safetensors", prints=TRAINED),
    "python main.py --config=configs/deit_s.py --mode=memory --devices=64":
        Run(local("deit_s.py"), f"{MEMORY} --config.batch_size=64",
            prints=r"on 64 devices(.|\n)*working memory"),
    "python main.py --config=configs/deit_s.py:deit_base_patch16_224 --mode=memory --devices=32 "
    "--config.batch_size=4096":
        Run({**local("deit_s.py:deit_base_patch16_224"), "4096": "64"}, MEMORY,
            prints=r"deit_base_patch16_224(.|\n)*on 32 devices(.|\n)*working memory"),
    "vitcompact prepare imagenet --tars TARS --out IMAGENET":
        Run(more="--unofficial", leaves="IMAGENET", prints="3 classes"),
    "vitcompact compare runs/a runs/b --out curves.png":
        Run({"runs/a": "DIR", "runs/b": "DIR2"}, after=(TRAIN, TRAIN_PLAN), leaves="curves.png",
            prints=r"test_accuracy(.|\n)*DIR2"),

    # From a dense model to a smaller one
    f"{COMPACT}/data/imagenet --macs 0.7 --out small --distil 5ep": COMPACT_RUN,
    f"{COMPACT}DATA --macs 0.7 --out small --distil 5ep": COMPACT_RUN,
    "vitcompact compact deit_small_patch16_224.fb_in1k --data folder:/data/imagenet --macs 0.7 "
    "--out small": Run(IMAGES, FEW, leaves="small/deploy.safetensors",
                       prints=r"\| compacted (.|\n)*\| deployed "),
    f"{COMPACT_DIGITS}DIR3": DIGITS_RUN,
    f"{COMPACT_DIGITS}small": DIGITS_RUN,
    COMPACT_DIGITS.replace("deit_s.safetensors", "deit_small_patch16_224.fb_in1k") + "small":
        DIGITS_RUN,

    # Weights
    "vitcompact convert deit_small_patch16_224.pth --model deit_small_patch16_224 "
    "--out deit_s.safetensors": Run(more="--force", leaves="deit_s.safetensors"),
    "vitcompact convert deit_s.safetensors --image-size 384 --out deit_s_384.safetensors":
        Run({"384 ": "32 "}, leaves="deit_s_384.safetensors"),
    "vitcompact convert hf-hub:org/name --out name.safetensors": Run(leaves="name.safetensors"),
    "vitcompact models 'vit_small*' --pretrained":
        Run(prints=r"vit_small_patch16_224\.augreg_in1k\n"),
    "vitcompact predict deit_small_patch16_224 photo.jpg": Run(prints=r"photo\.jpg\t\d \d"),
    "vitcompact push runs/small/deploy.safetensors --out release --receipt runs/small "
    "--repo org/name":
        Run(IN_SMALL, after=(f"{COMPACT}DATA --macs 0.7 --out small --distil 5ep",),
            leaves="release/README.md", prints="uploaded to hf-hub:org/name"),
    "vitcompact card --all --out cards": Run(leaves="cards/pvt_v2_b2.md", prints="5 cards"),
    "vitcompact card deit_small_patch16_224": Run(prints="heads: `HMHSA"),
    "vitcompact card pvt_v2_b2 --plan plan.json --out card.md": Run(leaves="card.md"),
    **dict.fromkeys(("vitcompact card deploy.safetensors --receipt small",
                     "vitcompact card small/deploy.safetensors --receipt small"),
                    Run(IN_SMALL, after=(f"{COMPACT}DATA --macs 0.7 --out small --distil 5ep",),
                        prints=r"Accuracy: [\d.]+% of 20 test images")),

    # Predicting and drawing
    "vitcompact predict deploy.safetensors cat.jpg": Run(prints=r"cat\.jpg(\t[a-z]+ [\d.]+){5}\n"),
    "vitcompact predict deploy.safetensors cat.jpg dog.jpg":
        Run(prints=r"cat\.jpg(\t.*){5}\ndog\.jpg(\t.*){5}\n"),
    "vitcompact predict deploy.safetensors photos --json > classes.jsonl":
        Run(leaves="classes.jsonl", prints=r'"image": "photos/more/b\.jpg"'),
    "vitcompact predict deploy.safetensors photos --top 1":
        Run(prints=r"photos/a\.jpg\t\w+ [\d.]+\nphotos/more/b\.jpg"),
    "vitcompact draw attention sparse.safetensors cat.jpg --out drawings":
        Run(leaves="drawings/matrices.png"),
    "vitcompact draw tokens evit.safetensors cat.jpg --out tokens.png": Run(leaves="tokens.png"),

    # Exporting and timing
    EXPORT: Run(leaves="deploy.onnx"),
    EXPORT_BOTH[0]: Run(leaves="dense.onnx"),
    EXPORT_BOTH[1]: Run(leaves="small.onnx"),
    "vitcompact export deploy.safetensors deploy.xml --half": Run(leaves="deploy.xml"),
    "vitcompact export deit_small_patch16_224.fb_in1k --to stablehlo --out deit.stablehlo":
        Run(leaves="deit.stablehlo"),
    "vitcompact page compare.html dense=dense.onnx small=small.onnx "
    "--runtime node_modules/onnxruntime-web/dist":
        Run(after=EXPORT_BOTH, leaves="compare.html", prints="open it in a browser"),
    f"taskset -c 0 {BENCH}plan plan.json --batch 8":
        Run(prints=r"\| dense \| XLA \|(.|\n)*\| plan.json \| XLA \|(.|\n)*batch 8;"),
    f"{BENCH}plan plan.json --runtime xla,ort,openvino,torch --threads 1":
        Run(prints=runtimes("XLA", "ONNX Runtime", "OpenVINO", "PyTorch") +
            r"(.|\n)*PyTorch has no row for plan\.json"),
    f"{BENCH}runtime xla-bf16,openvino-bf16,torch-bf16,torch-compile --wall":
        Run(prints=runtimes("XLA, bfloat16", "OpenVINO, bfloat16", "PyTorch, bfloat16",
                            "PyTorch, compiled")),
    "vitcompact bench deploy.onnx --runtime ort,openvino --threads 1 --batch 1":
        Run(after=(EXPORT,), prints=runtimes("ONNX Runtime", "OpenVINO")),
    "vitcompact bench deploy.safetensors --runtime xla,ort,openvino --threads 1":
        Run(prints=runtimes("XLA", "ONNX Runtime", "OpenVINO")),

    # Experiments
    "python -m experiments.gallery": Run(more="--only photo_attention",
                                         leaves="gallery_photo_attention.webp"),
    "python -m experiments.survive --kills 50": Run({"50": "2"}, prints="restarts that .*: 1"),
    "python -m experiments.survive --flips 100": Run({"100": "2"}, prints="flips: 2"),
}
SERVED = "tests/export/test_serve.py::test_answers_on_photographs_are_those_of_the_library"
PATH_RUN = "tests/run/test_path.py::test_each_stage_writes_its_file"
SLICE = "tests/test_launch.py::test_a_slice_is_created_prepared_and_trained_on"
ELSEWHERE = {
    "make demo": PATH_RUN,
    "python main.py --config=configs/compact_digits.py --workdir=digits": PATH_RUN,
    "python main.py --config=... --workdir=... --coordinator=HOST:1234 --num_processes=2 "
    "--process_id=0": "tests/run/test_processes.py::"
                      "test_two_processes_end_with_the_numbers_of_one_despite_a_kill",
    "SPOT=1 launch/tpu.sh deit us-central2-b v4-32 configs/deit_s.py /mnt/runs/deit_s "
    "--config.mesh.fsdp=4": SLICE,
    "launch/tpu.sh deit us-central2-b v4-8 configs/deit_s.py /mnt/runs/deit_s "
    "--config.data.name=arrayrecord:/mnt/imagenet": SLICE,
    "python examples/serve.py deploy.onnx 8000": SERVED,
    "curl --data-binary @cat.jpg http://127.0.0.1:8000": SERVED,
    "npm install onnxruntime-web@1.30.0":     # with npm pack
        "tests/export/test_page.py::test_an_image_is_classified_and_timed_and_kept_patches_drawn",
}
NOT_RUN = {
    "make lint": "CI runs it", "make test": "CI runs it",
    "make test-all": "it is these tests, with the slow ones",
    ".venv/bin/python -m pytest tests/test_plan.py -k depth": "it is one of these tests",
    ".ci/ranges": "installs two environments in ten minutes",
    "pip install 'jax[cuda13]==0.10.2'": "for machines with a GPU",
    "pip install 'vitcompact[export]'": "make installs these packages, at the pinned versions",
    "pip install torch timm": "large; stand-ins take their place here",
    "python -m experiments.survive --resume":
        "two minutes; tests/run/test_processes.py and tests/run/test_stop.py do the same",
}


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
  """Shrinks the named models, measuring and timing; gives each run one device."""
  for name in list(VARIANTS):
    if name in SMALL:
      patch.setitem(VARIANTS, name, VARIANTS[name]._replace(sizes=SMALL[name]))
      for row in tags.table()[name].values():
        patch.setitem(row, "num_classes", 10)
        patch.setitem(row, "image_size", SMALL[name]["image_size"])
    else:
      patch.delitem(VARIANTS, name)
  tiny.few_options(patch)
  rounds, device = bench.rounds_of, jax.devices()[:1]
  patch.setattr(bench, "rounds_of",
                lambda *given, **options: rounds(*given, **{**options, "min_seconds": 0}))
  patch.setattr(jax, "devices", lambda *_: device)


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


def run_experiment(name: str, words: list[str]):
  """Runs an experiment in this process; it writes into the current folder."""
  module, here = importlib.import_module(name), pathlib.Path.cwd()
  with mock.patch.object(sys, "argv", [name, *words]), pytest.MonkeyPatch.context() as patch:
    for place in {"RESULTS", "PAGE", "PICTURES"} & vars(module).keys():
      path = getattr(module, place)
      patch.setattr(module, place, shutil.copy(path, here / path.name) if path.is_file() else here)
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
    if "--mode=memory" in words:    # simulates devices, so JAX must not have started
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
  with pytest.MonkeyPatch.context() as patch, serving(patch, start / "hub") as hub:
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
      run = RUN[command]
      text = f"{command} "
      for old, new in run.smaller.items():
        text = text.replace(old, new)
      return ran(tuple(words_of(f"{text} {run.more}")),
                 tuple(outcome(earlier).folder for earlier in run.after))

    yield outcome


def test_every_complete_command_is_accounted_for_once():
  entries = [*RUN, *ELSEWHERE, *NOT_RUN]
  assert sorted(entries) == sorted(complete())


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_docs_runs(command, outcome):
  run, (folder, printed) = RUN[command], outcome(command)
  assert re.search(run.prints, printed), printed
  assert (folder / run.leaves).stat().st_size
