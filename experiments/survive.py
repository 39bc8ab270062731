"""Tests how training survives kills at random moments, flipped bits and restarts; prints counts.

  python -m experiments.survive --kills 50
  python -m experiments.survive --flips 100
  python -m experiments.survive --resume       # 40 steps = 20, kill -9, and the rest, bit for bit
  python -m experiments.survive tables         # into docs/survival.md, from results/

Each test replaces its own part of results/survival_cpu.json and leaves the others.

Kills: main.py trains a tiny model that saves, evaluates and cleans up after every second step, and
is killed (-9) at a random moment. After that every visible checkpoint must restore completely,
every checkpoint seen before must still exist or have been replaced by newer ones, and the next
start must resume from the newest. Flips: one random bit in one file of a checkpoint is flipped; the
checkpoint must then be refused, or restore what was saved. Resume: digits and an image folder, with
0 and 2 worker processes, on 1 and 8 simulated devices, and in 2 processes; some runs are stopped by
SIGTERM instead. Everything runs on the CPU.
"""
import argparse
import collections
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results/survival_cpu.json", ROOT / "docs/survival.md"
BEGIN = "<!-- survived: written by `python -m experiments.survive tables` from results/ -->\n"
END = "<!-- end of survived -->"
TINY = ("--config=configs/digits.py", "--config.model.image_size=8", "--config.model.width=16",
        "--config.model.depth=2", "--config.model.heads=2", "--config.batch_size=16",
        "--config.eval_batch_size=184", "--config.optim.warmup_steps=5")


def environment(directory: pathlib.Path, devices: int) -> dict:
  """Returns environment variables for fast starts, which take most of the time: few optimisations,
  and a compilation cache."""
  return os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1",
      "XLA_FLAGS": "--xla_backend_optimization_level=0 "
                   f"--xla_force_host_platform_device_count={devices}"}


def start(arguments, directory: pathlib.Path, devices: int = 1) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, "main.py", *arguments], cwd=ROOT, text=True,
                          env=environment(directory, devices), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)


def read_until(process: subprocess.Popen, words) -> str:
  """Returns the first line of a process's output that contains one of the words."""
  lines = []
  for line in process.stdout:
    lines.append(line)
    if any(word in line for word in words):
      return line
  raise RuntimeError(f"exit code {process.wait()} before {words}: {''.join(lines[-5:])}")


def kill(processes):
  for process in processes:
    process.kill()
  for process in processes:
    process.communicate()


class Reader:
  """Reads the checkpoints of a workdir as main.py would, without changing anything."""

  def __init__(self, workdir: pathlib.Path):
    from ml_collections import FrozenConfigDict

    from vitcompact.train import build

    config = json.loads((workdir / "config.json").read_text())
    self.workdir, self.run = workdir, build.build(FrozenConfigDict(config))

  def steps(self) -> list[int]:
    return self._opened(lambda store: store.steps())

  def restore(self, step: int) -> tuple:
    """Returns (bytes of every leaf by name, progress)."""
    import jax
    import numpy as np

    from vitcompact import trees

    state, progress = self._opened(
        lambda store: store.restore(step, self.run.shapes, self.run.shardings))
    state = state.replace(key=jax.random.key_data(state.key))
    return {name: np.asarray(leaf).tobytes()
            for name, leaf in trees.named_leaves(state).items()}, progress

  def _opened(self, what):
    from vitcompact.run.checkpoint import Checkpoints

    store = Checkpoints(self.workdir, keep_last=2)
    try:
      return what(store)
    finally:
      store.close()


def try_kills(count: int, directory: pathlib.Path, rng: random.Random) -> dict:
  """Kills main.py `count` times. Returns {what happened: how often}."""
  workdir, counts, reader = directory / "kills", collections.Counter(), None
  arguments = [*TINY, f"--workdir={workdir}", "--config.total_steps=1000000",
               "--config.checkpoint_every=2", "--config.log_every=2"]
  newest, leftovers = 0, collections.Counter()
  for _ in range(count):
    process = start(arguments, directory)
    if newest:
      line = read_until(process, ["resumed at step"])
      counts["restarts"] += 1
      counts["restarts that resumed from the newest"] += f"resumed at step {newest} " in line
    read_until(process, ["val_accuracy"])
    time.sleep(rng.uniform(0, 1))
    visible = [int(path.name) for path in (workdir / "checkpoints").iterdir()
               if path.name.isdecimal()]
    kill([process])
    leftovers.update({path.name.strip("0123456789") for path in
                      (workdir / "checkpoints").iterdir()} - {"", "scores.json"})
    counts["kills"] += 1
    reader = reader or Reader(workdir)
    for step in reader.steps():
      try:
        reader.restore(step)
        counts["checkpoints restored completely"] += 1
      except ValueError as error:
        print(f"step {step}: {error}", flush=True)
        counts["corrupt"] += 1
    newest = max(reader.steps(), default=0)
    counts["lost"] += newest < max(visible, default=0)
  return {"kills": 0, "corrupt": 0, "lost": 0, "restarts": 0,
          "restarts that resumed from the newest": 0, **counts,
          **{f"kills that left {name}": times for name, times in leftovers.items()}}


