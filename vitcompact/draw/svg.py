"""Heat maps and curves as inline SVG, with a title and a description. Needs no extra package."""
import html
import math
import re
from collections.abc import Mapping, Sequence

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
LINES = (("#0b4a8f", ""), ("#b34700", "7 3"), ("#4d4d4d", "2 3"))
UNKNOWN = (221, 221, 221)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 220, 58, 14, 12, 42   # of curves: fits a phone
CELL, ROW, LETTER = 41, 26, 7.2   # pixels: sides of a cell, width of a label's letter
MARKED = 10                       # a curve with fewer points has a mark at each
LEAST = 1e-5                      # log axes end here: smaller values are rounding errors


def number(x: float | None) -> str:
  """A number with two significant digits, as short as possible."""
  if x is None:
    return "–"
  if x == 0 or not math.isfinite(x):
    return f"{x:g}"
  return f"{x:.2g}" if 1e-3 <= abs(x) < 100 else f"{x:.0f}" if 100 <= abs(x) < 1e4 else f"{x:.1e}"


def bounds(values, log: bool = False) -> tuple[float, float]:
  """(lowest, highest) of the values that can be drawn; (1, 1) if there are none."""
  known = [x for x in values if x is not None and math.isfinite(x) and (x > 0 or not log)]
  return (min(known), max(known)) if known else (1.0, 1.0)


def colour(share: float) -> tuple[int, int, int]:
  """Viridis: dark blue at 0, yellow at 1, distinguishable by lightness alone."""
  place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
  i = min(int(place), len(VIRIDIS) - 2)
  return tuple(round(a + (b - a) * (place - i)) for a, b in zip(*VIRIDIS[i:i + 2], strict=True))


def luminance(rgb) -> float:
  """Relative luminance as WCAG defines it."""
  parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
  return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def ink(rgb) -> str:
  """Black or white, whichever has a contrast of 4.5 on a colour."""
  return "#000" if luminance(rgb) > 0.179 else "#fff"


def heat_map(values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str],
             *, id: str, title: str, desc: str, log: bool = False, column_title: str = "",
             limits: tuple[float, float] | None = None) -> str:
  """A grid of cells with the values' numbers in them; dark is low, None is grey."""
  low, high = limits or bounds((x for row in values for x in row), log)
  scale = math.log10 if log else float
  cells = [[number(x) for x in row] for row in values]
  longest = max([len(text) for row in cells for text in row] + [len(text) for text in columns])
  cell = max(CELL, LETTER * longest + 6)
  left, top = LETTER * max(map(len, rows)) + 10, 20 + 16 * bool(column_title)
  width, height = max(left + cell * len(columns), LETTER * len(column_title)), top + ROW * len(rows)
  out = [_text(width, 12, column_title, "end")] if column_title else []
  out += [_text(left + cell * (j + 0.5), top - 6, name) for j, name in enumerate(columns)]
  for i, row in enumerate(values):
    out.append(_text(left - 6, top + ROW * i + 17, rows[i], "end"))
    for j, x in enumerate(row):
      if x is None or math.isnan(x):
        fill = UNKNOWN
      elif x == math.inf or high <= low or (log and x <= 0):
        fill = colour(float(x >= high > low))
      else:
        fill = colour((scale(x) - scale(low)) / (scale(high) - scale(low)))
      out.append(f'<rect x="{left + cell * j:.0f}" y="{top + ROW * i}" width="{cell:.0f}" '
                 f'height="{ROW}" fill="rgb{fill}" stroke="#fff"/>'.replace(", ", ","))
      out.append(_text(left + cell * (j + 0.5), top + ROW * i + 17, cells[i][j],
                       extra=f' fill="{ink(fill)}"'))
  return _svg(width, height, "".join(out), id, title, desc)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, id: str, title: str, desc: str,
           x_title: str = "", log: bool = False, limits: tuple[float, float] | None = None) -> str:
  """One curve for each series, at most three, distinguished by colour and dashes."""
  series = {name: [(x, max(y, LEAST) if log else y) for x, y in points
                   if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()}
  xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
  (left, right), (low, high) = bounds(xs), limits or bounds(ys, log)
  if log:
    low, high = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
  if high <= low:
    low, high = low - 1, low + 1
  left = 0 if 0 < left < right / 5 else left
  right = right if right > left else left + 1
  top = TOP + 16 * len(series)
  height = HEIGHT + 16 * len(series)

  def at(x, y):
    y = math.log10(y) if log else y
    return (LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            height - BOTTOM - (y - low) / (high - low) * (height - top - BOTTOM))

  marks = range(low, high + 1) if log else _ticks(low, high)
  out = []
  for mark in marks:
    y = at(left, 10.0 ** mark if log else mark)[1]
    out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ccc"/>')
    out.append(_text(LEFT - 5, y + 4, f"{10.0 ** mark:g}" if log else number(mark), "end"))
  for x in _ticks(left, right, whole=all(float(x).is_integer() for x in xs)):
    out.append(_text(at(x, 1.0)[0], height - BOTTOM + 16, number(x)))
  out.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_title))
  for i, (name, points) in enumerate(series.items()):
    stroke, dash = LINES[i % len(LINES)]
    line = f'fill="none" stroke="{stroke}" stroke-width="2" stroke-dasharray="{dash}"'
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    out.append(f'<polyline points="{places}" {line}/><path d="M{LEFT} {10 + 16 * i}h30" {line}/>')
    if len(points) < MARKED:
      out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{stroke}"/>'
              for x, y in (at(*point) for point in points)]
    out.append(_text(LEFT + 36, 14 + 16 * i, name, "start"))
  return _svg(WIDTH, height, "".join(out), id, title, desc)


def width_of(picture: str) -> int:
  return int(re.search(r'width="(\d+)"', picture)[1])


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
  """Five equally spaced ticks; if `whole`, about six whole numbers."""
  if whole:
    return list(range(int(low), int(high) + 1, -(-int(high - low) // 6)))
  return [low + (high - low) * i / 4 for i in range(5)]


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
  return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{extra}>{html.escape(text)}</text>'


def _svg(width, height, inner, id, title, desc) -> str:
  return (f'<svg role="img" aria-labelledby="{id}-t" aria-describedby="{id}-d" '
          f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
          f'<title id="{id}-t">{html.escape(title)}</title>'
          f'<desc id="{id}-d">{html.escape(desc)}</desc>{inner}</svg>')
