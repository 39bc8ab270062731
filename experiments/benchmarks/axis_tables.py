"""Builds the tables of docs/heads.md, attention.md, tokens.md and ffn.md from all results."""
import vitcompact as vc
from experiments.benchmarks import methods, methods_tables, results
from experiments.benchmarks.results import best_dense, cases, quotient, speed

NO = "not measured"
# Rows of the suite `model` that belong to one axis only.
SETTINGS = {"heads": (), "attention": (), "tokens": ("EViT 0.7", "EViT 0.5", "ToMe 13", "MCTF 16",
            "DynamicViT 0.7"), "ffn": ("ffn", "ffn both")}
LAYERS = {"heads": ("hMHSA", "hMHSA, logits site"), "attention": ("block-sparse 25%",)}
# {axis: {variant of `experiments.accuracy`: its name in the table}}
ACCURACIES = {
    "heads": {"heads": "`HMHSA()`, one of two heads"},
    "attention": {"token": "Sparsifiner, keep 0.25, by token",
                  "block": "Sparsifiner, keep 0.25, by block of tokens"},
    "tokens": {"evit": "EViT, keep 0.7", "evit_half": "EViT, keep 0.5",
               "dynamicvit": "DynamicViT, keep 0.7", "tome": "ToMe", "mctf": "MCTF"},
    "ffn": {"ffn": "`CFFN()`", "ffn_both": '`CFFN(factor="both")`'},
}


def axis(name: str, folder=results.FOLDER, platform: str = "cpu") -> str:
  """Returns the generated section of an axis's page."""
  # Imported here because `tables` imports this module.
  from experiments.benchmarks.tables import source
  parts = []
  for suite, table in (("methods", at_default), ("model", by_setting), ("tokens", by_tokens),
                       ("layer", by_layer)):
    found = results.load(suite, platform, folder)
    rows = table(name, found) if found else [f"Suite {suite}: **{NO}**."]
    if rows:
      parts += ["\n".join(rows)] + ([source(found)] if found else [])
  return "\n\n".join([*parts, "\n".join(accuracy(name, folder))])


def at_default(name: str, found: dict) -> list[str]:
  kinds = [kind.__name__ for kind in vc.METHODS[name].values()]
  lines = ["| method at its default, deployed | model | pixels | parameters, relative to dense | "
           "MACs, dense / this | speed, dense = 1 |", "|---|---|---:|---:|---:|---:|"]
  by_case = cases(found, "model", "image_size")
  for kind in kinds:
    for (model, pixels), rows in by_case.items():
      if kind in rows:
        row, dense = rows[kind], rows["dense"]
        settings = ", ".join(f"{key}={value!r}" for key, value in
                             methods.SETTINGS.get(kind, {}).items())
        more = 100 * (row["params"] / dense["params"] - 1)
        lines.append(f"| `{kind}({settings})` | {model} | {pixels} | {more:+.1f}% | "
                     f"{_ratio(dense, row)} | {_speed(rows, kind, 'dense')} |")
  return lines


def by_setting(name: str, found: dict) -> list[str]:
  if not SETTINGS[name]:
    return []
  by_batch = {batch: rows for (batch,), rows in cases(found, "batch").items()}
  lines = ["| DeiT-S at 224 pixels | MACs, dense / this | " + " | ".join(
      f"speed, batch {batch}" for batch in by_batch) + " |", "|---|---:|" + "---:|" * len(by_batch)]
  for setting in SETTINGS[name]:
    ratio = next(_ratio(rows["dense"], rows[setting]) for rows in by_batch.values()
                 if setting in rows)
    cells = [_speed(rows, setting, "dense") for rows in by_batch.values()]
    lines.append(f"| {setting} | {ratio} | {' | '.join(cells)} |")
  return lines


def by_tokens(name: str, found: dict) -> list[str]:
  lines = ["| tokens, class token included | MACs, dense / this | speed, dense = 1 |",
           "|---:|---:|---:|"]
  return lines + [f"| {tokens} | {_ratio(rows['dense'], rows[name])} | "
                  f"{_speed(rows, name, 'dense')} |"
                  for (tokens,), rows in cases(found, "tokens").items()]


def by_layer(name: str, found: dict) -> list[str]:
  if name not in LAYERS:
    return []
  lines = ["| one attention layer | pass | " + " | ".join(LAYERS[name]) + " |",
           "|---|---|" + "---:|" * len(LAYERS[name])]
  for (tokens, batch, which), rows in cases(found, "tokens", "batch", "pass").items():
    cells = [_speed(rows, layer, best_dense(rows)) for layer in LAYERS[name]]
    lines.append(f"| {tokens} tokens, batch {batch} | {which} | {' | '.join(cells)} |")
  return lines


def accuracy(name: str, folder) -> list[str]:
  known = results.accuracies(folder)
  lines = ["| accuracy | data | difference from dense, points | attention MACs, this / dense | all "
           "MACs, this / dense |", "|---|---|---:|---:|---:|"]
  for variant, words in ACCURACIES[name].items():
    for row in known.get(variant, ()):
      lines.append(f"| {words} | {row['data']} | {100 * row['difference']:+.2f} ± "
                   f"{100 * row['interval']:.2f} | {row['attention_macs']:.2f} | "
                   f"{row['macs']:.2f} |")
  others = [kind.__name__ for kind in vc.METHODS[name].values()
            if kind.__name__ not in (*methods_tables.ACCURACY, "Sparsifiner")]
  return [*lines, "", f"Not run in this experiment: {', '.join(others)}. Differences are from the "
          "dense model fine-tuned for as many steps, with 95% intervals; `python -m "
          "experiments.accuracy`, see [results](../results/README.md#accuracy). Several methods "
          "were also measured on [Fashion-MNIST](../results/README.md#accuracy-against-time), none "
          "on ImageNet."]


def _ratio(dense: dict, row: dict) -> str:
  ratio = quotient(dense.get("macs"), row.get("macs"))
  return NO if ratio is None else f"{ratio:.2f}"


def _speed(rows, name: str, over: str) -> str:
  ratio = speed(rows, name, over)
  return NO if ratio is None else f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"
