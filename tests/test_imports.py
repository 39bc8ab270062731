"""Which part of the library may import which, checked against the imports themselves."""
import ast
import pathlib
import re
import subprocess
import sys

import pytest

from vitcompact.methods import METHODS, protocol

ROOT = pathlib.Path(__file__).parent.parent
BASE = {"trees", "settings", "kernels", "torch_names", "token_state", "attention", "layers",
        "regression", "rotary", "convolution", "depthwise", "tracing"}
MODELS = BASE | {"methods", "plan", "execution", "block", "models"}
VERBS = {"batches", "calibration", "curvature", "compact", "fold", "verify", "count", "features",
         "convert", "receipt", "preprocess", "bench", "latency", "measure", "planner", "report",
         "checks", "export", "runtimes", "tune", "files", "fit", "foreign", "foreign_config",
         "foreign_names", "foreign_rules", "foreign_tensors", "compare", "draw", "pytorch",
         "timm_network", "hub"}
# part -> the parts it may import, besides itself. A part is a file or a folder of vitcompact/.
MAY = {
    "trees": set(), "settings": set(), "kernels": set(), "torch_names": set(),
    "regression": set(), "tracing": set(),
    "attention": {"trees", "kernels"}, "depthwise": {"attention", "tracing"},
    "convolution": {"depthwise"},
    "layers": {"trees", "kernels", "convolution", "depthwise", "tracing"},
    "token_state": {"trees", "attention"}, "rotary": {"token_state"}, "execution": {"attention"},
    "methods": BASE,
    "plan": {"methods", "trees", "token_state"},
    "block": BASE | {"methods", "plan"},
    "models": MODELS,
    "data": {"trees", "settings"},
    # The package's own names (`vc.fold`) stand for verbs, models and plans.
    **{verb: MODELS | VERBS | {"data", "vitcompact", "_version"} for verb in VERBS},
    "_version": set(),
    "train": MODELS | VERBS | {"data", "vitcompact"},
    "run": MODELS | VERBS | {"data", "vitcompact", "train"},
    "cli": MODELS | VERBS | {"data", "vitcompact", "_version", "train", "run"}, "__main__": {"cli"},
}
# Code that loops over methods, and refers to none of them.
CORE = ["plan.py", "block.py", "execution.py", "convert.py", "fit.py", "foreign.py", "files.py",
        "foreign_config.py", "foreign_names.py", "foreign_rules.py", "foreign_tensors.py",
        "count.py", "batches.py", "calibration.py", "curvature.py", "compact.py", "measure.py",
        "planner.py", "report.py", "fold.py", "tune.py", "settings.py", "receipt.py",
        "methods/protocol.py", "methods/surgery.py",
        *(f"train/{name}.py"
          for name in ("optim", "objective", "phases", "config", "build", "step")),
        # Model names that imply a method are in a table in models/.
        *(f"models/{path.name}" for path in sorted((ROOT / "vitcompact/models").glob("*.py"))
          if path.name != "inline_variants.py")]
LISTED = [kind for kinds in METHODS.values() for kind in kinds.values()]


def imports(path):
  """Yields the dotted names that a file imports: `from a import b` as both a and a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(path):
  """Yields the parts of vitcompact/ that a file imports."""
  known = {p.stem for p in (ROOT / "vitcompact").iterdir()}
  for name in imports(path):
    first, *rest = name.split(".")
    if first == "vitcompact":
      yield rest[0] if rest and rest[0] in known else "vitcompact"


def test_every_part_imports_only_the_parts_it_may():
  wrong = []
  for path in sorted((ROOT / "vitcompact").rglob("*.py")):
    part = path.relative_to(ROOT / "vitcompact").parts[0].removesuffix(".py")
    if part == "__init__":
      continue
    assert part in MAY, f"{path}: a new part; say what it may import"
    wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in imported_parts(path)
              if other != part and other not in MAY[part]]
  assert not wrong


def test_a_method_imports_only_the_protocol_and_helpers_of_its_axis():
  homes = {kind.__module__ for kind in LISTED}
  wrong = []
  for path in sorted((ROOT / "vitcompact/methods").rglob("*.py")):
    home = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if home == "vitcompact.methods.__init__":
      continue
    axis = home.rsplit(".", 1)[0]     # helpers of an axis are in its folder
    for name in imports(path):
      allowed = re.match(r"vitcompact\.methods\.(protocol|surgery|merging)\b", name) or (
          name.startswith(f"{axis}.") and name.rsplit(".", 1)[0] not in homes)
      if name.startswith("vitcompact.methods") and not allowed:
        wrong.append(f"{home} imports {name}")
  # `from vitcompact.methods import surgery` gives only the module's own name.
  assert not wrong


@pytest.mark.parametrize("name", CORE)
def test_the_core_refers_to_no_method(name):
  """Not by its class, its name in files, or the path of its parameters; docstrings may."""
  path = ROOT / "vitcompact" / name
  words = {kind.__name__ for kind in LISTED} | {key for kinds in METHODS.values() for key in kinds}
  words |= {protocol.scope_of(kind) for kind in LISTED if kind.axis in ("heads", "attention")}
  # A family of models may share its name with a method.
  modules = {p.stem for p in path.parent.glob("*.py")} if name == "models/__init__.py" else set()
  assert not set(identifiers(path)) & words - modules
  papers = {kind.__name__.lower() for kind in LISTED}   # hMHSA, cFFN
  assert not [text for text in strings(path) for word in re.findall(r"\w+", text)
              if word in words or (word != word.lower() and word.lower() in papers)]
  assert not [module for module in imports(path)
              if re.match(r"vitcompact\.methods\.(heads|attention|tokens|ffn)\b", module)]


def identifiers(path):
  for node in ast.walk(ast.parse(path.read_text())):
    for field in ("id", "attr", "name", "arg", "asname"):
      if isinstance(word := getattr(node, field, None), str):
        yield word


def strings(path):
  """Yields a file's strings, except docstrings and `plan.upgraded`, which reads old files."""
  tree = ast.parse(path.read_text())
  tree.body = [node for node in tree.body if getattr(node, "name", None) != "upgraded"]
  docstrings = {node.body[0].value for node in ast.walk(tree)
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
                and isinstance(node.body[0], ast.Expr)}
  return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
          and isinstance(node.value, str) and node not in docstrings]


def test_the_library_imports_no_programs():
  for path in (ROOT / "vitcompact").rglob("*.py"):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"experiments", "configs", "tests", "main"}, path
  for path in (ROOT / "configs").glob("*.py"):
    assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections", "configs"}, path


def test_importing_the_package_starts_no_device_and_is_light():
  code = """
import sys
import vitcompact as vc
assert "jax" not in sys.modules
for name in vc.__all__:
  getattr(vc, name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
# `import scipy` loads its parts when they are first used: scipy.stats takes as long as JAX.
heavy = {"tensorflow", "torch", "sklearn", "grain", "scipy.stats", "scipy.optimize"}
heavy &= set(sys.modules)
assert not heavy, heavy
import vitcompact.fold
assert callable(vc.fold)
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_training_on_digits_loads_neither_tensorflow_nor_torch():
  code = """
import sys
import main
from configs import digits
from vitcompact.data import pipeline
from vitcompact.run import loop, report
data = pipeline.train_batches(digits.get_config().data, image_size=16, batch_size=4, seed=0)
next(data)
data.close()
heavy = {"tensorflow", "tensorflow_datasets", "pyarrow", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
