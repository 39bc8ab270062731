"""The docs are true: links lead somewhere, examples run, commands and their options exist."""
import argparse
import ast
import functools
import importlib.util
import inspect
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
import warnings

import click
import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import main  # noqa: F401, defines the flags of main.py
import vitcompact as vc
from tests import tiny
from vitcompact import cli, models
from vitcompact.run import config_file
from vitcompact.train.config import complete

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md",
                ROOT / "results" / "README.md"])
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def text_of(page: pathlib.Path) -> str:
  return page.read_text(encoding="utf-8")


def blocks(page: pathlib.Path, *kinds: str) -> list[str]:
  """Returns the contents of the fenced blocks of these kinds, dedented."""
  return [textwrap.dedent(body) for _, kind, body in FENCE.findall(text_of(page))
          if kind.strip() in kinds]


def prose(page: pathlib.Path) -> str:
  """Returns a page without its code blocks."""
  return FENCE.sub("", text_of(page))


# Links and navigation


def anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors of a page's headings, as GitHub makes them."""
  found, out = {}, set()
  for heading in re.findall(r"^#{1,6} +(.*?) *$", prose(page), re.MULTILINE):
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
    number = found[slug] = found.get(slug, -1) + 1
    out.add(f"{slug}-{number}" if number else slug)
  return out


def broken_links(page: pathlib.Path) -> list[str]:
  broken = []
  for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
    path, _, anchor = target.partition("#")
    if re.match(r"[a-z]+:", path):
      continue
    there = page if not path else page.parent / path
    if not there.exists() or (anchor and anchor not in anchors(there)):
      broken.append(target)
  return broken


@EACH_PAGE
def test_relative_links_and_anchors_lead_somewhere(page):
  assert broken_links(page) == []


def test_every_page_is_in_the_navigation_once():
  listed = [line for tree in blocks(DOCS / "index.md", "{toctree}") for line in tree.splitlines()
            if line and not line.startswith(":")]
  assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_the_index_links_what_it_lists():
  text = prose(DOCS / "index.md")
  assert all(f"({page.name})" in text for page in DOCS.glob("*.md") if page.stem != "index")


def test_the_strict_build_passes(tmp_path):
  options = ["-q", "-E", "-W", "--keep-going"]
  command = [sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


# Python


def dense_model() -> dict:
  """Returns a small dense model, its variables and images, named as in the pages' examples."""
  model = tiny.deit(depth=1, heads=2)
  return {"jax": jax, "vc": vc, "model": model, "variables": tiny.init(model),
          "images": np.asarray(tiny.images(model, 16)), "names": list("abcde")}


def dense_model_and_plan() -> dict:
  return dense_model() | {"plan": vc.Plan(ffn=vc.CFFN())}


def exported_stablehlo() -> dict:
  """Writes the StableHLO file that a page loads, and returns the page's scope."""
  scope = dense_model()
  vc.export(scope["model"], scope["variables"], "model.stablehlo")
  return scope


def photograph_file() -> dict:
  Image.new("RGB", (8, 6)).save("in.jpg")
  return {}


# {page: (a function that returns its scope, {text: its smaller replacement in the test})}
RUN = {
    "adding": (dict, {'"deit_small_patch16_224", plan': '"deit_tiny_patch16_224", plan'}),
    "attention": (dict, {}), "ffn": (dict, {}), "heads": (dict, {}), "tokens": (dict, {}),
    "models": (dict, {}), "compaction": (dense_model_and_plan, {"macs=0.7": "macs=0.9"}),
    "deploying": (exported_stablehlo, {"deit.onnx": "deit.stablehlo"}),
    "troubleshooting": (photograph_file, {}),
}
# Only compiled, with calls compared with signatures. weights: needs the hub; tests/test_hub.py has
# such calls. README: tests/test_readme.py runs it.
READ = {"weights", "README"}


@EACH_PAGE
def test_python_compiles_and_calls_existing_functions(page):
  for body in blocks(page, "python"):
    tree = ast.parse(body)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
      if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "vc":
        bind(call)


def bind(call: ast.Call):
  """Raises if vc.NAME does not exist or does not take these arguments."""
  signature = inspect.signature(getattr(vc, call.func.attr))
  signature.bind(*call.args, **{word.arg: word.value for word in call.keywords})


def test_every_page_with_python_is_run_or_read():
  having = {page.stem for page in PAGES if blocks(page, "python")}
  assert having == RUN.keys() | READ


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("VITCOMPACT_CACHE", str(tmp_path / "cache"))
  for axis, methods in vc.METHODS.items():
    monkeypatch.setitem(vc.METHODS, axis, dict(methods))
  monkeypatch.setattr(models, "VARIANTS", dict(models.VARIANTS))
  make, smaller = RUN[name]
  page = DOCS / f"{name}.md"
  whole = "".join(blocks(page, "python"))
  assert all(old in whole for old in smaller), "the page no longer has a text to replace"
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")        # of few calibration images
    # A class defined on a page looks up its module.
    scope = {"__name__": "__main__", **make()}
    for number, body in enumerate(blocks(page, "python")):
      for old, new in smaller.items():
        body = body.replace(old, new)
      exec(compile(body, f"{name}.md, block {number}", "exec"), scope)


def test_files_shown_on_a_page_are_those_of_the_tests():
  shown = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", text_of(DOCS / "adding.md"),
                     re.DOTALL)
  assert len(shown) == 2
  for path, body in shown:
    assert body == (ROOT / path).read_text(encoding="utf-8"), path


