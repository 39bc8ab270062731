"""receipt: one page with every number of a run, and how each was obtained."""
import dataclasses
import html
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping

import jax
import scipy
from markdown_it import MarkdownIt

from vitcompact._version import __version__
from vitcompact.bench import Timing
from vitcompact.count import Count
from vitcompact.data.classes import describe
from vitcompact.verify import Proof

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>body {{font: 16px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em}}
table {{border-collapse: collapse; display: block; overflow-x: auto}}
td, th {{border: 1px solid #767676; padding: .2em .6em; text-align: left}}</style></head>
<body><main>{body}</main></body></html>
"""


@dataclasses.dataclass(frozen=True)
class Row:
  """One model of a receipt. accuracy: share of `tested` test images, None if it was not run."""
  name: str
  count: Count
  accuracy: float | None
  timing: Timing | None = None
  tested: int = 0

  def interval(self) -> tuple[float, float] | None:
    """95 % interval of the accuracy (Wilson), from the number of test images."""
    if self.accuracy is None or not self.tested:
      return None
    correct = round(self.accuracy * self.tested)
    interval = scipy.stats.binomtest(correct, self.tested).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclasses.dataclass(frozen=True)
class Receipt:
  """The results of a run; the first row is the dense model, with which the others are compared.

  classes: the name of each output, in order; () if unknown. further: {condition: Proof} of the same
  two models, such as on random images or in the dtype they are deployed in.
  """
  title: str
  rows: tuple[Row, ...]
  proof: Proof
  facts: Mapping[str, object]   # settings of the run: plan, data, seed, digest, ...
  classes: tuple[str, ...] = ()
  further: Mapping[str, Proof] = dataclasses.field(default_factory=dict)

  @property
  def ok(self) -> bool:
    """Whether every proof holds."""
    return self.proof.ok and all(proof.ok for proof in self.further.values())

  def write(self, directory) -> tuple[pathlib.Path, ...]:
    """Writes receipt.json, receipt.md and receipt.html, each atomically."""
    directory = pathlib.Path(directory)
    paths = tuple(directory / f"receipt.{kind}" for kind in ("json", "md", "html"))
    for path, text in zip(paths, (self.to_json(), self.to_markdown(), self.to_html()), strict=True):
      partial = path.with_name(f"{path.name}.partial")
      partial.write_text(text, encoding="utf-8")
      os.replace(partial, path)
    return paths

  def to_json(self) -> str:
    rows = [{"name": row.name, **row.count._asdict(), "test_accuracy": row.accuracy,
             "test_images": row.tested, "accuracy_interval": row.interval(),
             "timing": row.timing and row.timing._asdict()} for row in self.rows]

    def as_dict(proof):
      return {**dataclasses.asdict(proof), "ok": proof.ok}

    proof = {**as_dict(self.proof), **{name: as_dict(p) for name, p in self.further.items()}}
    classes = {"classes": list(self.classes)} if self.classes else {}
    return json.dumps({"title": self.title, **self.facts, **classes, "models": rows,
                       "fold": proof}, indent=2)

  def to_markdown(self) -> str:
    facts = dict(self.facts)
    if self.classes:
      facts["classes"] = describe(self.classes)
    exports = _exports(facts.pop("exports", ()))
    lines = [f"# {self.title}", "", *self._table(), "", *self._verdict_lines(), *exports, "",
             "| fact | value |", "|---|---|",
             *(f"| {name} | {_cell(value)} |" for name, value in facts.items())]
    return "\n".join(lines) + "\n"

  def to_html(self) -> str:
    """`to_markdown` as an HTML page."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(self.to_markdown())
    return HTML.format(title=html.escape(self.title), body=body)

  def _table(self) -> list[str]:
    lines = ["| model | params | MACs | ideal MACs | attention MACs | test accuracy | speed, "
             "dense = 1 |", "|---|---|---|---|---|---|---|"]
    dense = self.rows[0].count
    for row in self.rows:
      accuracy = "not run" if row.accuracy is None else f"{100 * row.accuracy:.2f}%"
      if interval := row.interval():
        accuracy += f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"
      speed = "not run"
      if row.timing:
        speed = f"{row.timing.speedup:.2f} ({row.timing.low:.2f} to {row.timing.high:.2f})"
      cells = [f"{value:,}{_change(value, base)}" for value, base in zip(
          (row.count.params, row.count.macs, row.count.ideal_macs, row.count.attention_macs),
          (dense.params, dense.macs, dense.ideal_macs, dense.attention_macs), strict=True)]
      lines.append(f"| {' | '.join([row.name, *cells, accuracy, speed])} |")
    return lines

  def _verdict_lines(self) -> list[str]:
    proof, timing = self.proof, self.rows[-1].timing
    verdict = "same function" if proof.ok else "NOT the same function"
    lines = [f"Folding: {verdict}. On {proof.images} images the logits differ by at most "
             f"{proof.max_abs:.2g} ({proof.max_rel:.2g} of the largest; allowed "
             f"{proof.tolerance:.0e}), and {100 * proof.top1_agreement:.2f}% of the top-1 classes "
             "agree."]
    if proof.first_difference:
      lines.append(f"A difference first arises in {proof.first_difference}.")
    lines += [f"{name.capitalize()}: {'same function' if other.ok else 'NOT the same function'}, "
              f"{other.max_rel:.2g} of the largest logit at most, allowed {other.tolerance:.0e}."
              for name, other in self.further.items()]
    if not self.ok and all(one.max_rel < 10 * one.tolerance and one.top1_agreement == 1
                           for one in (proof, *self.further.values())):
      lines.append("Differences this small may be rounding, if logits are small beside the terms "
                   "that they sum up, as in a model that is hardly trained.")
    if tested := self.rows[-1].tested:
      also = (", which are also those of val, on which checkpoints are chosen: the data has only "
              "one of the two splits" if self.facts.get("val_is_test") else "")
      lines.append(f"Accuracies are of {tested:,} test images, with 95 % intervals (Wilson) in "
                   f"brackets{also}.")
    if timing:
      verdict = ": slower than dense at this size" if timing.speedup < 1 else ""
      lines.append(f"Speed: the deployed model runs at {timing.speedup:.2f} times the dense one's "
                   f"{timing.clock} speed{verdict}; median of paired rounds, lowest and highest in "
                   f"brackets, load {timing.load:.1f} at the start.")
    lines.append("MACs are multiply-accumulates for one image, counted in the traced program.")
    return lines


def provenance(method) -> str:
  """The source of a method, and what of it is ours: "arXiv 2412.06590; its use ... is ours"."""
  # That of its base class would be a claim about other code.
  return "; ".join(vars(type(method)).get("provenance", ("none", "not of this library")))


def environment() -> dict[str, object]:
  """Where the numbers were measured: command, versions, device, commit."""
  device = jax.devices()[0]
  return {"command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
          "vitcompact": __version__, "commit": _commit(), "python": platform.python_version(),
          **{name: importlib.metadata.version(name) for name in PACKAGES},
          "device": f"{jax.device_count()} x {device.platform} ({device.device_kind}, "
                    f"{platform.machine()})"}


def _commit() -> str:
  """The commit of the checkout that contains this file, or "unknown".

  "+" is appended if there are uncommitted changes; those in results/, which programs write, do not
  count.
  """
  package = pathlib.Path(__file__).resolve().parent

  def git(*words):
    return subprocess.run(["git", *words], cwd=package, capture_output=True, text=True,
                          check=True).stdout.strip()
  try:
    # An installed package may lie in an environment inside a checkout of something else.
    if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
      return "unknown"
    changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)results")
    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _exports(files) -> list[str]:
  """The table of exported files, from what `run.report.exports` returns; [] if there are none."""
  if not files:
    return []
  lines = ["", "| exported file | read back in | largest difference from the model | "
           "speed, XLA = 1 | SHA-256 |", "|---|---|---|---|---|"]
  for file in files:
    speed = "not run"
    if "speed_xla_is_1" in file:
      speed = "{:.2f} ({:.2f} to {:.2f})".format(*file["speed_xla_is_1"])
    lines.append(f"| {file['file']} | {file['runtime']} | {file['largest_difference']:.2g} of the "
                 f"largest logit, on {file['compared_on']} images | {speed} | {file['sha256']} |")
  return lines


def _change(value: int, base: int) -> str:
  return "" if value == base or not base else f" ({100 * (value / base - 1):+.1f}%)"


def _cell(value) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text.replace("|", "\\|")