def try_flips(count: int, directory: pathlib.Path, rng: random.Random) -> dict:
  """Flips `count` bits, one at a time, in the files of one checkpoint. Returns {result: how often}.
  """
  workdir, counts = directory / "flips", collections.Counter()
  process = start([*TINY, f"--workdir={workdir}", "--config.total_steps=1000000",
                   "--config.checkpoint_every=50"], directory)
  read_until(process, ["step 100/"])
  kill([process])
  reader = Reader(workdir)
  step = max(reader.steps())
  good = reader.restore(step)
  files = sorted(path for path in (workdir / "checkpoints").rglob("*") if path.is_file() and
                 path.stat().st_size and path.relative_to(workdir / "checkpoints").parts[0] in
                 (str(step), "scores.json"))
  sizes = [path.stat().st_size for path in files]
  for turn in range(count):   # in turn, each file or each byte is equally likely
    path = rng.choice(files) if turn % 2 else rng.choices(files, sizes)[0]
    raw = path.read_bytes()
    at, bit = rng.randrange(len(raw)), rng.randrange(8)
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1:])
    name = path.relative_to(workdir / "checkpoints")
    try:
      result = "harmless: restored what was saved" if reader.restore(step) == good else "SILENT"
    except ValueError:
      result = "refused"
    except Exception as error:  # what a user would see as a traceback
      result = "refused with a traceback"
      print(f"{name} byte {at} bit {bit}: {type(error).__name__}: {error}", flush=True)
    finally:
      path.write_bytes(raw)
    counts[result] += 1
    if result == "SILENT":
      print(f"{name} byte {at} bit {bit}: restored something else", flush=True)
  if reader.restore(step) != good:
    raise RuntimeError("the checkpoint changed without a flip: the counts are meaningless")
  return {"flips": count, "SILENT": 0, **counts}


def write_folder(directory: pathlib.Path) -> pathlib.Path:
  """Writes digits as class folders of PNG files."""
  import numpy as np
  from PIL import Image

  from vitcompact.data import pipeline

  root = directory / "folder"
  for split, many in (("train", 400), ("val", 100), ("test", 100)):
    images = pipeline.source("digits", split, image_size=8)
    for index in np.linspace(0, len(images), many, endpoint=False).astype(int):  # of every class
      example = images[index]
      path = root / split / str(example["label"]) / f"{index}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.asarray(example["image"])).save(path)
  return root


def free_port() -> int:
  with socket.socket() as server:
    server.bind(("localhost", 0))
    return server.getsockname()[1]


