"""The README's table is what its command prints, and its Python runs."""
import pathlib
import re
import shlex

import pytest

import vitcompact as vc
from vitcompact.cli import count

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_table_is_what_its_command_prints():
  command = re.search(r"`vitcompact count ([^`]*)`", README)[1]
  printed = count.table(shlex.split(command))
  assert printed in README


@pytest.mark.filterwarnings("error")
def test_the_python_runs():
  first, plans = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
