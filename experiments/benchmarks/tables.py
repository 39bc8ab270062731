"""Writes the tables of speed and draws the scaling plot, from results/*.json; counts parameters."""
import math
import pathlib

import vitcompact as vc
from experiments.benchmarks import axis_tables, methods_tables, results
from experiments.benchmarks.exits import RUNTIMES
from experiments.benchmarks.layer import VARIANTS as LAYER_VARIANTS
from experiments.benchmarks.model import MODEL, PLANS
from experiments.benchmarks.model import VARIANTS as MODEL_VARIANTS
from experiments.benchmarks.results import best_dense, cases, macs_ratio, speed
from experiments.benchmarks.tokens import VARIANTS as TOKENS_VARIANTS

ROOT = pathlib.Path(__file__).parent.parent.parent
# Part of the comment that marks the start of a generated section.
WRITTEN = "written by `python -m experiments.bench tables` from results/"
FRONT = ("dense", "heads", "ffn", "heads + ffn", "EViT 0.7", "heads + ffn both + EViT 0.7")
PLATFORMS = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}
NO = "not measured"


def rewrite() -> str:
  """Writes the tables into README.md, docs/ and results/README.md, and draws the plots.

  Returns a message that says what was written.
  """
  put(ROOT / "README.md", "front", front())
  put(results.FOLDER / "README.md", "speed", markdown())
  put(ROOT / "docs/methods.md", "costs", methods_table(results.load("methods", "cpu")))
  put(ROOT / "docs/methods.md", "legal", methods_tables.legal())
  for axis in vc.METHODS:
    put(ROOT / f"docs/{axis}.md", axis, axis_tables.axis(axis))
  drawn = [str(plot(found, platform)) for platform in PLATFORMS
           if (found := results.load("tokens", platform))]
  return "wrote the tables of README.md, docs/ and results/README.md" + "".join(
      f", {path}" for path in drawn)


def put(path: pathlib.Path, name: str, table: str):
  """Replaces the generated section of this name in a file."""
  text = path.read_text(encoding="utf-8")
  begin, end = f"<!-- {name}: {WRITTEN} -->", f"<!-- end of {name} -->"
  start, stop = text.index(begin), text.index(end)
  path.write_text(f"{text[:start]}{begin}\n{table}\n{text[stop:]}", encoding="utf-8")


def front(folder: pathlib.Path = results.FOLDER, batch: int = 8) -> str:
  """Returns the README's table: a row for each kind of plan, deployed."""
  found = results.load("model", "cpu", folder)
  rows = {case: rows for (case,), rows in cases(found, "batch").items()}[batch]
  lines = ["| DeiT-S at 224 pixels, deployed | parameters | MACs | speed, dense = 1 | fastest "
           "runtime, dense in XLA = 1 | accuracy of the method on digits, difference from dense |",
           "|---|---:|---:|---:|---:|---|"]
  accuracies, dense = results.accuracies(folder), None
  exits = results.load("exits", "cpu", folder) or {"rows": []}
  by_model = {name: rows for (name, side), rows in cases(exits, "model", "image_size").items()
              if side == vc.create_model(name).image_size}
  for name in FRONT:
    count = vc.count(vc.create_model(MODEL, plan=PLANS[name], deploy=True))
    dense = dense or count
    accuracy = [row for row in accuracies.get(MODEL_VARIANTS[name], ()) if row["data"] == "digits"]
    lines.append(
        f"| {name} | {_saved(count.params, dense.params, 1e6, 'M')} | "
        f"{_saved(count.macs, dense.macs, 1e9, 'G')} | "
        f"{_rate(rows, name, batch)} | "
        f"{_fastest(by_model.get(MODEL), name)} | "
        f"{_accuracy(accuracy)} |")
  others = f" Other runtimes: {source(exits)}" if by_model else ""
  tuned = "".join(f"; differences are from the dense network fine-tuned in the same way, which has "
                  f"{100 * row['accuracy']:.2f}%" for row in accuracies.get("tuned", ())
                  if row["data"] == "digits")
  return "\n".join([*lines, "", f"Batch {batch}. {source(found)}{others} Accuracies are those of "
                    f"small networks on 1,797 digits, five folds (see results){tuned}; none was "
                    "measured on ImageNet."])