def group(arguments, directory, processes: int, devices: int) -> list[subprocess.Popen]:
  """Starts main.py in several processes that form one run."""
  if processes == 1:
    return [start(arguments, directory, devices)]
  shared = [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
  return [start([*arguments, *shared, f"--process_id={index}"], directory, devices)
          for index in range(processes)]


def last_line(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


def interrupt(running, how: str):
  """Ends a run with kill -9 to all of its processes, or with SIGTERM to the last one, after which
  all exit with 75."""
  if how == "kill -9":
    return kill(running)
  running[-1].terminate()
  outputs = [process.communicate()[0] for process in running]
  if any(process.returncode != 75 for process in running):
    raise RuntimeError(f"SIGTERM ended with {[process.returncode for process in running]}: "
                       f"{outputs[0][-500:]}")


def resumes_exactly(name: str, arguments, directory, processes: int, devices: int,
                    how: str) -> bool:
  """Returns whether a run of 40 steps that is interrupted after step 21 and resumed ends with
  exactly the bits of an uninterrupted one."""
  arguments = [*TINY, "--config.total_steps=40", "--config.checkpoint_every=20",
               "--config.log_every=1", *arguments]
  ends = []
  for stops in (False, True):
    workdir = directory / f"{name}_{'twice' if stops else 'once'}"
    call = [*arguments, f"--workdir={workdir}"]
    if stops:
      running = group(call, directory, processes, devices)
      read_until(running[0], ["step 21/40"])
      interrupt(running, how)
      if (workdir / "checkpoints" / "40").exists():
        raise RuntimeError(f"{name}: interrupted too late, the run had already finished")
    running = group(call, directory, processes, devices)
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
      raise RuntimeError(f"{name}: {outputs[0][-500:]}")
    meta = json.loads((workdir / "checkpoints/40/meta/metadata").read_text())
    ends.append((meta["leaves"], meta["progress"], last_line(workdir)))
  return ends[0] == ends[1]


def try_resume(directory: pathlib.Path) -> dict:
  folder = write_folder(directory)
  digits = ["--config.data.name=digits"]
  images = [f"--config.data.name=folder:{folder}", "--config.data.augment=randaugment",
            "--config.eval_batch_size=96"]
  cases = [("digits", digits, 0, 1, 1, "kill -9"), ("digits", digits, 2, 1, 8, "kill -9"),
           ("folder", images, 0, 1, 8, "kill -9"), ("folder", images, 2, 1, 1, "SIGTERM"),
           ("digits", digits, 0, 2, 1, "SIGTERM"), ("folder", images, 2, 2, 4, "kill -9")]
  out = {}
  for data, arguments, workers, processes, devices, how in cases:
    name = f"{how}: {data}, {workers} workers, {processes} x {devices} devices"
    same = resumes_exactly(re.sub(r"\W+", "_", name),
                           [*arguments, f"--config.data.workers={workers}"], directory, processes,
                           devices, how)
    out[name] = "the same bits" if same else "OTHER BITS"
    print(f"{name}: {out[name]}", flush=True)
  return out


def load() -> dict:
  """Returns {test: its results}, of all tests that were run."""
  return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(test: str, seed: int, counts: dict):
  """Replaces the results of one test in the file."""
  from vitcompact import bench, receipt

  command = shlex.join(["python", "-m", "experiments.survive", *sys.argv[1:]])
  found = {**receipt.environment(), "command": command, "processor": bench.processor(),
           "seed": seed, "counts": counts}
  RESULTS.write_text(json.dumps({**load(), test: found}, indent=1) + "\n")


def described(found: dict) -> str:
  """Returns the part of docs/survival.md with the results."""
  sentences = {"kills": _kills, "flips": _flips, "resume": _resume}
  lines = []
  for test, sentence in sentences.items():
    if test not in found:
      lines.append(f"* `--{test}`: not run.")
      continue
    about = found[test]
    lines.append(f"* {sentence(about['counts'])} (`{about['command']}`, seed {about['seed']}, "
                 f"{about['processor']}, jax {about['jax']}, commit {about['commit']})")
  return "\n".join(lines)


def _kills(counts: dict) -> str:
  return (f"After {counts['kills']} kills, {counts['lost']} checkpoints were lost and "
          f"{counts['corrupt']} were damaged; {counts['restarts that resumed from the newest']} of "
          f"{counts['restarts']} restarts resumed from the newest.")


def _flips(counts: dict) -> str:
  refused, traceback, harmless = (counts.get(what, 0) for what in (
      "refused", "refused with a traceback", "harmless: restored what was saved"))
  return (f"Of {counts['flips']} flipped bits, {refused} were refused; with {harmless} the saved "
          f"state was restored bit for bit, with {counts['SILENT']} something else was restored, "
          f"and with {traceback} restoring ended in a traceback.")


def _resume(counts: dict) -> str:
  same = sum(result == "the same bits" for result in counts.values())
  return (f"{same} of {len(counts)} interrupted runs ended with the same bits as uninterrupted "
          f"ones (processes x devices): {'; '.join(counts)}.")


def write_page():
  text = PAGE.read_text()
  start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
  PAGE.write_text(f"{text[:start]}{described(load())}\n{text[stop:]}")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", nargs="?", choices=["run", "tables"], default="run")
  parser.add_argument("--kills", type=int, default=0)
  parser.add_argument("--flips", type=int, default=0)
  parser.add_argument("--resume", action="store_true")
  parser.add_argument("--seed", type=int, default=0, help="of the random moments and bits")
  arguments = parser.parse_args()
  if arguments.what == "tables":
    return write_page()
  if not (arguments.kills or arguments.flips or arguments.resume):
    parser.error("give --kills, --flips or --resume")
  os.environ.update(environment(pathlib.Path(tempfile.gettempdir()), 1))
  directory = pathlib.Path(tempfile.mkdtemp(prefix="survive"))
  rng, results = random.Random(arguments.seed), {}

  def record(test, counts):
    save(test, arguments.seed, counts)
    results.update(counts)

  try:
    if arguments.kills:
      record("kills", try_kills(arguments.kills, directory, rng))
    if arguments.flips:
      record("flips", try_flips(arguments.flips, directory, rng))
    if arguments.resume:
      record("resume", try_resume(directory))
  finally:
    shutil.rmtree(directory, ignore_errors=True)
  print("\n".join(f"{what}: {value}" for what, value in results.items()))
  bad = ("corrupt", "lost", "SILENT", "refused with a traceback")
  sys.exit(any(results.get(what) for what in bad) or "OTHER BITS" in results.values())


if __name__ == "__main__":
  main()
