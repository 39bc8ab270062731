"""Reads results: files, cases, ratios of the same rounds."""
import json
import pathlib
from collections.abc import Mapping

from vitcompact import bench

FOLDER = pathlib.Path(__file__).parent.parent.parent / "results"
Rows = Mapping[str, dict]   # {name: row} of one case


def load(suite: str, platform: str, folder: pathlib.Path = FOLDER) -> dict | None:
  """Results of a suite on a platform, or None where it was not measured."""
  path = folder / f"{suite}_{platform}.json"
  return json.loads(path.read_text()) if path.exists() else None


def cases(results: dict, *keys: str) -> dict[tuple, Rows]:
  """{values of the keys: rows by name}, in the order in which they were measured."""
  out = {}
  for row in results["rows"]:
    out.setdefault(tuple(row[key] for key in keys), {})[row["name"]] = row
  return out


def speed(rows: Rows, name: str, over: str) -> tuple[float, float, float] | None:
  """How much faster one is than another, (median, least, most) over rounds; None: not measured."""
  pair = [rows[key]["rounds"] if key in rows else None for key in (over, name)]
  return None if None in pair else bench.ratio(*pair)


def best(rows: Rows, *names: str) -> str:
  """The fastest of these that were measured; "" if none was."""
  known = {name: rows[name]["seconds"] for name in names if name in rows and rows[name]["seconds"]}
  return min(known, key=known.get, default="")


def best_dense(rows: Rows) -> str:
  """Of an attention layer: the fastest of our dense ones."""
  return best(rows, *(name for name in rows if name.startswith("dense")))


def accuracies(folder: pathlib.Path = FOLDER) -> dict[str, list[dict]]:
  """{name of a plan: rows} of every results/accuracy_*.json."""
  out = {}
  for path in sorted(folder.glob("accuracy_*.json")):
    for row in json.loads(path.read_text())["rows"]:
      out.setdefault(row["name"], []).append(row)
  return out
