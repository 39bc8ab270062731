"""The Python of the README runs as written, and the files it tells newcomers to read are short."""
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import pytest

import vitcompact as vc
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


# A comment in it also says that four images are few.
@pytest.mark.filterwarnings("error", "ignore:.*few calibration images|.*calibration images are few")
def test_the_python_of_the_readme_runs():
  first, plans, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  # The same lines, at a size that a test can afford.
  tiny = first.replace('"deit_small_patch16_224"', '"deit_tiny_patch16_224", depth=1, width=48,'
                       ' image_size=32').replace("224, 224", "32, 32")
  assert tiny.count("32, 32") == 1
  scope = {}
  exec(tiny, scope)
  exec(plans, scope)
  vc.create_model("deit_tiny_patch16_224", plan=scope["plan"])
  proof = vc.verify(*(scope[name] for name in (
      "small", "small_variables", "deploy", "deploy_variables", "images")))
  assert proof.ok
  assert vc.count(scope["deploy"]).params < vc.count(scope["model"]).params
  for text in others:
    compile(text, "README.md", "exec")


def test_the_readmes_example_of_an_own_method_is_a_tested_file():
  """tests/methods/test_protocol.py runs that file."""
  own = pathlib.Path(__file__).parent / "methods" / "own"
  shown = [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
           if "axis: ClassVar" in text]
  files = [path.read_text() for path in own.glob("*.py")]
  assert all(any(text.strip() in file for file in files) for text in shown)


def first_files() -> list[pathlib.Path]:
  """Returns the files to read first; a name without a folder is in the one named before it in its
  row, or in vitcompact/ or vitcompact/methods/."""
  table = README.split("## Read these files in this order")[1]
  files = []
  for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE):
    first, *others = re.findall(r"`(.*?)`", row)
    files.append(ROOT / first)
    for name in others:
      places = [files[-1].parent / name, files[-1].parent.parent / name]
      files.append(next(place for place in places if place.exists()))
  return files


def test_the_files_to_read_first_have_at_most_2500_lines():
  files = first_files()
  assert len(files) == len(set(files)) >= 10
  assert sum(len(path.read_text().splitlines()) for path in files) <= 2500


def test_at_most_nine_of_our_calls_lead_from_apply_to_the_first_scores(monkeypatch):
  """In the reference form, the first product of two activations is that of queries and keys."""
  model = tiny.deit()
  variables, einsum, calls = tiny.init(model), jnp.einsum, []

  def watched(*args, **kwargs):
    calls.append([frame for frame in traceback.extract_stack()
                  if pathlib.Path(frame.filename).is_relative_to(ROOT / "vitcompact")])
    return einsum(*args, **kwargs)

  monkeypatch.setattr(jnp, "einsum", watched)
  with vc.attention.using("einsum"):
    jax.eval_shape(model.apply, variables, tiny.images(model))
  assert calls[0][-1].name == "scores"
  assert len(calls[0]) <= 9, [f"{frame.filename}:{frame.lineno}" for frame in calls[0]]
