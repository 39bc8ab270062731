"""report.html: a Report as a single page, without scripts, network access or extra packages.

Every picture states its finding in words, and has its numbers in a table below it.
"""
import math
from collections.abc import Iterable, Mapping

from vitcompact.draw import svg, tables
from vitcompact.draw.svg import number
from vitcompact.draw.tables import SMALL, safe, table
from vitcompact.plan import BY_BLOCK, Plan, describe_method
from vitcompact.report import Option, Report

BUDGETS = (0.8, 0.65, 0.5)   # shares of the MACs for which plans are proposed
STYLE = """
:root{color:#1a1a1a;background:#fff;font:16px/1.5 system-ui,sans-serif}
body{max-width:70rem;margin:0 auto;padding:0 1rem 3rem;overflow-wrap:anywhere}
h1,h2,h3{line-height:1.2}h2{margin-top:2.5rem;border-bottom:2px solid #4d4d4d}
a{color:#0b4a8f}:focus-visible{outline:3px solid #b34700;outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:0;padding:.5rem;background:#fff}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 1rem}dt{font-weight:600}dd{margin:0}
nav ul{display:flex;flex-wrap:wrap;gap:0 1rem;padding:0;list-style:none}
nav a{display:inline-block;padding:.25rem 0}summary{padding:.1rem 0;cursor:pointer}
.figures{display:flex;flex-wrap:wrap;gap:0 2rem}figure{margin:1rem 0;max-width:100%;min-width:0}
figcaption{max-width:30rem}.wide{overflow-x:auto;padding:3px}
svg{display:block;font:12px system-ui,sans-serif}figure>svg{max-width:100%;height:auto}
pre{white-space:pre-wrap}
table{border-collapse:collapse;margin:.5rem 0;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600}th,td{border:1px solid #767676;padding:.15rem .5rem;
text-align:left;vertical-align:top;overflow-wrap:normal}thead th{background:#eee}
.short,thead th{white-space:nowrap}
@media print{nav,.skip,details{display:none}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}
.wide{overflow:visible}}
"""


