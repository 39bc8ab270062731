"""The notebooks run, each at a size that a test can afford, and are committed without outputs."""
import gzip
import importlib.util
import json
import pathlib
import re
import time
import warnings

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.data.test_idx import idx_bytes
from vitcompact.data import idx

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = ("01_first_compact_vit", "02_your_own_checkpoint", "03_sparse_attention_seen",
         "04_train_on_tpu")
SMALL = {"image_size": 32, "width": 24, "depth": 1, "heads": 2, "patch_size": 8, "num_classes": 5}
# The values that a test puts in the cell tagged "parameters".
TOY = {
    "01_first_compact_vit": {
        "MACS": 0.9, "CALIBRATION_IMAGES": 64, "WEIGHTS": "toy.safetensors", "IMAGES": ""},
    "02_your_own_checkpoint": {
        "NAME": "deit_tiny_patch16_224.fb_in1k", "SIZES": SMALL, "FOLDER": "",
        "CALIBRATION_IMAGES": 8, "OUT": "compact.onnx"},
    "03_sparse_attention_seen": {
        "NAME": "deit_small_patch16_224.fb_in1k", "SIZES": SMALL, "KEEP": 0.25, "WINDOW": 2,
        "BLOCKS": (0,), "QUERY": (0.5, 0.4), "CALIBRATION_IMAGES": 4},
    "04_train_on_tpu": {
        "MODEL": {"name": "deit_tiny_patch16_224", "image_size": 8, "patch_size": 4, "width": 16,
                  "depth": 1, "heads": 2, "drop_path_rate": 0.0},
        "STEPS": 2, "BATCH_SIZE": 16, "WORKDIR": "run"},
}


def cells(name: str) -> list[dict]:
  return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def code(name: str) -> list[dict]:
  return [cell for cell in cells(name) if cell["cell_type"] == "code"]


def names_of(source: str) -> set[str]:
  """Returns the top-level names that a cell assigns."""
  scope = {}
  exec(source, scope)
  return scope.keys() - {"__builtins__"}


def run(name: str, **addresses) -> dict:
  """Runs all code in one namespace, as a kernel does, at smaller sizes; returns the namespace."""
  scope = {"__name__": "__main__"}
  for number, cell in enumerate(code(name)):
    begin = time.process_time()
    exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), scope)
    if "parameters" in cell["metadata"].get("tags", []):
      assert TOY[name].keys() == names_of("".join(cell["source"]))
      scope |= TOY[name] | addresses
    print(f"cell {number}: {time.process_time() - begin:.1f} s")
  return scope


@pytest.fixture
def isolated(tmp_path, monkeypatch):
  """An empty folder to run in, without the hub and without a window to draw in."""
  from huggingface_hub import constants  # reads the environment only once
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
  monkeypatch.setenv("VITCOMPACT_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("MPLBACKEND", "Agg")
  with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
    warnings.simplefilter("ignore")       # few calibration images; a canvas not shown
    yield tmp_path


def test_every_notebook_has_a_test():
  assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES) == list(TOY)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_no_outputs(name):
  book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
  assert book["nbformat"] == 4 and book["nbformat_minor"] >= 5
  assert book["metadata"]["kernelspec"]["name"] == "python3"
  ids = [cell["id"] for cell in book["cells"]]
  assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]{1,64}", each) for each in ids)
  for cell in book["cells"]:
    assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["metadata"], dict)
    assert all(isinstance(line, str) for line in cell["source"])
    assert all(len(line.rstrip("\n")) <= 110 for line in cell["source"] if "http" not in line)
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
    else:
      assert "outputs" not in cell


def repository() -> str:
  """Returns the repository's address from docs/conf.py, the one place that states it."""
  spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.REPOSITORY


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_starts_with_a_badge_and_an_install_from_git(name):
  first, install, *_ = cells(name)
  where = f"https://colab.research.google.com/github/{repository()}/blob/main/notebooks/{name}.ipynb"
  assert f"]({where})" in "".join(first["source"])
  text = "".join(install["source"])
  assert f'REPOSITORY = "https://github.com/{repository()}"' in text
  assert re.search(r'"vitcompact(\[[\w,]+\])? @ git\+\{REPOSITORY\}"', text)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs_only_what_is_missing(name, monkeypatch):
  text, called = "".join(code(name)[0]["source"]), []
  monkeypatch.setattr("subprocess.run", lambda command, **options: called.append(command))
  exec(text, {})
  assert not called
  monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
  exec(text, {})
  assert called[0][1:4] == ["-m", "pip", "install"] and "@ git+https://" in called[0][-1]


@pytest.fixture
def published(isolated, monkeypatch):
  """A folder with what the first notebook downloads, small: (its weights, its images)."""
  folder, random = isolated / "published", np.random.default_rng(0)
  model = tiny.deit(depth=1, heads=2, num_classes=10)
  (folder / "raw/main").mkdir(parents=True)
  vc.save(folder / "raw/main/toy.safetensors", model, tiny.init(model))
  for split, count in (("train", 80), ("t10k", 20)):
    for what, values in (("images-idx3", random.integers(0, 256, (count, 8, 8))),
                         ("labels-idx1", np.arange(count) % 10)):
      (folder / f"{split}-{what}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values)))
  monkeypatch.setattr(idx, "FASHION_FOLDERS", (str(isolated / "not installed"),))
  monkeypatch.setenv(idx.FASHION_VARIABLE, "")      # and restored, whatever a cell sets
  return folder.as_uri()


def test_the_first_notebook_runs(published, isolated):
  scope = run("01_first_compact_vit", REPOSITORY=published, IMAGES=published)
  assert scope["proof"].ok and scope["deploy_count"].macs < scope["dense_count"].macs
  assert (len(scope["train_images"]), len(scope["test_images"])) == (64, 20)
  assert vc.convert.classes_of(isolated / "first_compact_vit.safetensors")[9] == "Ankle boot"
  assert len(list((isolated / "downloaded").iterdir())) == 5


def test_the_first_notebook_starts_from_the_committed_weights():
  """Which it finds in a checkout, and at the same place of the repository."""
  scope = {}
  exec("".join(code("01_first_compact_vit")[1]["source"]), scope)
  assert (FOLDER.parent / scope["WEIGHTS"]).is_file()


def test_the_notebook_for_own_checkpoints_says_that_weights_are_random(isolated, capsys):
  scope = run("02_your_own_checkpoint")
  said = capsys.readouterr().out
  assert not scope["TRAINED"] and said.count("RANDOM") == 2
  assert scope["proof"].ok and (isolated / "compact.onnx").exists()
  assert scope["done"].max_rel <= scope["done"].tolerance


def test_the_notebook_of_sparse_attention_draws_it(isolated, capsys):
  pytest.importorskip("matplotlib")
  scope = run("03_sparse_attention_seen")
  assert "RANDOM" in capsys.readouterr().out
  for share_of_attention, share_of_pairs in scope["held"].values():
    assert 0 < share_of_pairs <= 5 / 16 and 0 < share_of_attention <= 1


def test_the_notebook_of_training_shards_over_all_devices(isolated):
  scope = run("04_train_on_tpu")
  assert scope["mesh"].shape["fsdp"] == 2 and scope["proof"].ok
  assert 0.5 <= scope["held"] < 0.8
  assert (isolated / "run" / "checkpoints").is_dir()
