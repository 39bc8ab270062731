"""Measures how the savings of methods, and what they cost in accuracy, grow with resolution.

  python -m experiments.resolution run --workdir runs/resolution   # about 20 minutes on one core
  python -m experiments.resolution tables           # into results/README.md, from results/

The dense model of Fashion-MNIST (results/fashion_mnist_dense.safetensors, 28 pixels) is fine-tuned
at 56 pixels for a fortieth of its steps, at a tenth of its learning rate: images are
enlarged, and so is the grid of position embeddings. At each size, every method is then fitted by
vc.compact to 512 training images, without training, folded, and evaluated on the 10,000 test
images, paired with the dense model of that size image by image. Its time is that of a batch on one
core, in rounds in which it takes turns with the dense model. The test split chooses nothing.
"""
import argparse
import json
import os
import pathlib
import warnings

import vitcompact as vc
from experiments.compaction import DATA, Judge, difference, images_of, train_or_find
from vitcompact import bench, convert
from vitcompact.receipt import environment

ROOT = pathlib.Path(__file__).parent.parent
FILE, PAGE = ROOT / "results/resolution_fashion_mnist.json", ROOT / "results/README.md"
BEGIN = "<!-- resolution: written by `python -m experiments.resolution tables` from results/ -->\n"
END = "<!-- end of resolution -->"
SIZES = (28, 56)         # pixels
IMAGES, TIMED, TESTED, ROUNDS = 512, 16, 100, 5
SHARE, RATE = 40, 10     # of the dense model's steps and learning rate
EVERY = 25               # ToMe merges one of so many tokens in each block


def plans(tokens: int) -> dict[str, vc.Plan]:
  return {
      "hMHSA, 3 of 6": vc.Plan(heads=vc.HMHSA()),
      "hMHSA + cFFN": vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()),
      "Sparsifiner, a quarter of the blocks of 2 x 2": vc.Plan(attention=vc.Sparsifiner(
          keep=0.25, granularity="block", window=2, min_tokens=0)),
      f"ToMe, a {EVERY}th of the tokens per block": vc.Plan(tokens=vc.ToMe(r=tokens // EVERY)),
      "EViT, keep 0.7 twice": vc.Plan(tokens=vc.EViT(keep=0.7, blocks=(1, 3)))}


def tokens_at(size: int) -> int:
  return (size // 4) ** 2 + 1


def config_at(size: int):
  config = DATA["fashion_mnist"].dense()
  config.model.image_size = size
  config.data.eval_crop = 1.0   # as at 28 pixels: images have no margin to cut off
  return config


def fine_tuned(size: int, workdir: pathlib.Path) -> pathlib.Path:
  """Returns the file of the dense model at a size, after training it if it is missing."""
  dense = DATA["fashion_mnist"].file
  config = config_at(size)
  if size == SIZES[0]:
    return dense
  start = workdir / f"start at {size}.safetensors"
  if not start.exists():
    vc.save(start, *convert.resized(*vc.load(dense), image_size=size))
  config.init_from = str(start)
  config.total_steps //= SHARE
  config.optim.learning_rate /= RATE
  return train_or_find(config, workdir / f"dense at {size}")


def measured(size: int, workdir: pathlib.Path) -> dict[str, dict]:
  """Returns the rows of a size."""
  config, (model, variables) = config_at(size), vc.load(fine_tuned(size, workdir))
  images = images_of(config, model, "train", IMAGES)
  judge = Judge(config, model, variables, batch=TESTED)
  dense = bench.compiled(model.apply, variables, images[:TIMED])
  rows = {"dense": judge(model, variables)}
  for name, plan in plans(tokens_at(size)).items():
    small, fitted = vc.fold(*vc.compact(model, variables, plan, images))
    program = bench.compiled(small.apply, fitted, images[:TIMED])
    rows[name] = {**judge(small, fitted), "plan": json.loads(plan.to_json()), "rounds":
                  bench.rounds_of({"dense": dense.call, "this": program.call}, rounds=ROUNDS)}
    print(size, name, rows[name], flush=True)
  return rows


def run(workdir: pathlib.Path):
  workdir.mkdir(parents=True, exist_ok=True)
  found = {**environment(), "processor": bench.processor(), "clock": bench.clock_name(),
           "load": os.getloadavg()[0], "sizes": {}}
  for size in SIZES:
    found["sizes"][str(size)] = measured(size, workdir)
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict) -> str:
  lines = ["| pixels | tokens | setting, in every block | MACs | speed, dense = 1 | test accuracy "
           "| difference from dense, points |", "|---:|---:|---|---:|---:|---:|---:|"]
  for size, rows in found["sizes"].items():
    for name, row in rows.items():
      speed = gap = ""
      if name != "dense":
        middle, low, high = bench.ratio(row["rounds"]["dense"], row["rounds"]["this"])
        speed, gap = f"{middle:.2f}x [{low:.2f}, {high:.2f}]", difference([row])
      lines.append(f"| {size} | {tokens_at(int(size))} | {name} | {100 * row['macs']:.1f} % | "
                   f"{speed} | {100 * row['accuracy']:.2f} % | {gap} |")
  return "\n".join([*lines, "", (
      f"One dense model, {IMAGES} training images, 10,000 test images. Time of {TIMED} images on "
      f"one core of {found['processor']}, {found['clock']} seconds, {ROUNDS} paired rounds (range "
      f"in brackets), load {found['load']:.1f}, commit {found['commit']}.")])


def tables():
  text = PAGE.read_text()
  start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
  PAGE.write_text(f"{text[:start]}{table(json.loads(FILE.read_text()))}\n{text[stop:]}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("what", choices=["run", "tables"])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/resolution"))
  arguments = parser.parse_args()
  if arguments.what == "tables":
    return tables()
  warnings.filterwarnings("ignore", "blocks_|.*are few")
  run(arguments.workdir)


if __name__ == "__main__":
  main()