def _fastest(rows, plan: str) -> str:
  """A cell: a plan's fastest runtime in float32, and its speedup over the dense model in XLA."""
  ratios = {name: speed(rows, f"{name}: {plan}", "XLA: dense") for key, name in RUNTIMES.items()
            if "bf16" not in key} if rows else {}
  known = {name: ratio for name, ratio in ratios.items() if ratio}
  if not known:
    return NO
  best = max(known, key=lambda name: known[name][0])
  return f"{best} {_times(known[best])}"


def exits_table(found: dict, folder: pathlib.Path) -> str:
  lines = ["| exported | MACs, dense / this | " + " | ".join(RUNTIMES.values()) + " | in each, "
           "relative to its own dense |", "|---|---:|" + "---:|" * len(RUNTIMES) + "---|"]
  for (model, side, batch), rows in cases(found, "model", "image_size", "batch").items():
    plans = dict.fromkeys(name.partition(": ")[2] for name in rows if ": " in name)
    peers = [name for name in rows if ": " not in name]
    for plan in plans:
      cells = [_speed(rows, f"{name}: {plan}", "XLA: dense") for name in RUNTIMES.values()]
      own = [speed(rows, f"{name}: {plan}", f"{name}: dense") for name in RUNTIMES.values()]
      macs = results.quotient(rows["XLA: dense"].get("macs"), rows[f"XLA: {plan}"].get("macs"))
      lines.append(
          f"| {model} at {side}, batch {batch}: {plan} | {'' if macs is None else f'{macs:.2f}'} | "
          f"{' | '.join(cells)} | " + ("" if plan == "dense" else ", ".join(
              NO if ratio is None else f"{ratio[0]:.2f}x" for ratio in own)) + " |")
    lines += [f"| {model} at {side}, batch {batch}: dense, {name} |  | "
              f"{_speed(rows, name, 'XLA: dense')} |" + " |" * len(RUNTIMES) for name in peers]
  text = ("Speedups over the dense model in XLA, in the same rounds; random weights. The files' "
          "logits were first compared with XLA's: in float32 they differ by at most "
          f"{_largest_gap(found, exact=True)} of the largest logit, in bfloat16 by at most "
          f"{_largest_gap(found, exact=False)}.")
  return "\n".join([*lines, "", f"{source(found)} {text}"])


def _largest_gap(found: dict, exact: bool) -> str:
  gaps = [row["max_rel"] for row in found["rows"]
          if "max_rel" in row and ("bfloat16" not in row["name"]) == exact]
  return f"{max(gaps):.0e}" if gaps else NO


def _saved(value: int, dense: int, unit: float, letter: str) -> str:
  change = "" if value == dense else f" ({100 * (value / dense - 1):+.1f}%)"
  return f"{value / unit:.2f} {letter}{change}"


def markdown(folder: pathlib.Path = results.FOLDER) -> str:
  """Returns the section `speed`: the tables of each platform, and what was not measured."""
  tables, missing = [], []
  for platform, title in PLATFORMS.items():
    found = {suite: results.load(suite, platform, folder) for suite in SUITES}
    for suite, known in found.items():
      # Results of other processors are in files with longer names: layer_cpu_amd.json.
      others = [results.read(path) for path in sorted(folder.glob(f"{suite}_{platform}_*.json"))]
      tables += [SUITES[suite](one, folder) for one in (known, *others) if one]
    unknown = [suite for suite, known in found.items() if not known]
    if len(unknown) == len(SUITES):
      missing.append(title)
    elif unknown:
      tables.append(f"On {title}, suites {', '.join(unknown)}: **{NO}**.")
  if missing:
    tables.append(f"On {' and '.join(missing)}: **{NO}**.")
  return "\n\n".join(tables)