def page(report: Report) -> str:
  """The text of report.html.

  It searches plans for each of BUDGETS, which takes as long as `report.plan` does.
  """
  name = safe(report.model or "this model")
  saved = _saved_shares(report)
  sections = [("overview", "All blocks", _overview(report, saved)),
              ("plans", "Proposed plans", _plans(report)),
              ("reducers", "Token reducers", _reducers(report))]
  sections += [(f"block-{i}", row["name"], _block(f"block-{i}", row, saved, report.unit))
               for i, row in enumerate(report.blocks)]
  links = "".join(f'<li><a href="#{id}">{safe(title)}</a></li>' for id, title, _ in sections)
  body = "".join(f'<section id="{id}" aria-labelledby="{id}-h"><h2 id="{id}-h">{safe(title)}</h2>'
                 f"{inner}</section>\n" for id, title, inner in sections)
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Redundancy of {name}</title><style>{STYLE}</style></head>
<body><a class="skip" href="#main">Skip to the report</a>
<header><h1>Redundancy of {name}</h1>{_head(report)}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">
{body}</main></body></html>
"""


def _saved_shares(report: Report) -> dict[tuple, float]:
  """{(block, axis, method): share of the dense model's MACs that it saves}; {} if the model cannot
  be built here."""
  try:
    costs = report.costs
  except (ValueError, TypeError):
    return {}
  return {(row["name"], option.axis, option.method):
          costs.saved(row["name"], {option.axis: option.method})[0] / report.macs
          for row in report.blocks for option in row["options"]}


def _percent(share: float | None) -> str:
  return "–" if share is None else f"{share:.1%}"


def _with_kl(options: Iterable[Option]) -> list[Option]:
  return [option for option in options if option.kl is not None and math.isfinite(option.kl)]


def _cheapest(options: Iterable[Option]) -> Option | None:
  return min(_with_kl(options), key=lambda option: option.kl, default=None)


def _half_saving(options: Iterable[Option], block: str, saved) -> Option | None:
  """The option whose saving is closest to half of the largest."""
  shares = [(saved[block, option.axis, option.method], option) for option in _with_kl(options)
            if (block, option.axis, option.method) in saved]
  most = max((share for share, _ in shares), default=0.0)
  return min(shares, key=lambda pair: abs(pair[0] - most / 2), default=(0.0, None))[1]


def _head(report: Report) -> str:
  facts = {"Model": report.model, "Weights": report.digest[:12], "Images": f"{report.images:,}",
           "Parameters": f"{report.params / 1e6:,.2f} million",
           "MACs per image": f"{report.macs / 1e6:,.1f} million",
           "Sensitivity": report.sensitivity, "vitcompact": report.vitcompact}
  rows = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in facts.items())
  return f"<p>{safe(_summary(report))}</p><dl>{rows}</dl>"


def _summary(report: Report) -> str:
  known = [(option, row["name"]) for row in report.blocks for option in _with_kl(row["options"])]
  if not known:
    return (f"This report holds the methods' own estimates, but no {report.unit}: it shows where "
            "to look, and proposes no plan.")
  option, block = min(known, key=lambda pair: pair[0].kl)
  cheap = sum(option.kl < SMALL for option, _ in known)
  small = f"less than {SMALL}{' nats per image' if report.unit == 'KL' else ''}"
  outputs = "logits by a KL" if report.unit == "KL" else "features by an error"
  return (f"{cheap} of {len(known)} changes, each made alone in one block, move the {outputs} of "
          f"{small}. The cheapest is {describe_method(option.method)} in "
          f"{block}, with {number(option.kl)}.")


def _overview(report: Report, saved) -> str:
  names = [row["name"] for row in report.blocks]
  axes = [axis for axis in BY_BLOCK if any(option.axis == axis for row in report.blocks
                                           for option in _with_kl(row["options"]))]
  cheapest, half = [], []
  for row in report.blocks:
    by_axis = [[option for option in row["options"] if option.axis == axis] for axis in axes]
    cheapest.append([_cheapest(options) for options in by_axis])
    half.append([_half_saving(options, row["name"], saved) for options in by_axis])
  unit = report.unit[0].upper() + report.unit[1:]
  kls = [option.kl for grid in (cheapest, half) for row in grid for option in row if option]
  figures = []
  for id, title, grid in (("cheapest", f"{unit} of the cheapest option", cheapest),
                          ("half", f"{unit} of the option that saves about half", half)):
    found = [(option.kl, f"{option.axis} in {name}, {describe_method(option.method)}")
             for name, row in zip(names, grid, strict=True) for option in row if option]
    if found:
      numbers = table(title, ["block", *axes], (
          [name, *(f"{number(option.kl)}, {describe_method(option.method)}" if option else "–"
                   for option in row)] for name, row in zip(names, grid, strict=True)))
      figures.append(tables.heat_map(
          f"overview-{id}", title, [[option and option.kl for option in row] for row in grid],
          names, axes, tables.extremes(found), numbers, log=True, limits=svg.bounds(kls, log=True)))
  what = ("KL of the logits, in nats per image," if report.unit == "KL" else
          "Squared error of the features, as a share of their variance,")
  about = (f"{what} when one option is applied in one block only. "
           "“Half” is half of the most MACs that the axis can save in that block. The heat maps "
           "share one log colour scale.")
  if not figures:
    about = f"No option here has a known {report.unit}."
  similarity = [(i, row["tables"]["token_similarity"]) for i, row in enumerate(report.blocks)
                if tables.is_number(row["tables"].get("token_similarity"))]
  if len(similarity) > 1:
    i, most = max(similarity, key=lambda point: point[1])
    figures.append(tables.curves("overview-tokens", "Token similarity",
                                 {"mean cosine of two patches": similarity},
                                 f"Patches are most alike in {names[i]}: {number(most)}.",
                                 "block"))
  return f'<p>{about}</p><div class="figures">{"".join(figures)}</div>'


def _plans(report: Report) -> str:
  if report.sensitivity == "none":
    return ("<p>This report was made with sensitivity “none”, so the cost of options is unknown. "
            "Measure again with “quick” or “full”.</p>")
  return "".join(f"<h3>At most {share:.0%} of the MACs</h3>{_plan(report, share)}"
                 for share in BUDGETS)


def _plan(report: Report, share: float) -> str:
  try:
    found = report.explain(report.plan(macs=share), macs=share)
  except (ValueError, TypeError) as error:   # TypeError: fields that the model does not have
    return f"<p>No plan: {safe(error)}</p>"
  rows = ((step.block, step.method, _percent(step.saves), number(step.kl),
           "measured" if step.measured else "inferred", step.runner_up,
           number(step.more if math.isfinite(step.more) else None)) for step in found.steps)
  return (f"<p>{found.macs:.1%} of the MACs and {found.params:.1%} of the parameters, for a "
          f"predicted {report.unit} of {number(found.kl)}: the sum of changes tried alone.</p>" +
          table(f"Why, at {share:.0%}", ["block", "method", "saves", report.unit,
                                         f"the {report.unit} is", "runner-up",
                                         f"extra {report.unit}"], rows) +
          f"<details><summary>The plan at {share:.0%} as JSON</summary>"
          f"<pre>{safe(found.plan.to_json())}</pre></details>")


def _reducers(report: Report) -> str:
  def saves(method):
    try:
      return 1 - report.shares(Plan(tokens=method))[0]
    except (ValueError, TypeError):
      return None

  if not report.tokens:
    return "<p>No token reducer was tried.</p>"
  return table("Token reducers, each in the whole model",
               ["method", "saves", report.unit, f"the {report.unit} is"],
               ((describe_method(option.method), _percent(saves(option.method)), number(option.kl),
                 _source(option)) for option in report.tokens))


def _source(option) -> str:
  """How the KL of an option was obtained."""
  return "–" if option.kl is None else "measured" if option.measured else "inferred"


def _block(id: str, row: Mapping, saved, unit: str) -> str:
  best = _cheapest(row["options"])
  out = [f"<p>{safe(row['tokens'])} tokens. " + (
      f"No option has a known {unit}." if best is None else
      f"The cheapest option is {safe(describe_method(best.method))}, with {unit} "
      f"{number(best.kl)}.") + "</p>"]
  out += [f'<h3>{heading}</h3><div class="figures">{"".join(figures)}</div>'
          for heading, figures in tables.block_tables(id, row["tables"])]
  if row["options"]:
    rows = ((describe_method(option.method), option.axis,
             _percent(saved.get((row["name"], option.axis, option.method))), number(option.error),
             number(option.kl), _source(option)) for option in row["options"])
    out.append("<h3>Options</h3>" + table(
        f"Options in {row['name']}", ["method", "axis", "saves, of all MACs", "estimated error",
                                      unit, f"the {unit} is"], rows))
  return "".join(out)
