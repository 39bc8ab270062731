"""What fewer links and fewer tokens cost in accuracy: trains the same models, pair by pair.

  python -m experiments.accuracy digits --out results/accuracy_digits.json --workdir runs/accuracy
  python -m experiments.accuracy shapes --out results/accuracy_shapes.json --workdir runs/accuracy

For each fold of digits, or seed on shapes (577 tokens), a dense model is trained; then, from it and
taught by it, every variant for equally many steps, the dense one ("tuned") among them. On shapes
the dense models start from one that has learnt smaller images. The table
has each one's test accuracy, and its difference to the tuned one of the same fold or seed, with a
95 % interval (Student's t over the pairs). The test split chooses nothing. Run again, it goes on.
"""
import argparse
import json
import pathlib
import statistics

import jax
import scipy.stats

import vitcompact as vc
from configs import sparse_digits, sparse_shapes
from vitcompact import convert
from vitcompact.receipt import environment
from vitcompact.train import loop

VARIANTS = ("tuned", "token", "block", "evit", "sparsif_evit")
DATA = {"digits": (sparse_digits, ("dense",), 5), "shapes": (sparse_shapes, ("small", "middle",
                                                                             "dense"), 3)}

# Of the dense model's: what the method needs, what the traced program executes.
SHARES = ("ideal_attention_macs", "attention_macs", "macs")


def trained(config, directory: pathlib.Path) -> tuple[pathlib.Path, dict]:
  """(file of the trained model, {test accuracy, attention MACs...}) of a run, made if missing."""
  path, facts = directory / "trained.safetensors", directory / "facts.json"
  if not facts.exists():
    result = loop.train(config, directory)
    variables = jax.device_get(result.variables)
    convert.save(path, result.model, variables, force=True)
    count = vc.count(result.model, variables=variables)
    dense = vc.count(result.model.clone(plan=vc.Plan()))
    facts.write_text(json.dumps({
        "accuracy": result.metrics["test_accuracy"], "tokens": tokens(result.model),
        "ideal_attention_macs": count.ideal_attention_macs / dense.ideal_attention_macs,
        "attention_macs": count.attention_macs / dense.attention_macs,
        "macs": count.macs / dense.macs}))
  return path, json.loads(facts.read_text())


def tokens(model) -> int:
  return model.prefix + model.grid[0] * model.grid[1]


def resized(path: pathlib.Path, image_size: int) -> pathlib.Path:
  """The dense model of a file for another image size, positions interpolated."""
  model, variables = convert.load(path)
  if model.image_size == image_size:
    return path
  larger = model.clone(image_size=image_size)
  out = path.with_name(f"resized_{image_size}.safetensors")
  state = convert.to_torch(model, variables)
  convert.save(out, larger, convert.from_torch(larger, state), force=True)
  return out


def pair(kind: str, index: int, workdir: pathlib.Path, variants) -> dict[str, dict]:
  """{variant: facts} of one fold or seed."""
  configs, stages, _ = DATA[kind]
  path, found = None, {}
  for name in (*stages, *variants):
    config = configs.get_config(name)
    first = name in stages[:-1]   # the way to the dense model, which all pairs share
    config.seed = 0 if first else index
    if kind == "digits":
      config.data.name = f"digits:{index}"
    if path is not None:
      config.init_from = str(resized(path, config.model.image_size))
    if name in variants:
      config.teacher.file = config.init_from
    made, found[name] = trained(config, workdir / kind / ("shared" if first else str(index)) / name)
    path = made if name in stages else path
    print(f"{kind} {index} {name}: {100 * found[name]['accuracy']:.2f} %", flush=True)
  return found


def interval(differences) -> float:
  """Half of the 95 % interval of a mean, Student's t; infinite for one pair."""
  count = len(differences)
  if count < 2:
    return float("inf")
  spread = statistics.stdev(differences) / count ** 0.5
  return float(scipy.stats.t.ppf(0.975, count - 1)) * spread


def summarise(kind: str, pairs: list[dict[str, dict]]) -> list[dict]:
  """A row for each variant that every pair has."""
  rows = []
  for name in pairs[0]:
    accuracies = [found[name]["accuracy"] for found in pairs]
    differences = [found[name]["accuracy"] - found["tuned"]["accuracy"] for found in pairs]
    facts = {key: statistics.mean(found[name][key] for found in pairs)
             for key in ("tokens", *SHARES)}
    rows.append({"name": name, "data": kind, "pairs": len(pairs), **facts,
                 "accuracy": statistics.mean(accuracies), "accuracies": accuracies,
                 "difference": statistics.mean(differences), "interval": interval(differences)})
  return rows


def table(rows) -> str:
  lines = ["| model | test accuracy % | against tuned | 95 % interval | attention MACs needed |"
           " executed | all MACs executed |", "|---|---|---|---|---|---|---|"]
  for row in rows:
    low, high = (100 * (row["difference"] + sign * row["interval"]) for sign in (-1, 1))
    shares = " | ".join(f"{row[key]:.2f}x" for key in SHARES)
    lines.append(f"| {row['name']} | {100 * row['accuracy']:.2f} | "
                 f"{100 * row['difference']:+.2f} | [{low:+.2f}, {high:+.2f}] | {shares} |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("data", choices=sorted(DATA))
  parser.add_argument("--workdir", required=True, help="of all runs; made ones are used")
  parser.add_argument("--out", help="a JSON file for the rows")
  parser.add_argument("--pairs", type=int, help="how many folds or seeds (default: 5, 3)")
  parser.add_argument("--variants", default=",".join(VARIANTS), help="of " + ", ".join(VARIANTS))
  args = parser.parse_args()
  workdir = pathlib.Path(args.workdir).absolute()
  # Folds and seeds run the same programs.
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  count = args.pairs or DATA[args.data][2]
  pairs = [pair(args.data, index, workdir, tuple(args.variants.split(",")))
           for index in range(count)]
  rows = summarise(args.data, pairs)
  print(table(rows))
  if args.out:
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m experiments.accuracy {args.data} --pairs {count}"
    out.write_text(json.dumps({"command": command, **environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
