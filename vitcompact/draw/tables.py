"""Tables of a report as HTML: data tables, and figures with their findings."""
import html
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitcompact.draw import svg
from vitcompact.draw.svg import number
from vitcompact.measure import KEY_SHARES

SMALL = 0.01    # an error, or a KL in nats per image, below this is called small
NARROW = 290    # pixels that fit a phone: wider heat maps scroll
SHORT = 14      # cells with at most this many letters are not broken into lines


def safe(text: Any) -> str:
  return html.escape(str(text))


def table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """A table whose first column names its rows; it scrolls if it does not fit."""
  head = "".join(f'<th scope="col">{safe(name)}</th>' for name in columns)
  body = "".join(f'<tr><th scope="row">{safe(first)}</th>{"".join(map(_cell, rest))}</tr>'
                 for first, *rest in rows)
  return _scrolling(caption, f"<table><caption>{safe(caption)}</caption>"
                             f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _cell(text: str) -> str:
  return f'<td class="short">{safe(text)}</td>' if len(text) <= SHORT else f"<td>{safe(text)}</td>"


def _scrolling(label: str, inner: str) -> str:
  """A container that scrolls sideways, also by keyboard."""
  return f'<div class="wide" tabindex="0" role="group" aria-label="{safe(label)}">{inner}</div>'


def _figure(title: str, finding: str, picture: str, numbers: str) -> str:
  return (f"<figure><figcaption><strong>{safe(title)}.</strong> {safe(finding)}</figcaption>"
          f"{picture}<details><summary>Numbers: {safe(title)}</summary>{numbers}</details>"
          "</figure>")


def heat_map(id: str, title: str, values, rows, columns, finding: str, numbers: str = "",
             **look) -> str:
  """A figure with a heat map. numbers: the data table, if it should hold more than the values."""
  desc = f"{finding} Dark is low, bright is high; each cell holds its number."
  picture = svg.heat_map(values, rows, columns, id=id, title=title, desc=desc, **look)
  if svg.width_of(picture) > NARROW:
    picture = _scrolling(f"Picture: {title}", picture)
  numbers = numbers or table(title, ["", *columns],
                             ([name, *map(number, row)]
                              for name, row in zip(rows, values, strict=True)))
  return _figure(title, finding, picture, numbers)


def curves(id: str, title: str, series: Mapping, finding: str, x_title: str, **look) -> str:
  picture = svg.curves(series, id=id, title=title, desc=finding, x_title=x_title, **look)
  found = {name: dict(map(tuple, points)) for name, points in series.items()}
  xs = sorted({x for points in found.values() for x in points})
  return _figure(title, finding, picture, table(
      title, [x_title, *series],
      ([f"{x:g}", *(number(points.get(x)) for points in found.values())] for x in xs)))


def extremes(found: Iterable[tuple[float, str]]) -> str:
  """A sentence with the lowest and highest of [(value, what it belongs to)]."""
  found = [pair for pair in found if math.isfinite(pair[0])]
  if not found:
    return "No value is finite."
  low, high = (pick(found, key=lambda pair: pair[0]) for pick in (min, max))
  return f"Lowest: {low[1]} ({number(low[0])}); highest: {high[1]} ({number(high[0])})."


def block_tables(id: str, tables: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
  """[(heading, figures)] of one block's tables: those that `measure` and our methods make, then
  any others. A table of unexpected form is shown as text."""
  remaining = dict(tables)
  known = [("Attention", _attention(id, remaining)), ("FFN", _ffn(id, remaining))]
  more = [_unknown(f"{id}-more-{k}", name, value)
          for k, (name, value) in enumerate(remaining.items())]
  return [(heading, found) for heading, found in (*known, ("More tables", more)) if found]


def _attention(id: str, remaining: dict) -> list[str]:
  """Figures of the attention tables, which it removes from `remaining`."""
  out = []
  for name, title, pair, note, column_title in (
      ("head_cost", "Head i in place of head j", "head {} in place of head {}",
       "Relative squared error of head j's contribution if it uses the map of head i.",
       "in place of head"),
      ("map_likeness", "Similarity of attention maps", "heads {} and {}",
       "Not used for planning: replacing a map by a similar one may still cost much, because of "
       "the values.", "head")):
    if _square(remaining.get(name)):
      values = [[None if i == j else x for j, x in enumerate(row)]
                for i, row in enumerate(remaining.pop(name))]
      others = [(x, pair.format(i, j)) for i, row in enumerate(values) for j, x in enumerate(row)
                if i != j]
      finding = f"{extremes(others) if others else 'There is one head.'} {note}"
      heads = [str(i) for i in range(len(values))]
      out.append(heat_map(f"{id}-{name}", title, values, [f"head {i}" for i in heads], heads,
                          finding, column_title=column_title))
  series = {label: list(zip(KEY_SHARES, remaining.pop(name), strict=True))
            for name, label in (("attention_mass", "of all queries, on all keys"),
                                ("block_attention_mass", "of blocks of 8 x 8 queries, on blocks"),
                                ("class_attention_mass", "of the class token, on patches"))
            if _numbers(remaining.get(name), len(KEY_SHARES))}
  if series:
    finding = "; ".join(f"{label}: a quarter of the keys holds {dict(points)[0.25]:.0%}"
                        for label, points in series.items())
    out.append(curves(f"{id}-mass", "Attention kept by the strongest keys", series,
                      f"Attention {finding}.", "share of the keys", limits=(0.0, 1.0)))
  if is_number(remaining.get("token_similarity")):
    out.append(f"<p>Token similarity: {number(remaining.pop('token_similarity'))}, the mean cosine "
               "of two patches that enter the attention.</p>")
  return out


def _ffn(id: str, remaining: dict) -> list[str]:
  """Figures of the FFN tables, which it removes from `remaining`."""
  series = {name: remaining.pop(f"{name}_error") for name in ("fc1", "fc2")
            if _pairs(remaining.get(f"{name}_error"))}
  if not series:
    return []
  findings = []
  for name, points in series.items():
    enough = [x for x, y in points if y < SMALL]
    findings.append(f"{name} has an error below {SMALL} " +
                    (f"from {min(enough):.0%} of the rank" if enough else "at no rank"))
  return [curves(f"{id}-ffn", "Error of low-rank FFN layers", series,
                 f"{'; '.join(findings)}. Relative squared error of the layer's output; values "
                 f"below {svg.LEAST:g} are drawn there.", "share of the rank", log=True)]


def _unknown(id: str, name: str, value: Any) -> str:
  """A table of a user's method; two rows of two count as a matrix, not as a curve."""
  title = str(name).replace("_", " ")
  if _square(value) and (len(value) == 2 or not _pairs(value)):
    names = [str(i) for i in range(len(value))]
    found = ((x, f"row {i}, column {j}") for i, row in enumerate(value) for j, x in enumerate(row))
    return heat_map(id, title, value, names, names, extremes(found))
  if _pairs(value):
    return curves(id, title, {title: value}, extremes((y, f"at {x:g}") for x, y in value), "x")
  text = value if isinstance(value, str) else json.dumps(value, default=str)
  return f"<p><strong>{safe(title)}:</strong> {safe(text)}</p>"


def is_number(x: Any, finite: bool = True) -> bool:
  return (isinstance(x, int | float) and not isinstance(x, bool)
          and (math.isfinite(x) or not finite))


def _numbers(value: Any, length: int, finite: bool = True) -> bool:
  return (isinstance(value, list | tuple) and len(value) == length
          and all(is_number(x, finite) for x in value))


def _pairs(value: Any) -> bool:
  return isinstance(value, list | tuple) and bool(value) and all(_numbers(row, 2) for row in value)


def _square(value: Any) -> bool:
  """Whether `value` is a square matrix of numbers; a dead head makes some infinite or NaN."""
  return isinstance(value, list | tuple) and bool(value) and all(
      _numbers(row, len(value), finite=False) for row in value)
