"""Who may import whom: the order of the house, read off the imports themselves."""
import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
AXES = {"heads", "links", "tokens", "ffn"}
VERBS = {"compact", "fold", "verify", "count", "features", "convert", "preprocess", "receipt",
         "bench", "measure", "doors", "export", "tune", "pytorch", "draw", "compare"}
BASE = {"trees", "kernels", "backends", "attention", "layers"}
# room -> the rooms it may import, besides itself. A room is a file or a folder of vitcompact/.
MAY = {
    "trees": set(), "kernels": set(),
    "backends": {"kernels"}, "attention": {"trees", "kernels", "backends"},
    "layers": {"trees", "kernels"},
    **{axis: BASE for axis in AXES},
    "plan": AXES | {"attention"},
    "block": BASE | AXES | {"plan"},
    "models": BASE | AXES | {"plan", "block"},
    "data": {"trees"},
    # The package's own names (`vc.fold`) stand for verbs, models and plans.
    **{verb: BASE | AXES | VERBS | {"plan", "block", "models", "data", "vitcompact"}
       for verb in VERBS},
    # The command needs no JAX before a verb runs: it takes the version from its own file.
    "cli": VERBS | {"data", "vitcompact", "_version"}, "__main__": {"cli"}, "_version": set(),
    "train": BASE | AXES | VERBS | {"plan", "block", "models", "data", "vitcompact"},
}


def imports(path):
  """Dotted names that a file imports, `from a import b` as both a and a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(path):
  """The rooms of vitcompact/ that a file imports."""
  known = {p.stem for p in (ROOT / "vitcompact").iterdir()}
  for name in imports(path):
    first, *rest = name.split(".")
    if first == "vitcompact":
      yield rest[0] if rest and rest[0] in known else "vitcompact"


def test_every_room_imports_only_rooms_below_it():
  wrong = []
  for path in sorted((ROOT / "vitcompact").rglob("*.py")):
    room = path.relative_to(ROOT / "vitcompact").parts[0].removesuffix(".py")
    if room == "__init__":
      continue
    wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in rooms(path)
              if other != room and other not in MAY[room]]
  assert not wrong


def test_nothing_imports_the_programs():
  for path in (ROOT / "vitcompact").rglob("*.py"):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"experiments", "configs", "tests", "main"}, path
  for path in (ROOT / "configs").glob("*.py"):
    assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections", "configs"}, path


def test_importing_the_package_starts_no_device_and_loads_nothing_heavy():
  code = """
import sys
import vitcompact as vc
assert "jax" not in sys.modules
vc.create_model, vc.fold
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
heavy = {"tensorflow", "torch", "sklearn", "grain"} & set(sys.modules)
assert not heavy, heavy
import vitcompact.fold
assert callable(vc.fold)
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_training_on_digits_loads_nothing_of_tensorflow_and_torch():
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
