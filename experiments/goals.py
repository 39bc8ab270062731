"""Compares the results with the goals that were set for the path before anything was measured.

  python -m experiments.goals        # into results/README.md, from results/
"""
import json
import statistics
from collections.abc import Callable
from typing import NamedTuple

from experiments import accuracy, compaction, fine_tuning, path_costs

PAGE = compaction.ROOT / "results/README.md"
BEGIN = "<!-- goals: written by `python -m experiments.goals` from results/ -->\n"
END = "<!-- end of goals -->"


class Row(NamedTuple):
  """what: was measured; goal: in words; reached: the figure; met: whether it reaches the goal."""
  what: str
  goal: str
  reached: str
  met: bool


def lost(folds: list[dict], what: str, name: str, most: float) -> Row:
  """Returns the row of a compacted model that may lose at most `most` points."""
  rows = [fold["models"][name] for fold in folds if name in fold["models"]]
  gap = 100 * sum(row["gained"] - row["lost"] for row in rows) / sum(row["images"] for row in rows)
  models = f", {len(rows)} dense model{'s' * (len(rows) > 1)}"
  return Row(what, f"at most {most} points lost",
             f"{compaction.difference(rows)}{models}", gap >= -most)


def trained(what: str, name: str, most: float) -> Row:
  """Returns the row of a setting of experiments.fine_tuning."""
  gaps = fine_tuning.differences(fine_tuning.load(), name)
  gap = statistics.mean(gaps)
  return Row(what, f"at most {most} points lost",
             f"{gap:+.2f} ± {accuracy.interval(gaps):.2f}, {len(gaps)} seeds", gap >= -most)


def bounded(what: str, goal: str, values, fits: Callable[[float], bool]) -> Row:
  values = list(values)
  met = sum(map(fits, values))
  return Row(what, goal, f"{min(values):.2f} to {max(values):.2f}, {met} of {len(values)} reach it",
             met == len(values))


def rows() -> list[Row]:
  digits, garments = (compaction.load(compaction.results_of(name))
                      for name in ("digits", "fashion_mnist"))
  uniform, measured = "uniform, from images", "measured, {} %"
  where = "Fashion-MNIST, before training: "
  found = [
      lost(digits, "digits, before training: half of the heads and factors in every block",
           uniform, 4),
      lost(garments, f"{where}half of the heads and factors in every block", uniform, 1.5),
      lost(garments, f"{where}measured plan of 80 %", measured.format(80), 0.3),
      lost(garments, f"{where}measured plan of 50 %", measured.format(50), 1)]
  for name, folds in (("digits", digits), ("Fashion-MNIST", garments)):
    for share, most in ((80, 0.3), (50, 0.5)):
      found.append(lost(folds, f"{name}, distilled for a tenth of the steps: measured plan of "
                        f"{share} %", f"{measured.format(share)}, distilled", most))
    gaps = [100 * (fold["models"]["measured, 50 %, distilled"]["accuracy"]
                   - fold["models"]["uniform, 50 %, distilled"]["accuracy"]) for fold in folds]
    gap = statistics.mean(gaps)
    found.append(Row(f"{name}, distilled: measured plan of 50 %, compared with the uniform one",
                     "at least 2 points better", f"{gap:+.2f}", gap >= 2))
  for words, name in (("a tenth of the steps", "distilled"),
                      ("half of the steps", "distilled half as long"),
                      ("half of the steps, on mixed images",
                       "distilled half as long, on mixed images"),
                      ("all of the steps", "distilled as long")):
    found.append(lost(garments, "Fashion-MNIST, half of the heads and factors, distilled for "
                      f"{words}", f"{uniform}, {name}", 0.4))
  short = "Fashion-MNIST, distilled for a fiftieth of the steps: "
  found += [
      trained(f"{short}attention to a quarter of the blocks",
              "Sparsifiner, by block of 2 x 2, keep 0.25", 0.4),
      trained(f"{short}attention to a quarter of the pairs", "Sparsifiner, by token, keep 0.25",
              0.4),
      trained(f"{short}measured plan of 50 %", "measured plan of 50 %", 1),
      bounded("predicted and measured KL of random plans, rank correlation", "at least 0.9",
              [fold["spearman"] for fold in (*digits, *garments) if "spearman" in fold],
              lambda rank: rank >= 0.9),
      bounded("time of a plan for a speedup, measured / predicted", "within 10 %",
              [fold["timed"]["timed_ms"] / fold["timed"]["predicted_ms"] for fold in garments
               if "timed" in fold], lambda ratio: 0.9 <= ratio <= 1.1)]
  steps = json.loads(path_costs.RESULTS.read_text())["steps"]
  for name, most in (("statistics", 3), ("quick", 6), ("compact", 5)):
    passes = steps[name]["passes"]
    found.append(Row(f"DeiT-S: {path_costs.SHOWN[name]}", f"at most {most} forward passes",
                     f"{passes:.2f}", passes <= most))
  peak = max(step["peak_gib"] for step in steps.values())
  found.append(Row("DeiT-S: memory of these", "at most 6 GiB", f"{peak:.1f} GiB", peak <= 6))
  return found


def table() -> str:
  return "\n".join(["| measured | goal | reached | |", "|---|---|---|---|", *(
      f"| {row.what} | {row.goal} | {row.reached} | {'met' if row.met else '**missed**'} |"
      for row in rows())])


def main():
  text = PAGE.read_text()
  start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
  PAGE.write_text(f"{text[:start]}{table()}\n{text[stop:]}")


if __name__ == "__main__":
  main()
