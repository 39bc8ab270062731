"""Reads result files, groups their rows into cases, and computes ratios within rounds."""
import json
import pathlib

from vitcompact import bench

FOLDER = pathlib.Path(__file__).parent.parent.parent / "results"


class Rows(dict):
  """{name: row} of one case; a missing name gets the row of a candidate that was not measured."""

  def __missing__(self, name: str) -> dict:
    return {"seconds": None, "rounds": None}


def load(suite: str, platform: str, folder: pathlib.Path = FOLDER) -> dict | None:
  """Returns the results of a suite on a platform, or None if it was not measured."""
  path = folder / f"{suite}_{platform}.json"
  return read(path) if path.exists() else None


def read(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} holds no results: {error}; measure again") from None


def cases(results: dict, *keys: str) -> dict[tuple, Rows]:
  """Returns {values of the keys: rows by name}, in the order of measurement."""
  out = {}
  for row in results["rows"]:
    out.setdefault(tuple(row[key] for key in keys), Rows())[row["name"]] = row
  return out


def speed(rows: Rows, name: str, over: str) -> tuple[float, float, float] | None:
  """Returns the speedup of `name` over `over` as (median, minimum, maximum) over rounds, or None if
  one was not measured."""
  pair = [rows[key]["rounds"] for key in (over, name)]
  return None if None in pair else bench.ratio(*pair)


def macs_ratio(rows: Rows, name: str) -> float | None:
  """Returns the dense row's MACs over those of `name`, or None if they were not counted."""
  return quotient(rows["dense"].get("macs"), rows[name].get("macs"))


def quotient(first: float | None, other: float | None) -> float | None:
  """Returns the quotient of two measurements, or None if one is missing."""
  return None if first is None or other is None else first / other


def best(rows: Rows, *names: str) -> str:
  """Returns the fastest of these names that were measured, or "" if none was."""
  known = {name: rows[name]["seconds"] for name in names if rows[name]["seconds"]}
  return min(known, key=known.get, default="")


def best_dense(rows: Rows) -> str:
  """Returns the name of our fastest dense attention layer."""
  return best(rows, *(name for name in rows if name.startswith("dense")))


def accuracies(folder: pathlib.Path = FOLDER) -> dict[str, list[dict]]:
  """Returns {name of a plan: one row per data set}, from all results/accuracy_*.json.

  Of several rows for one data set, that with the most steps is taken. A row without steps used
  those of its config.
  """
  rows = [row for path in sorted(folder.glob("accuracy_*.json"))
          for row in json.loads(path.read_text())["rows"]]
  out: dict[str, dict[str, dict]] = {}
  for row in sorted(rows, key=lambda row: row.get("steps") or 0):
    out.setdefault(row["name"], {})[row["data"]] = row
  return {name: list(by_data.values()) for name, by_data in out.items()}
