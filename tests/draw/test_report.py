"""report.html shows what the report says, in one file, to sighted and blind readers."""
import dataclasses
import html
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact.count import count
from vitcompact.draw import svg
from vitcompact.draw.report import page
from vitcompact.report import Option, Report

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "<script>alert('x')</script>\"&"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


class Page(HTMLParser):
  """Collects all elements: (tag, attributes, enclosing tags, own text); fails on wrong nesting."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements = [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    names = [name for name, _ in attributes]
    assert len(names) == len(set(names)), (tag, names)
    element = [tag, dict(attributes), [around[0] for around in self.open], ""]
    self.elements.append(element)
    if tag not in VOID:
      self.open.append(element)

  def handle_startendtag(self, tag, attributes):
    assert "svg" in [around[0] for around in self.open], f"<{tag}/> closes itself only in SVG"
    self.elements.append([tag, dict(attributes), [around[0] for around in self.open], ""])

  def handle_endtag(self, tag):
    assert self.open and self.open.pop()[0] == tag, f"</{tag}>"

  def handle_data(self, data):
    for around in self.open:
      around[3] += data

  def all(self, tag):
    return [element for element in self.elements if element[0] == tag]

  def text(self):
    return self.all("main")[0][3]


def option(axis, method, kl, error=0.1, measured=True):
  return Option(axis, method, error, kl, measured)


def block(i):
  ranks = np.linspace(1 / 24, 1, 24).round(4).tolist()
  keys = [0.1 + 0.01 * i, 0.2, 0.43, 0.7, 0.9, 1.0]
  heads = np.arange(16).reshape(4, 4) * 0.0301 * (i + 1)
  return {"name": f"blocks_{i}", "tokens": 17, "options": (
      option("heads", vc.HMHSA(real_heads=2), 0.02 * (i + 1)),
      option("ffn", vc.CFFN(rank_ratio=0.25), 0.004, error=0.0625),
      option("ffn", vc.CFFN(rank_ratio=0.125, factor="both"), 0.07, measured=False)),
      "tables": {"head_cost": np.where(np.eye(4), 0, heads).round(4).tolist(),
                 "map_likeness": (0.9 * np.ones((4, 4)) + 0.1 * np.eye(4)).tolist(),
                 "attention_mass": keys, "class_attention_mass": keys[1:] + [1.0],
                 "block_attention_mass": keys,
                 "token_similarity": 0.31 + i / 10,
                 "fc1_error": [[x, 1 - x] for x in ranks],
                 "fc2_error": [[x, (1 - x) ** 4] for x in ranks]}}


@pytest.fixture(scope="module")
def report():
  dense = count(tiny.deit(deploy=True))
  return Report(vitcompact="1.2.3", model="deit_tiny_patch16_224", fields=tiny.SIZES,
                digest="0123456789abcdef", images=1024, images_digest="f00", sensitivity="quick",
                params=dense.params, macs=dense.macs, blocks=(block(0), block(1)),
                tokens=(option("tokens", vc.ToMe(r=4), 0.03, error=None),))


@pytest.fixture(scope="module")
def text(report):
  return page(report)


def without_plans(report, **fields):
  """Returns a report that is quick to draw, since no plan is searched."""
  return dataclasses.replace(report, sensitivity="none", tokens=(), **fields)


def test_the_page_is_well_formed_and_its_references_resolve(text):
  seen = Page(text)
  ids = [attributes["id"] for _, attributes, *_ in seen.elements if "id" in attributes]
  assert len(ids) == len(set(ids))
  named = [id for _, attributes, *_ in seen.elements for name in
           ("aria-labelledby", "aria-describedby") for id in attributes.get(name, "").split()]
  links = [attributes["href"] for _, attributes, *_ in seen.all("a")]
  assert named and set(named) <= set(ids)
  assert links and all(link[0] == "#" and link[1:] in ids for link in links)


def test_the_page_needs_no_other_file(text):
  assert not re.search(r"https?:|//|<script|\bsrc=|url\(|@import|<link|\bon\w+=", text)


def test_the_page_is_navigable_by_screen_readers(text):
  seen = Page(text)
  assert seen.all("html")[0][1]["lang"] == "en" and seen.all("title")[0][3]
  assert [len(seen.all(tag)) for tag in ("h1", "header", "nav", "main")] == [1, 1, 1, 1]
  assert seen.all("a")[0][1] == {"class": "skip", "href": "#main"}
  levels = [int(tag[1]) for tag, *_ in seen.elements if re.fullmatch("h[1-6]", tag)]
  assert levels[0] == 1
  assert all(new <= old + 1 for old, new in itertools.pairwise(levels))


def test_every_picture_has_a_title_a_description_and_a_table(text):
  seen = Page(text)
  pictures = seen.all("svg")
  assert len(pictures) == 3 + 2 * 4   # for all blocks, and for each
  assert all(attributes["role"] == "img" for _, attributes, *_ in pictures)
  for tag in ("title", "desc"):
    inside = [element for element in seen.all(tag) if element[2][-1] == "svg"]
    assert len(inside) == len(pictures) and all(element[3].strip() for element in inside)
  assert len(seen.all("figure")) == len(pictures)
  assert sum("figure" in around for _, _, around, _ in seen.all("details")) == len(pictures)
  assert sum("details" in around for _, _, around, _ in seen.all("table")) == len(pictures)


def test_every_table_has_a_caption_and_row_and_column_headers(text):
  seen = Page(text)
  captions = [element for element in seen.all("caption") if element[2][-1] == "table"]
  assert len(captions) == len(seen.all("table")) > 0 and all(element[3] for element in captions)
  assert {attributes.get("scope") for _, attributes, *_ in seen.all("th")} == {"col", "row"}
  rows = [element for element in seen.all("tr") if "tbody" in element[2]]
  heads = [element for element in seen.all("th") if element[1]["scope"] == "row"]
  assert len(rows) == len(heads)
  # Whatever scrolls can be scrolled by keyboard.
  assert all(attributes.get("tabindex") == "0" and attributes.get("aria-label")
             for _, attributes, *_ in seen.all("div") if attributes.get("class") == "wide")


def test_the_page_contains_what_the_report_says(report, text):
  seen, plan = Page(text), report.plan(macs=0.8)
  main, head = seen.text(), seen.all("header")[0][3]
  for fact in ("deit_tiny_patch16_224", "0123456789ab", "1,024", "quick", "1.2.3"):
    assert fact in head
  assert "2 of 6 changes" in head and "CFFN(rank_ratio=0.25) in blocks_0, with 0.004" in head
  assert "Lowest: head 0 in place of head 1 (0.03); highest: head 3 in place of head 2" in (
      main)
  assert "fc1 has an error below 0.01 from 100% of the rank; fc2 has an error below 0.01 from" in (
      main)
  assert "Patches are most alike in blocks_1: 0.41." in main
  assert "a quarter of the keys holds 43%" in main
  assert "inferred" in main and "Not used for planning" in main
  assert plan.to_json() in main and f"{report.explain(plan).macs:.1%} of the MACs" in main


def test_the_page_shows_the_error_of_an_impossible_plan(report):
  reduced = dataclasses.replace(report, tokens=(), blocks=tuple(
      {**row, "options": row["options"][:1], "tables": {}} for row in report.blocks))
  with pytest.raises(ValueError) as error:
    reduced.plan(macs=0.5)
  assert f"No plan: {error.value}" in Page(page(reduced)).text()


def test_a_report_without_sensitivities_tables_or_options_is_drawn(report):
  rows = [{**row, "options": tuple(option._replace(kl=None, measured=False)
                                   for option in row["options"])} for row in report.blocks]
  rows += [{"name": "conv", "tokens": 49, "options": (), "tables": {}}]
  seen = Page(page(without_plans(report, blocks=tuple(rows))))
  assert "no KL" in seen.all("header")[0][3] and "sensitivity “none”" in seen.text()
  assert len(seen.all("svg")) == 1 + 2 * 4
  Page(page(without_plans(report, blocks=())))


def test_tables_with_unknown_names_are_drawn_by_their_shape(report):
  tables = {"my_curve": [[0, 1], [1, 0.5], [2, 0.25]], "my_square": [[1, 2, 3]] * 3,
            "two_heads": [[0.0, 1.0], [1.0, 0.0]], "my_words": "of <b>no</b> form",
            "my_list": [1, 2, 3], "head_cost": [[0, None], [1, 0]], "fc1_error": []}
  row = {"name": "blocks_0", "tokens": 17, "options": (), "tables": tables}
  seen = Page(page(without_plans(report, blocks=(row,))))
  curves = {element[2][-1] for element in seen.all("polyline")}
  assert len(seen.all("svg")) == 3 and curves == {"svg"} and len(seen.all("polyline")) == 1
  assert len(seen.all("rect")) == 9 + 4
  assert "my words: of <b>no</b> form" in seen.text() and "my list: [1, 2, 3]" in seen.text()
  assert not seen.all("b")


def test_a_head_without_effect_does_not_spoil_the_picture(report):
  costs = [[0, 0.5, float("inf")], [0.25, 0, float("inf")], [0.125, 1, 0]]
  row = {"name": "blocks_0", "tokens": 17, "options": (),
         "tables": {"head_cost": costs, "map_likeness": [[float("nan")] * 3] * 3}}
  seen = Page(page(without_plans(report, blocks=(row,))))
  assert "Lowest: head 2 in place of head 0 (0.12)" in seen.text()
  assert "No value is finite." in seen.text() and len(seen.all("rect")) == 18


def test_text_of_a_report_is_escaped(report):
  row = {**block(0), "name": HOSTILE}
  row["tables"][HOSTILE] = [[0, 1], [1, 2], [2, 3]]
  row["tables"][HOSTILE + "2"] = HOSTILE
  bad = dataclasses.replace(report, model=HOSTILE, digest=HOSTILE, vitcompact=HOSTILE,
                            blocks=(row,), tokens=())
  text = page(bad)
  seen = Page(text)
  assert "<script" not in text and not seen.all("script")
  assert seen.all("h1")[0][3] == f"Redundancy of {HOSTILE}"
  assert "No plan: unknown model" in seen.text()


def test_all_tables_from_measure_are_known():
  model = tiny.deit()
  report = vc.measure(model, tiny.init(model), tiny.images(model, 16), sensitivity="none")
  report = dataclasses.replace(report, blocks=tuple({**row, "options": ()}
                                                    for row in report.blocks))
  seen = Page(page(report))
  assert "More tables" not in seen.text() and len(seen.all("svg")) == 1 + 2 * 4


def test_half_is_the_option_closest_to_half_of_the_largest_saving(report):
  # Of 2,304 MACs per token, rank r of 24 leaves 120 r: these save 1,944, 1,224 and 504.
  options = tuple(option("ffn", vc.CFFN(rank_ratio=ratio), kl)
                  for ratio, kl in ((0.125, 0.5), (0.375, 0.05), (0.625, 0.01)))
  row = {"name": "blocks_0", "tokens": 17, "options": options, "tables": {}}
  seen = Page(page(without_plans(report, blocks=(row,))))
  cells = [element[3] for element in seen.all("td") if "figure" in element[2]]
  assert cells == ["0.01, CFFN(rank_ratio=0.625)", "0.05, CFFN(rank_ratio=0.375)"]


def test_a_heat_map_has_its_rows_and_columns_in_place():
  picture = svg.heat_map([[1, 2], [3, 4]], "ab", "xy", id="it", title="a title", desc="more")
  seen = Page(picture)
  cells = [(float(at["x"]), float(at["y"]), at["fill"]) for _, at, *_ in seen.all("rect")]
  (x0, y0, low), (x1, _, _), (_, y1, _), (*place, high) = cells
  assert x0 < x1 and y0 < y1 and place == [x1, y1]
  assert (low, high) == ("rgb(68,1,84)", "rgb(253,231,37)")
  assert [element[3] for element in seen.all("text")] == [*"xy", *"a12", *"b34"]


def test_on_a_log_axis_a_tenth_is_one_step_down():
  picture = svg.curves({"error": [(0, 1.0), (0.5, 0.1), (1, 0.01)]}, id="it", title="a title",
                       desc="more", log=True)
  places = re.search('points="([^"]*)"', picture)[1].split()
  xs, ys = zip(*(map(float, place.split(",")) for place in places), strict=True)
  assert np.ptp(np.diff(xs)) < 0.2 and np.ptp(np.diff(ys)) < 0.2 and ys[0] < ys[1]


def test_numbers_are_legible_and_colours_differ_in_lightness():
  shares = np.linspace(0, 1, 201)
  light = [svg.luminance(svg.colour(share)) for share in shares]
  assert np.all(np.diff(light) > 0)
  for rgb in [svg.colour(share) for share in shares] + [svg.UNKNOWN]:
    here, text = svg.luminance(rgb), 1.0 if svg.ink(rgb) == "#fff" else 0.0
    assert (max(here, text) + 0.05) / (min(here, text) + 0.05) >= 4.5


def browse(tmp_path, text) -> str:
  """Returns the DOM that a browser makes of a page; its console must stay empty."""
  if CHROMIUM is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
  path = tmp_path / "page.html"
  path.write_text(text, encoding="utf-8")
  done = subprocess.run(
      [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
       f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
      capture_output=True, text=True, timeout=120, check=True)
  assert "CONSOLE" not in done.stderr, done.stderr
  return done.stdout


def test_a_browser_shows_the_page(tmp_path, text):
  dom = browse(tmp_path, text)
  assert "Redundancy of deit_tiny_patch16_224" in dom
  tags = [[element[0] for element in Page(page).elements] for page in (dom, text)]
  assert sorted(tags[0]) == sorted(tags[1])


def test_the_page_fits_a_narrow_screen(tmp_path, text):
  """Content wider than 320 pixels scrolls in its own box, and the page does not."""
  frame = (f'<iframe id="it" width="320" height="900" srcdoc="{html.escape(text)}"></iframe><p></p>'
           '<script>onload = () => document.querySelector("p").textContent = "width " +'
           'it.contentDocument.documentElement.scrollWidth</script>')
  width = int(re.search(r"<p>width (\d+)</p>", browse(tmp_path, frame))[1])
  assert 280 < width <= 320