def source(found: dict) -> str:
  """Returns a sentence on where a table comes from."""
  where = (f"one core of {found['processor']}" if found["platform"] == "cpu" else found["device"])
  clock = "CPU seconds" if found["clock"] == "cpu" else "seconds"
  peer = f", torch {found['torch']['torch']}" if found["torch"] else ""
  return (f"`{found['command']}`: {where}, {found['dtype']}, jax {found['jax']}{peer}; {clock}, "
          f"medians of {found['rounds']} paired rounds (range in brackets), load "
          f"{found['load'][0]:.1f}, commit {found['commit']}, {found['date'][:10]}.")


def gemm_table(found: dict, folder: pathlib.Path) -> str:
  by_what, rates = {what: rows for (what,), rows in cases(found, "what").items()}, []
  products = by_what["product"]
  for row in products.values():
    rate = NO if row["seconds"] is None else f"{row['flop'] / row['seconds'] / 1e9:.0f} GFLOP/s"
    rates.append(f"{row['name']} {rate}")
  size = " x ".join(map(str, next(iter(products.values()))["product"]))
  rows = by_what.get("FFN forward and backward", results.Rows())
  ffn = speed(rows, "three times the products", "ours")
  return (f"The ceiling here, one {size} matrix product: {', '.join(rates)}. At equal MACs, no "
          "ratio to PyTorch can be much larger than that of these products. An FFN of these sizes "
          f"takes, forward and backward, {_times(ffn)} the time of its forward products repeated "
          f"three times. {source(found)}")