# The API


def test_the_api_has_every_public_name():
  methods = {kind.__name__ for kinds in vc.METHODS.values() for kind in kinds.values()}
  named = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", text_of(DOCS / "api.md"), re.MULTILINE)
  public = [name.removeprefix("vitcompact.") for name in named if name.count(".") == 1]
  assert sorted(public) == sorted({*vc.__all__, *methods})
  for name in named:
    module, _, last = name.rpartition(".")
    thing = importlib.import_module(name) if name.endswith("protocol") else getattr(
        importlib.import_module(module), last)
    assert isinstance(thing, dict) or thing.__doc__, f"{name} has no docstring"


def load_conf():
  spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_docstrings_are_converted_to_lists_prose_and_code():
  told = load_conf().house_style(textwrap.dedent("""\
      Does `this
      thing`, x_bnw and all.

          y = a * b

      Its members
          first(x) -> y     what
                            it is
      >>> thing(a_b=1)

      Args:
        one, two: numbers;
          more of them. three: no item.
        model: dense.
      Raises:
        ValueError: never.
      """).splitlines())
  lines = [line for line in told if line]
  assert lines == [
      "Does ``this thing``, x\\_bnw and all.", "::", "       y = a * b", "Its members", "::",
      "       first(x) -> y     what", "                         it is", ">>> thing(a_b=1)",
      "**Args**",
      "* **one, two**: numbers;", "  more of them. three: no item.", "* **model**: dense.",
      "**Raises**", "* **ValueError**: never."]


# Commands


def commands(page: pathlib.Path) -> list[tuple[str, bool]]:
  """Returns (command, whether it is complete) for lines of plain blocks and for inline code."""
  whole = [line for body in blocks(page, "", "bash", "sh")
           for line in body.replace("\\\n", " ").splitlines()]
  inline = re.findall(r"`([^`]+)`", prose(page))
  return ([(re.split(r"\s+# ", line.strip())[0], True) for line in whole if line.strip()] +
          [(" ".join(code.split()), False) for code in inline])


def words_of(command: str) -> list[str]:
  """Splits a command, without environment variables and without pinning to a core."""
  try:
    words = shlex.split(command)
  except ValueError:      # an apostrophe in code that is not a command
    return []
  while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[:1] == ["sbatch"] or
                   words[0].startswith(("--nodes", "--gpus"))):
    words = words[1:]
  return words[3:] if words[:2] == ["taskset", "-c"] else words


def check_vitcompact(words: list[str], whole: bool):
  command, context = cli.main, click.Context(cli.main, info_name="vitcompact")
  while isinstance(command, click.Group) and words and not words[0].startswith("-"):
    if re.fullmatch(r"[A-Z]+", words[0]):       # vitcompact VERB ...
      return
    command = command.commands[words[0]]
    context, words = click.Context(command, parent=context, info_name=words[0]), words[1:]
  if whole and not isinstance(command, click.Group):
    command.make_context(context.info_name, list(words), parent=context.parent,
                         obj={"verbose": False})
    return
  known = {name: option for option in command.get_params(context)
           for name in (*option.opts, *option.secondary_opts)}
  for i, word in enumerate(words):
    if word.startswith("--"):
      option, rest = known[word.partition("=")[0]], words[i + 1:]
      if isinstance(option.type, click.Choice) and rest:
        assert rest[0] in option.type.choices, word


def check_main(words: list[str]):
  rest, overrides = config_file.split(words)
  if any("..." in word for word in rest):       # --config=...
    rest, overrides = [word for word in rest if "..." not in word], []
  given = {}
  for word in rest:
    name, _, value = word.removeprefix("--").partition("=")
    flag = flags.FLAGS[name]
    if value and not value.isupper():
      flag.parser.parse(value)
    given[name] = value
  if "config" in given and not given["config"].isupper():
    check_config(given["config"], overrides)


def check_config(where: str, overrides):
  complete(config_file.load(where, overrides))


