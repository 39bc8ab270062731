"""The Python of the README runs, as it stands there."""
import pathlib
import re

import pytest

import vitcompact as vc

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.filterwarnings("error")
def test_the_python_runs():
  first, plans, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  # The same lines at a size that a test can afford.
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


def test_a_method_of_ones_own_is_shown_as_it_is_tested():
  """Where the README shows one, it is a file that tests/methods/test_protocol.py runs."""
  own = pathlib.Path(__file__).parent / "methods" / "own"
  shown = [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
           if "axis: ClassVar" in text]
  files = [path.read_text() for path in own.glob("*.py")]
  assert all(any(text.strip() in file for file in files) for text in shown)
