"""Reads results: files, cases, ratios of the same rounds."""
import json
import pathlib

from vitcompact import bench

FOLDER = pathlib.Path(__file__).parent.parent.parent / "results"


class Rows(dict):
  """{name: row} of one case; a name that has none was not measured, and says so as others do."""

  def __missing__(self, name: str) -> dict:
    return {"seconds": None, "rounds": None}


def load(suite: str, platform: str, folder: pathlib.Path = FOLDER) -> dict | None:
  """Results of a suite on a platform, or None where it was not measured."""
  path = folder / f"{suite}_{platform}.json"
  return read(path) if path.exists() else None


def read(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} holds no results: {error}; measure again") from None


def cases(results: dict, *keys: str) -> dict[tuple, Rows]:
  """{values of the keys: rows by name}, in the order in which they were measured."""
  out = {}
  for row in results["rows"]:
    out.setdefault(tuple(row[key] for key in keys), Rows())[row["name"]] = row
  return out


def speed(rows: Rows, name: str, over: str) -> tuple[float, float, float] | None:
  """How much faster one is than another, (median, least, most) over rounds; None: not measured."""
  pair = [rows[key]["rounds"] for key in (over, name)]
  return None if None in pair else bench.ratio(*pair)


def fewer_macs(rows: Rows, name: str) -> float | None:
  """MACs of the dense one over those of this one; None: not counted."""
  return over(rows["dense"].get("macs"), rows[name].get("macs"))


def over(first: float | None, other: float | None) -> float | None:
  """Their quotient; None where one was not measured."""
  return None if first is None or other is None else first / other


def best(rows: Rows, *names: str) -> str:
  """The fastest of these that were measured; "" if none was."""
  known = {name: rows[name]["seconds"] for name in names if rows[name]["seconds"]}
  return min(known, key=known.get, default="")


def best_dense(rows: Rows) -> str:
  """Of an attention layer: the fastest of our dense ones."""
  return best(rows, *(name for name in rows if name.startswith("dense")))


def accuracies(folder: pathlib.Path = FOLDER) -> dict[str, list[dict]]:
  """{name of a plan: a row of each data set}, of all results/accuracy_*.json that with most steps.

  A row without steps is of as many as its config has.
  """
  rows = [row for path in sorted(folder.glob("accuracy_*.json"))
          for row in json.loads(path.read_text())["rows"]]
  out: dict[str, dict[str, dict]] = {}
  for row in sorted(rows, key=lambda row: row.get("steps") or 0):
    out.setdefault(row["name"], {})[row["data"]] = row
  return {name: list(by_data.values()) for name, by_data in out.items()}
