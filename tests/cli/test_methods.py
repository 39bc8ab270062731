"""Methods from a user's own file in the `vitcompact` command."""
import vitcompact as vc
from tests.cli import command

FILE = """import vitcompact as vc
from tests.methods.own.drop_tokens import KeepLargest

vc.METHODS["tokens"]["largest_of_a_file"] = KeepLargest
"""
COUNT = ("count", "deit_tiny_patch16_224", "--plan", '{"tokens": {"method": "largest_of_a_file"}}')


def test_a_command_imports_methods_from_a_file(tmp_path, monkeypatch):
  monkeypatch.setitem(vc.METHODS, "tokens", dict(vc.METHODS["tokens"]))
  monkeypatch.syspath_prepend(tmp_path)
  assert "unknown name 'largest_of_a_file'" in command.fails(*COUNT)
  for number, arguments in enumerate(((*COUNT, "--methods"), ("--methods",))):
    vc.METHODS["tokens"].pop("largest_of_a_file", None)
    file = tmp_path / f"my_methods_{number}.py"
    file.write_text(FILE)
    rest = () if len(arguments) > 1 else COUNT
    assert "MACs" in command.succeeds(*arguments, file, *rest)


def test_a_file_of_methods_that_fails_is_named(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  assert "--methods missing.py: there is no such file" in command.fails(
      *COUNT, "--methods", "missing.py")
  (tmp_path / "json.py").write_text("raise SystemExit")     # Python has a module of this name
  assert "json.py: another module is called json; rename the file" in command.fails(
      *COUNT, "--methods", tmp_path / "json.py")
  (tmp_path / "broken_methods.py").write_text("1 / 0")
  assert "broken_methods.py: ZeroDivisionError: division by zero" in command.fails(
      *COUNT, "--methods", tmp_path / "broken_methods.py")
