"""Compares runs by the metrics.jsonl in their workdirs: curves, and a table of final metrics."""
import json
import math
import pathlib

from vitcompact import draw

USUAL_METRICS = ("loss", "accuracy", "val_loss", "val_accuracy", "lr", "grad_norm",
                 "images_per_second", "data_wait", "mfu", "skipped")
FINAL_METRICS = ("step", "val_accuracy", "test_accuracy", "best_val_accuracy", "images_per_second")


def read(workdir) -> dict[str, dict[int, float]]:
  """{metric: {step: value}} of a run. If a step was logged again after a restart, the later value
  counts."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  if not path.is_file():
    raise ValueError(f"{path} is not there: name the --workdir of a run")
  out = {}
  for number, text in enumerate(path.read_text().splitlines(), 1):
    try:
      line = dict(json.loads(text))
      line["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
      raise ValueError(f"{path} line {number} is no JSON object with a step: {text[:80]!r}; it is "
                       "not the log of a run") from None
    for name, value in line.items():
      if name != "step" and isinstance(value, (int, float)):
        out.setdefault(name, {})[line["step"]] = value
  if not out:
    raise ValueError(f"{path} holds no numbers yet")
  return {name: dict(sorted(values.items())) for name, values in out.items()}


def panels(runs: dict, metrics) -> list[str]:
  """The metrics to plot: `metrics`, or all that were logged more than once, the usual ones first.
  """
  known = {name for logged in runs.values() for name in logged}
  if unknown := [name for name in metrics or () if name not in known]:
    raise ValueError(f"--metric: no run has {', '.join(unknown)}; there are "
                     f"{', '.join(sorted(known))}")
  if metrics:
    return list(metrics)
  several = {name for logged in runs.values() for name, values in logged.items()
             if len(values) > 1}
  if not several:
    raise ValueError("no number was logged twice: nothing to plot; name some with --metric")
  return [name for name in USUAL_METRICS if name in several] + sorted(several - set(USUAL_METRICS))


def plot(runs: dict, names: list[str], out):
  """Writes a picture with a panel for each metric: its values over steps, one curve per run."""
  pyplot, columns = draw.pyplot(), min(3, len(names))
  rows = math.ceil(len(names) / columns)
  figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
  for axis, name in zip(axes.flat, names, strict=False):
    for run, metrics in runs.items():
      values = metrics.get(name, {})
      axis.plot(list(values), list(values.values()), label=run,
                marker="." if len(values) < 30 else None)
    axis.set(title=name, xlabel="step")
    axis.grid(alpha=0.3)
  for axis in axes.flat[len(names):]:
    axis.axis("off")
  axes.flat[0].legend()
  figure.tight_layout()
  figure.savefig(out, dpi=120)
  pyplot.close(figure)


def table(runs: dict) -> str:
  """A text table of the final metrics of each run."""
  rows = [("run", *FINAL_METRICS)]
  for run, metrics in runs.items():
    ends = {name: list(values.values())[-1] for name, values in metrics.items()}
    ends["step"] = max(step for values in metrics.values() for step in values)
    rows.append((run, *(f"{ends[name]:.6g}" if name in ends else "-" for name in FINAL_METRICS)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                   for row in rows)