def model_table(found: dict, folder: pathlib.Path) -> str:
  by_batch = {batch: rows for (batch,), rows in cases(found, "batch").items()}
  middle_batch = sorted(by_batch)[len(by_batch) // 2]
  middle = by_batch[middle_batch]
  accuracies = results.accuracies(folder)
  batches = " | ".join(f"batch {batch}" for batch in by_batch)
  lines = [f"| DeiT-S at 224, deployed | MACs, dense / this | {batches} | share of the MACs' "
           f"ratio, batch {middle_batch} | accuracy |",
           "|---|---:|" + "---:|" * len(by_batch) + "---:|---|"]
  for name in dict.fromkeys(name for rows in by_batch.values() for name in rows):
    macs, share, accuracy = _by_macs(middle, name, accuracies)
    cells = [_rate(rows, name, batch) for batch, rows in by_batch.items()]
    lines.append(f"| {name} | {macs} | {' | '.join(cells)} | {share} | {accuracy} |")
  text = ("The dense row has images per second, the other rows speedups over it in the same "
          "rounds. Accuracies are those of the same methods in the small networks of "
          "`experiments.accuracy`; brackets have the difference from the dense network fine-tuned "
          "in the same way, for the steps shown or those of its config. None was measured on "
          "ImageNet.")
  for batch, rows in by_batch.items():
    if (chunk := rows["dense"].get("chunk", rows["dense"].get("at_a_time", batch))) != batch:
      text += (f" At batch {batch}, our models compute {chunk} images at a time, except in the row "
               "that says otherwise.")
  return "\n".join([*lines, "", f"{source(found)} {text}"])


def layer_table(found: dict, folder: pathlib.Path) -> str:
  names = ("hMHSA", "hMHSA, logits site", "block-sparse 25%")
  lines = ["| attention layer | pass | dense, ms | " + " | ".join(names) + " | temporary memory |",
           "|---|---|---:|" + "---:|" * len(names) + "---|"]
  for (tokens, batch, which), rows in cases(found, "tokens", "batch", "pass").items():
    dense = best_dense(rows)
    memory = ", ".join(_memory(rows[name]) for name in (dense, "hMHSA", "block-sparse 25%"))
    cells = [_speed(rows, name, dense) for name in names]
    lines.append(f"| {tokens} tokens, batch {batch} | {which} | {_milliseconds(rows[dense])} | "
                 f"{' | '.join(cells)} | {memory} |")
  text = ("Width 384, 6 heads, projections and predictors included; speedups over the fastest of "
          "our dense layers. Temporary memory of dense, hMHSA and block-sparse, as a multiple of "
          f"input plus output. {_accuracies(folder, LAYER_VARIANTS)}")
  return "\n".join([*lines, "", f"{source(found)} {text}"])


def train_table(found: dict, folder: pathlib.Path) -> str:
  ((batch,), rows), = cases(found, "batch").items()
  lines = ["| training step, DeiT-S at 224, AdamW | MACs, dense / this | speed, dense = 1 | "
           "share of the MACs' ratio | accuracy |", "|---|---:|---:|---:|---|"]
  accuracies = results.accuracies(folder)
  for name in rows:
    macs, share, accuracy = _by_macs(rows, name, accuracies)
    lines.append(f"| {name} | {macs} | {_rate(rows, name, batch)} | {share} | {accuracy} |")
  text = f"Batch {batch}; MACs of the training form; accuracies as above."
  return "\n".join([*lines, "", f"{source(found)} {text}"])


def tokens_table(found: dict, folder: pathlib.Path) -> str:
  by_tokens = {tokens: rows for (tokens,), rows in cases(found, "tokens").items()}
  names = list(next(iter(by_tokens.values())))
  lines = ["| ms per image | " + " | ".join(f"{n}" for n in by_tokens) + " |",
           "|---|" + "---:|" * len(by_tokens)]
  for name in names:
    cells = [_milliseconds(rows[name], rows[name].get("batch", 1)) for rows in by_tokens.values()]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  text = ("Columns are numbers of tokens, class token included; the network is a DeiT-S with four "
          "blocks, in the last three of which EViT keeps 0.7; `attention` is block-sparse "
          "attention with a quarter of the blocks, where there are enough tokens for it to pay "
          "off. "
          f"{_accuracies(folder, TOKENS_VARIANTS)}")
  image = f"![milliseconds by number of tokens](tokens_{found['platform']}.png)"
  return "\n".join([image, "", *lines, "", f"{source(found)} {text}"])


def startup_table(found: dict, folder: pathlib.Path) -> str:
  lines = ["| before the first result | seconds | compared with | |", "|---|---:|---|---:|"]
  for (what,), rows in cases(found, "what").items():
    first, *others = rows
    for name in others:
      ratio = speed(rows, first, name)   # the time of `name` over that of `first`
      lines.append(f"| {what}: {name} | {_seconds(rows[name])} | {first}: "
                   f"{_seconds(rows[first])} | {_times(ratio)} |")
  return "\n".join([*lines, "", source(found)])


def data_table(found: dict, folder: pathlib.Path) -> str:
  lines = ["| JPEG to batches of 224 pixels | images per second | relative to the first |",
           "|---|---:|---:|"]
  for (what, batch), rows in cases(found, "what", "batch").items():
    first, unit = next(iter(rows)), "of CPU time" if what.startswith("CPU") else "of wall time"
    for name, row in rows.items():
      cell = NO if row["seconds"] is None else f"{batch / row['seconds']:.0f} {unit}"
      ratio = "" if name == first else _speed(rows, name, first)
      lines.append(f"| {name} | {cell} | {ratio} |")
  return "\n".join([*lines, "", source(found)])


def methods_table(found: dict | None, folder: pathlib.Path = results.FOLDER) -> str:
  return f"{NO}." if found is None else f"{methods_tables.costs(found, folder)} {source(found)}"


SUITES = {"gemm": gemm_table, "model": model_table, "exits": exits_table, "layer": layer_table,
          "train": train_table, "tokens": tokens_table, "methods": methods_table,
          "startup": startup_table, "data": data_table}


def _speed(rows, name: str, over: str) -> str:
  """A cell: "1.23x [1.20, 1.25]"."""
  return _times(speed(rows, name, over))


def _times(ratio) -> str:
  return NO if ratio is None else f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def _rate(rows, name: str, batch: int) -> str:
  """A cell: images per second of the dense model, or the speedup of another."""
  if name != "dense":
    return _speed(rows, name, "dense")
  return NO if rows[name]["seconds"] is None else f"{batch / rows[name]['seconds']:.1f} img/s"


def _by_macs(rows, name: str, accuracies) -> tuple[str, str, str]:
  """Cells of a row, empty for peers: the dense model's MACs over this one's, the share of that
  ratio that its speedup reaches, and its accuracy."""
  macs, ratio = macs_ratio(rows, name), speed(rows, name, "dense")
  if not macs:
    return "", "", ""
  share = f"{100 * ratio[0] / macs:.0f}%" if ratio and name != "dense" else ""
  return f"{macs:.2f}", share, _accuracy(accuracies.get(MODEL_VARIANTS.get(name)))


def _seconds(row: dict) -> str:
  return NO if row["seconds"] is None else f"{row['seconds']:.2f}"


def _milliseconds(row: dict, images: int = 1) -> str:
  return NO if row["seconds"] is None else f"{1e3 * row['seconds'] / images:.1f}"


def _memory(row: dict) -> str:
  if not row.get("temporary_bytes"):
    return NO
  return f"{row['temporary_bytes'] / row['inputs_and_outputs_bytes']:.1f}"


def _accuracy(rows) -> str:
  """A cell: accuracy on each data set that was measured, and the difference from dense."""
  if not rows:
    return NO
  return "; ".join(f"{100 * row['accuracy']:.2f}% on {row['data']}" + _difference(row)
                   for row in rows)


def _accuracies(folder: pathlib.Path, variants: dict[str, str | None]) -> str:
  """Returns a sentence with the accuracies of all rows of a table."""
  known = results.accuracies(folder)
  return "Accuracies as above: " + "; ".join(
      f"{name} {_accuracy(known.get(variant))}" for name, variant in variants.items()) + "."


def _difference(row: dict) -> str:
  """Returns the difference of a compact model from dense, in brackets, for a cell.

  row["interval"] is half of the 95% interval, infinite for a single pair.
  """
  if row["name"] == "dense" or row.get("difference") is None:
    return ""
  interval = row.get("interval")
  spread = "" if interval is None or math.isinf(interval) else f" ± {100 * interval:.2f}"
  steps = f", {row['steps']} steps" if row.get("steps") else ""
  return f" ({100 * row['difference']:+.2f}{spread}{steps})"


def plot(found: dict, platform: str, folder: pathlib.Path = results.FOLDER) -> pathlib.Path:
  """Plots milliseconds by tokens, both logarithmic, so that the growth rate is a slope."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  by_tokens = cases(found, "tokens")
  figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
  for name in next(iter(by_tokens.values())):
    points = [(tokens, 1e3 * rows[name]["seconds"] / rows[name]["batch"])
              for (tokens,), rows in by_tokens.items() if rows[name]["seconds"]]
    ours = is_ours(next(iter(by_tokens.values()))[name])
    if points:
      axes.loglog(*zip(*points, strict=True), "-o" if ours else "--s", markersize=3, label=name)
  ticks = [tokens for (tokens,) in by_tokens]
  axes.set_xticks(ticks, ticks)
  axes.minorticks_off()
  axes.set_xlabel("tokens")
  axes.set_ylabel("milliseconds per image")
  axes.set_title(f"DeiT-S, four blocks: {found['processor']}, {found['dtype']}"
                 if platform == "cpu" else f"DeiT-S, four blocks: {found['device']}", fontsize=9)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  path = folder / f"tokens_{platform}.png"
  figure.savefig(path, dpi=130)
  pyplot.close(figure)
  return path


def is_ours(row: dict) -> bool:
  """Returns whether a row is one of our models: peers' MACs are not counted."""
  return "macs" in row
