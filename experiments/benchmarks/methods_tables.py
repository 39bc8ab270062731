"""Builds the tables of docs/methods.md: what methods cost, from results, and which combine, from
trying to build a model with each combination."""
from experiments.benchmarks import methods, results
from experiments.benchmarks.results import cases, macs_ratio, speed

NO = "not measured"
ACCURACY = {"HMHSA": "heads", "CFFN": "ffn", "EViT": "evit", "ToMe": "tome", "MCTF": "mctf",
            "DynamicViT": "dynamicvit"}


def costs(found: dict, folder=results.FOLDER) -> str:
  """Returns a table with a row for each method, deployed, and for the dense models."""
  by_shape = cases(found, "model", "image_size", "batch")
  models = list(dict.fromkeys(model for model, _, _ in by_shape))
  sizes = list(dict.fromkeys((pixels, batch) for _, pixels, batch in by_shape))
  known = results.accuracies(folder)
  lines = ["| method | model | parameters | MACs executed (needed) | "
           + " | ".join(f"{pixels} px: MACs, dense / this; speed, dense = 1"
                        for pixels, _ in sizes)
           + " | starts from dense weights | accuracy on digits, difference from dense |",
           "|---|---|---:|---:|" + "---:|" * len(sizes) + "---|---|"]
  for model in models:
    for name, first in by_shape[model, *sizes[0]].items():
      counted = f"{first.get('params', 0) / 1e6:.2f} M | {first.get('macs', 0) / 1e9:.3f} G " \
                f"({first.get('ideal_macs', 0) / 1e9:.3f})"
      cells = [_cell(by_shape[model, *size], name) for size in sizes]
      rows = [row for row in known.get(ACCURACY.get(name), ())
              if row["data"] == "digits" and row.get("interval") is not None]
      accuracy = f"{100 * rows[-1]['difference']:+.2f} ± {100 * rows[-1]['interval']:.2f}" \
          if rows else "not run"
      settings = ", ".join(f"{key}={value!r}" for key, value in
                           methods.SETTINGS.get(name, {}).items())
      call = name if name == "dense" else f"`{name}({settings})`"
      rest = " | " if name == "dense" else f"{methods.STARTS.get(name, 'not stated')} | {accuracy}"
      lines.append(f"| {call} | {model} | {counted} | {' | '.join(cells)} | {rest} |")
  return "\n".join([*lines, "", "Speeds below 1 are slower than dense. Batches of "
                    f"{', '.join(str(batch) for _, batch in sizes)}; random weights."])


def _cell(rows, name: str) -> str:
  if name == "dense":
    seconds = rows["dense"]["seconds"]
    return NO if seconds is None else f"{1e3 * seconds / rows['dense']['batch']:.0f} ms per image"
  macs, ratio = macs_ratio(rows, name), speed(rows, name, "dense")
  return NO if macs is None or ratio is None else f"{macs:.2f}; {_times(ratio)}"


def _times(ratio) -> str:
  return f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def legal() -> str:
  """Returns two tables, methods by model and methods by methods, with the reasons below them."""
  by_family, pairs = methods.legal()
  names, reasons = [kind.__name__ for kind in methods.kinds()], {}

  def cell(refused: str) -> str:
    if not refused:
      return "yes"
    return f"({reasons.setdefault(refused, len(reasons) + 1)})"

  refused = {(row["method"], row["model"]): row["refused"] for row in by_family}
  lines = ["| method, at its default | " + " | ".join(methods.FAMILIES) + " |",
           "|---|" + "---|" * len(methods.FAMILIES)]
  lines += [f"| {name} | " + " | ".join(cell(refused[name, model]) for model in methods.FAMILIES)
            + " |" for name in names]
  together = {frozenset(row["methods"]): row["refused"] for row in pairs}
  axis = {kind.__name__: kind.axis for kind in methods.kinds()}
  columns = [name for name in names if axis[name] != "heads"]
  lines += ["", "| combined with | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
  for name in names:
    if axis[name] == "ffn":
      continue
    row = [" " if axis[other] == axis[name] or names.index(other) < names.index(name) else
           cell(together[frozenset((name, other))]) for other in columns]
    lines.append(f"| {name} | {' | '.join(row)} |")
  lines += ["", "Methods of the same axis cannot be combined in one block, except for those that "
            "wrap another. A number refers to the error message that says why:", ""]
  lines += [f"{number}. {reason}" for reason, number in reasons.items()]
  return "\n".join(lines)
