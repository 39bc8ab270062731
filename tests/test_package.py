"""The package is complete, declares its dependencies, and has one source for its version."""
import ast
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vitcompact as vc

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values()
          for line in lines]
# Packages whose module has a different name.
PACKAGES = {"PIL": "pillow", "google": "protobuf", "markdown_it": "markdown-it-py",
            "sklearn": "scikit-learn", "absl": "absl-py", "orbax": "orbax-checkpoint"}
# Installed by name by those who need them: a vendor's kernels.
NOT_DECLARED = {"tokamax"}


def modules(path):
  """Yields the top-level names that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module.partition(".")[0]


def test_everything_the_package_imports_is_declared():
  imported = {name for path in (ROOT / "vitcompact").rglob("*.py") for name in modules(path)}
  imported -= {"vitcompact", *sys.stdlib_module_names, *NOT_DECLARED}
  declared = {canonicalize_name(needed.name) for needed in (*NEEDED, *EXTRAS)}
  assert {canonicalize_name(PACKAGES.get(name, name)) for name in imported} <= declared


def test_pins_are_within_the_declared_ranges():
  text = "".join((ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-dev", "-docs"))
  pins = {canonicalize_name(name): version
          for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M)}
  for needed in NEEDED:
    assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), needed
  for extra in EXTRAS:
    pin = pins.get(canonicalize_name(extra.name))
    assert pin is None or extra.specifier.contains(pin), extra


def test_every_range_has_a_lower_bound_that_can_be_pinned():
  """.ci/ranges turns each into a pin."""
  for line in PROJECT["dependencies"]:
    assert re.fullmatch(r"[\w-]+>=[\d.]+(,<[\d.]+)?", line), line


def test_the_version_matches_the_citation_and_the_changelog():
  cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
  assert vc.__version__ == cited
  assert re.search(rf"^## .*{re.escape(vc.__version__.partition('.dev')[0])}",
                   (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_a_wheel_has_every_module_and_nothing_else(tmp_path):
  subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
                 check=True, cwd=ROOT, capture_output=True)
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as file:
    names = {name for name in file.namelist() if ".dist-info/" not in name}
    licence = file.read(f"vitcompact-{vc.__version__}.dist-info/licenses/LICENSE")
  assert names == {str(path.relative_to(ROOT)) for path in (ROOT / "vitcompact").rglob("*")
                   if path.suffix in (".py", ".json", ".html")}
  assert licence == (ROOT / "LICENSE").read_bytes()
