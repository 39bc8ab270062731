"""Measures what each axis costs in accuracy, with paired training runs.

  python -m experiments.accuracy digits --out results/accuracy_digits.json --workdir runs/accuracy
  python -m experiments.accuracy shapes --out results/accuracy_shapes.json --workdir runs/accuracy

On digits a dense model is trained for each fold. On shapes (their directions, at 577 tokens) one
dense model is trained for all seeds, on coarse patches first, where a step takes a twentieth of the
time. Then every variant is trained from the dense model, with it as teacher and for the same number
of steps; one of them is the dense model itself ("tuned"). Seeds only change the order of images:
scenes, test images and the initial predictors are the same. The table has the test accuracy of each
variant, and its difference from the tuned model of the same fold or seed, with a 95 % interval
(Student's t over the pairs). The test split chooses nothing. Running the command again continues
where it stopped.
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
from vitcompact.run import loop, workdir

# {data: (configs, dense models in order, each trained from the one before, number of pairs)}
DATA = {"digits": (sparse_digits, ("dense",), 5),
        "shapes": (sparse_shapes, ("coarse", "dense"), 3)}

# As shares of the dense model's: what the method needs, what the traced program executes.
SHARES = ("ideal_attention_macs", "attention_macs", "macs")


def variants_of(kind: str) -> list[str]:
  configs, stages, _ = DATA[kind]
  return [name for name in configs.PLANS if name not in stages]


def train_or_find(config, directory: pathlib.Path) -> tuple[pathlib.Path, dict]:
  """Returns (file of the trained model, {test accuracy, attention MACs...}) of a run, after
  training it if it is missing."""
  path, facts = directory / "trained.safetensors", directory / "facts.json"
  workdir.check_claim(directory, loop.resolve(config))
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


def with_patch_size(path: pathlib.Path, config) -> pathlib.Path:
  """Returns a file of the same model with the config's patch size, after resizing if it differs."""
  model, variables = convert.load(path)
  if model.patch_size == config.model.patch_size:
    return path
  out = path.with_name(f"patches_of_{config.model.patch_size}.safetensors")
  convert.save(out, *convert.resized(model, variables, patch_size=config.model.patch_size),
               force=True)
  return out


def tokens(model) -> int:
  return model.prefix + model.grid[0] * model.grid[1]


def pair(kind: str, index: int, runs: pathlib.Path, variants, steps: int | None = None
         ) -> dict[str, dict]:
  """Returns {variant: facts} for one fold or seed. steps: of fine-tuning, if not the config's."""
  configs, stages, _ = DATA[kind]
  path, found = None, {}
  for name in (*stages, *variants):
    config = configs.get_config(name)
    shared = kind == "shapes" and name in stages
    config.seed = 0 if shared else index
    if kind == "digits":
      config.data.name = f"digits:{index}"
    if path is not None:
      config.init_from = str(with_patch_size(path, config))
    if name in variants:
      config.teacher.file = config.init_from
      if steps:
        config = sparse_digits.fine_tune(config, steps, config.optim.learning_rate)
    directory = runs / kind / ("shared" if shared else str(index)) / (
        f"{name}_{steps}" if steps and name in variants else name)
    file, found[name] = train_or_find(config, directory)
    path = file if name in stages else path
    print(f"{kind} {index} {name}: {100 * found[name]['accuracy']:.2f} %", flush=True)
  return found


def interval(differences) -> float:
  """Returns half of the 95 % interval of a mean (Student's t); infinite for one pair."""
  count = len(differences)
  if count < 2:
    return float("inf")
  spread = statistics.stdev(differences) / count ** 0.5
  return float(scipy.stats.t.ppf(0.975, count - 1)) * spread


def summarise(kind: str, pairs: list[dict[str, dict]], steps: int | None = None) -> list[dict]:
  """Returns a row for each variant, averaged over pairs."""
  rows = []
  for name in pairs[0]:
    accuracies = [found[name]["accuracy"] for found in pairs]
    differences = [found[name]["accuracy"] - found["tuned"]["accuracy"] for found in pairs]
    facts = {key: statistics.mean(found[name][key] for found in pairs)
             for key in ("tokens", *SHARES)}
    rows.append({"name": name, "data": kind, "pairs": len(pairs), "steps": steps, **facts,
                 "accuracy": statistics.mean(accuracies), "accuracies": accuracies,
                 "difference": statistics.mean(differences), "interval": interval(differences)})
  return rows


def table(rows) -> str:
  lines = ["| model | test accuracy % | difference from tuned | 95 % interval | attention MACs "
           "needed | executed | all MACs executed |", "|---|---|---|---|---|---|---|"]
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
  parser.add_argument("--workdir", required=True, help="of all runs; existing ones are reused")
  parser.add_argument("--out", help="a JSON file for the rows")
  parser.add_argument("--pairs", type=int, help="number of folds or seeds (default: 5, 3)")
  parser.add_argument("--steps", type=int, help="of fine-tuning (default: the config's)")
  parser.add_argument("--variants", help="names of PLANS in the config of the data (default: all)")
  args = parser.parse_args()
  runs = pathlib.Path(args.workdir).absolute()
  known = variants_of(args.data)
  variants = args.variants.split(",") if args.variants else known
  if unknown := {*variants, "tuned"} - {*known} or {"tuned"} - {*variants}:
    parser.error(f"--variants={args.variants}: {sorted(unknown)}; give tuned, to compare with, and "
                 f"others from {', '.join(known)}")
  count = DATA[args.data][2] if args.pairs is None else args.pairs
  if count < 1 or (args.data == "digits" and count > DATA["digits"][2]):
    parser.error(f"--pairs={count}: must be at least 1, and digits have 5 folds")
  if args.steps is not None and args.steps < 1:
    parser.error(f"--steps={args.steps}: must be at least 1")
  if args.out:   # fail before training if the file cannot be written
    pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
  # Folds and seeds run the same programs.
  jax.config.update("jax_compilation_cache_dir", str(runs / "compiled"))
  pairs = [pair(args.data, index, runs, variants, args.steps) for index in range(count)]
  rows = summarise(args.data, pairs, args.steps)
  print(table(rows))
  if args.out:
    options = "".join(f" --{name} {value}" for name, value in (
        ("pairs", args.pairs), ("steps", args.steps), ("variants", args.variants)) if value)
    facts = {**environment(), "command": f"python -m experiments.accuracy {args.data}{options}"}
    pathlib.Path(args.out).write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
