"""Runs suites of paired speed measurements, and writes the tables from their results.

  python -m experiments.bench layer --out results/layer_cpu.json
  python -m experiments.bench all --torch PYTHON     # all suites, about 20 minutes on one core
  python -m experiments.bench tables                 # writes the tables and the plot
  python -m experiments.bench goals                  # compares goals with measurements

Suites: gemm (the device's ceiling), layer (attention), model (whole networks), exits (exported
files), train (steps), tokens (scaling with their number), methods (each at its default), startup,
data.

All candidates of a case take turns in one run, in rotating order, and every ratio is between turns
of the same round, so other load on the machine affects all candidates alike. On a host the run is
pinned to one core and CPU seconds are counted; on an accelerator, wall seconds until the device is
done. Compilation is measured separately. --torch names a Python that has torch (and, for one more
peer, timm); it is driven over a pipe and takes turns like the others. Results contain every round,
the device, versions and the commit.
"""
import argparse
import datetime
import importlib
import json
import os
import pathlib
import subprocess
import sys

RESULTS = pathlib.Path(__file__).parent.parent / "results"
SUITES = ("gemm", "layer", "model", "exits", "train", "tokens", "methods", "startup", "data")


def find_platform() -> str:
  """Returns JAX's platform, from another process: this one must not start threads before it is
  pinned."""
  code = "import jax; print(jax.default_backend())"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  return done.stdout.split()[-1]


def pin() -> tuple[int, ...]:
  """Pins this process and its children to one core. Returns the cores that it had before."""
  if not hasattr(os, "sched_setaffinity"):
    raise ValueError("this system cannot pin a process to a core: run it on Linux, where the "
                     "figures mean something")
  cores = tuple(sorted(os.sched_getaffinity(0)))
  os.sched_setaffinity(0, cores[-1:])
  return cores


def measure_suite(name: str, setting, command: str) -> dict:
  """Returns the results of one suite, and the environment that they come from."""
  from vitcompact import bench
  from vitcompact.receipt import environment
  suite = importlib.import_module(f"experiments.benchmarks.{name}")
  load = os.getloadavg()[0]
  about = {"suite": name, "platform": setting.platform, "dtype": setting.dtype,
           **environment(), "command": command, "processor": bench.processor(),
           "pinned_to": sorted(os.sched_getaffinity(0)) if setting.on_host else None,
           "clock": bench.clock_name(), "torch": setting.torch and setting.torch.about,
           "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
  rows = []
  for row in suite.run(setting):
    print_row(name, row)
    rows.append(row)
  return {**about, "rounds": setting.rounds, "load": [load, os.getloadavg()[0]], "rows": rows}


def write(path: pathlib.Path, results: dict):
  """Writes one row per line; the file is complete at every moment."""
  rows = ",\n  ".join(json.dumps(row) for row in results["rows"])
  head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
  partial = path.with_name(f"{path.name}.partial")
  path.parent.mkdir(parents=True, exist_ok=True)
  partial.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
  os.replace(partial, path)


def run(names, out: str | None, rounds: int, torch: str | None):
  platform = find_platform()
  cores = pin() if platform == "cpu" else ()
  # An accelerator's memory is shared with the peers' processes.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  from experiments.benchmarks.measure import Setting
  from experiments.benchmarks.peer import TorchPeer
  setting = Setting(platform, rounds, TorchPeer(torch) if torch else None, cores)
  for name in names:
    command = f"python -m experiments.bench {name}" + " --torch PYTHON" * bool(torch)
    results = measure_suite(name, setting, command)
    path = pathlib.Path(out) if out else RESULTS / f"{name}_{platform}.json"
    write(path, results)
    print(f"{results['device']}, {results['processor']}, {results['clock']} seconds, load "
          f"{results['load'][0]:.1f} to {results['load'][1]:.1f}; wrote {path}", flush=True)


def print_row(suite: str, row: dict):
  case = ", ".join(f"{key} {row[key]}" for key in ("tokens", "batch", "pass", "what") if key in row)
  taken = "not measured: " + row["reason"] if row["seconds"] is None else (
      f"{1e3 * row['seconds']:10.2f} ms  [{1e3 * min(row['rounds']):.2f}, "
      f"{1e3 * max(row['rounds']):.2f}]")
  print(f"{suite}: {case}: {row['name']:30} {taken}", flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("suite", choices=[*SUITES, "all", "tables", "goals"])
  parser.add_argument("--out", help="a file for the results of one suite (*.json)")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--torch", metavar="PYTHON", help="a Python that has torch")
  args = parser.parse_args()
  try:
    if args.suite in ("tables", "goals"):
      from experiments.benchmarks import goals, tables
      print(tables.rewrite() if args.suite == "tables" else goals.table())
      return
    if args.out and args.suite == "all":
      raise ValueError("--out names one file, but every suite writes its own; leave it out")
    if args.rounds < 1:
      raise ValueError(f"--rounds={args.rounds}: must be at least 1; use 5 for a good median")
    if args.out:   # fail before measuring if the file cannot be written
      pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    run(SUITES if args.suite == "all" else [args.suite], args.out, args.rounds, args.torch)
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
  main()
