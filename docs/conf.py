"""The documentation site: `make docs` builds it into site/, with Sphinx, MyST and Furo.

Pages are Markdown that GitHub shows as well; the API comes from docstrings. Links that leave docs/
go to the repository.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# The repository's address is not known yet. Here, and in the notebooks' badges and first cells, its
# place is taken by this name; tests/test_notebooks.py holds that they agree.
REPOSITORY = "OWNER/vitcompact"

project = "vitcompact"
author = copyright = "The vitcompact authors"
version = release = re.search(r'__version__ = "(.*)"',
                              (ROOT / "vitcompact" / "_version.py").read_text())[1]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]     # ```math, as GitHub has it
myst_heading_anchors = 4
root_doc = "index"
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"vitcompact {version}"
html_theme_options = {"source_repository": f"https://github.com/{REPOSITORY}/",
                      "source_branch": "main", "source_directory": "docs/"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

LINK = re.compile(r"(?<!!)\]\(\.\./([^)\s]+)\)")     # [text](../file), but no picture
SECTIONS = ("Args:", "Returns:", "Raises:")
NAMED = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): +(\S.*)")


def links_to_the_repository(app, name, source):
  """What is not a page of the site is shown by the repository."""
  del app, name
  source[0] = LINK.sub(rf"](https://github.com/{REPOSITORY}/blob/main/\1)", source[0])


def _escaped(text: str) -> str:
  """A line of a docstring as reStructuredText: `code` stays code, nothing else is markup."""
  parts = re.split(r"`([^`]*)`", text)
  return "".join(f"``{part}``" if i % 2 else re.sub(r"([*_|\\])", r"\\\1", part)
                 for i, part in enumerate(parts))


def house_style(lines: list[str]) -> list[str]:
  """A docstring as reStructuredText. "name: what it is" begins an item, which goes on in indented
  lines; other indented lines are equations or code, shown as they are; the rest is prose."""
  # A span of code that breaks over two lines is joined first.
  text = re.sub(r"`[^`]*`", lambda span: re.sub(r"\s*\n\s*", " ", span[0]), "\n".join(lines))
  out, base, state = [], 0, "prose"      # or "item", "code"
  for line in text.split("\n"):
    depth, words = len(line) - len(line.lstrip()), line.strip()
    named = NAMED.fullmatch(words)
    if not words:
      out.append("")
    elif words in SECTIONS:
      base, state = 2, "prose"
      out += ["", f"**{words[:-1]}**", ""]
    elif named and depth == base and state != "code":
      state = "item"
      out += ["", f"* **{_escaped(named[1])}**: {_escaped(named[2])}"]
    elif depth > base and state == "item":
      out.append(f"  {_escaped(words)}")
    elif words.startswith(">>> "):       # a doctest, which reStructuredText knows
      out += [] if out and out[-1].startswith(">>> ") else [""]
      out.append(words)
    elif depth > base and (state == "code" or not out or not out[-1] or depth == base + 4):
      out += [] if state == "code" else ["", "::", ""]
      state = "code"
      out.append(f"   {line}")
    else:
      if state != "prose":
        out.append("")
      base, state = min(base, depth), "prose"
      out.append(_escaped(words))
  return out


def in_house_style(app, what, name, obj, options, lines):
  del app, what, name, obj, options
  lines[:] = house_style(list(lines))


def short_signature(app, what, name, obj, options, signature, returns):
  """Without the fields that every Linen module has, and the addresses of objects."""
  del app, what, name, obj, options
  if signature:
    signature = re.sub(r", parent: .*", ")", signature)
    signature = re.sub(r"<[\w.]+ object[^>]*>", "...", signature)
  return signature, returns


def setup(app):
  app.connect("source-read", links_to_the_repository)
  app.connect("autodoc-process-docstring", in_house_style)
  app.connect("autodoc-process-signature", short_signature)