def check_experiment(words: list[str], whole: bool, monkeypatch):
  """Parses these words with the experiment's own parser, without running it."""
  name, *arguments = words
  module = importlib.import_module(f"experiments.{name}")
  parse = argparse.ArgumentParser.parse_args

  class Parsed(Exception):
    pass

  def only_parse(parser, args=None, namespace=None):
    if whole:
      parse(parser, arguments)
    else:         # in the text, required arguments may be omitted
      options = parser.format_help()
      assert all(word in options for word in arguments if word.startswith("--")), arguments
    raise Parsed

  if hasattr(module, "argparse"):
    with monkeypatch.context() as patch, pytest.raises(Parsed):
      patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
      patch.setattr(sys, "argv", [name, *arguments])
      module.main()


def check(command: str, whole: bool, monkeypatch) -> bool:
  """Raises if a command names what does not exist; returns whether the command is one of ours."""
  words = words_of(command)
  if words[:1] == ["vitcompact"]:
    check_vitcompact(words[1:], whole and "..." not in words)
  elif words[:2] == ["python", "main.py"] or words[:1] == ["main.py"]:
    check_main(words[words.index("main.py") + 1:])
  elif words[:2] == ["python", "-m"] and words[2].startswith("experiments."):
    check_experiment([words[2].partition(".")[2], *words[3:]], whole, monkeypatch)
  elif words and words[0].startswith("launch/"):
    assert (ROOT / words[0]).is_file()
    place = {"launch/tpu.sh": 4}.get(words[0], 1)
    if len(words) > place and not words[place].isupper():
      config, _, *more = words[place:]
      check_main([f"--config={config}", *more])
  elif words[:1] == ["make"]:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(word in targets for word in words[1:] if "=" not in word and word.islower())
  elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
    assert (ROOT / words[1]).is_file()
  elif words[:2] == ["pip", "install"]:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"vitcompact\[([\w,]+)\]", command):
      assert set(extras.split(",")) <= known.keys(), command
  else:
    return False
  return True


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A folder with the files that commands name."""
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  (tmp_path / "plan.json").write_text(vc.Plan(heads=vc.HMHSA()).to_json())
  monkeypatch.chdir(tmp_path)
  return monkeypatch


@EACH_PAGE
def test_commands_name_verbs_options_configs_and_modules_that_exist(page, checkout):
  wrong = {}
  for command, whole in commands(page):
    try:
      check(command, whole, checkout)
    except (Exception, SystemExit) as error:
      wrong[command] = f"{type(error).__name__}: {error}"
  assert not wrong, "\n".join(f"{command}\n    {message}" for command, message in wrong.items())


def test_every_kind_of_command_is_found_and_checked(checkout):
  found = {command: whole for page in PAGES for command, whole in commands(page)
           if check(command, whole, checkout)}
  starts = [" ".join(command.split()[:2]) for command in found]
  for start in ("vitcompact export", "vitcompact draw", "python main.py", "python -m",
                "pip install", "python examples/serve.py", "launch/tpu.sh deit", "make demo"):
    assert any(each.startswith(start) for each in starts), start
  assert sum(found.values()) >= 40


@pytest.mark.parametrize("command", [
    "vitcompact shrink deit.safetensors", "vitcompact compact a --data digits --out b --mac 0.7",
    "vitcompact export a.safetensors a.onnx --to tflite", "vitcompact draw depth a b --out c",
    "vitcompact compact a --out b", "python main.py --config=configs/deit.py --workdir=a",
    "python main.py --config=configs/digits.py --workdir=a --config.totl_steps=4",
    "python main.py --config=configs/digits.py --work=a", "python -m experiments.none",
    "python main.py --config=configs/digits.py --workdir=a --mode=test",
    "python main.py --config=configs/deit_s.py --workdir=a --config.accumulate=8",
    "python -m experiments.bench layers", "make site", "pip install 'vitcompact[all]'",
    "launch/pod.sh a b", "python examples/client.py"])
def test_a_wrong_command_is_detected(command, checkout):
  with pytest.raises((Exception, SystemExit)):      # depends on the parser
    check(command, True, checkout)


def test_a_broken_link_is_detected(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("# A title: one\n[a](#a-title-one) [b](page.md#two) [c](gone.md) `[d](e)`\n")
  assert broken_links(page) == ["page.md#two", "gone.md"]


def test_the_page_of_provenance_covers_every_method():
  methods = {kind.__name__ for kinds in vc.METHODS.values() for kind in kinds.values()}
  assert methods == set(re.findall(r"`([A-Z]\w+)`", "".join(re.findall(
      r"^\| (`[A-Z].*?) \|", text_of(DOCS / "provenance.md"), re.MULTILINE))))
