"""Compares goals with measurements. Ratios are between measurements of the same rounds."""
import pathlib
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from experiments.benchmarks import results
from experiments.benchmarks.exits import RUNTIMES as EXITS
from experiments.benchmarks.results import (
  Rows,
  best,
  best_dense,
  cases,
  macs_ratio,
  quotient,
  speed,
)

SLACK = 1.05   # a median within this factor of the target may have missed it by noise
TORCH_F32 = ("torch f32", "torch f32, SDPA")
ALL = "heads + ffn both + EViT 0.7"
MODEL_TARGETS = {"heads": 1.10, "ffn": 1.08, "ffn both": 1.18, "heads + ffn": 1.22,
                 "EViT 0.7": 1.45, "EViT 0.5": 1.75, "ToMe 13": 1.5, ALL: 2.0}


class Goal(NamedTuple):
  """A target. least: the measured value should be at least the target, otherwise at most.
  measured: None if it was not measured."""
  what: str
  measured: float | None
  target: float
  least: bool = True

  @property
  def verdict(self) -> str:
    if self.measured is None:
      return "not measured"
    more, less = (self.measured, self.target) if self.least else (self.target, self.measured)
    return "yes" if more >= less else "within 5%" if SLACK * more >= less else "NO"


def table(folder: pathlib.Path = results.FOLDER) -> str:
  lines = ["| goal | measured | target | met |", "|---|---:|---:|---|"]
  for platform, suites in SUITES.items():
    for suite, make in suites.items():
      if (found := results.load(suite, platform, folder)) is None:
        lines.append(f"| {platform}, {suite} | | | not measured |")
        continue
      for goal in make(found):
        measured = "" if goal.measured is None else f"{goal.measured:.2f}"
        sign = ">=" if goal.least else "<="
        lines.append(f"| {platform}, {goal.what} | {measured} | {sign} {goal.target:g} | "
                     f"{goal.verdict} |")
  return "\n".join(lines)


def _median(rows: Rows, name: str, other: str) -> float | None:
  ratio = speed(rows, name, other)
  return ratio and ratio[0]


def gemm_goals(found: dict) -> Iterator[Goal]:
  """Yields the goals of matrix products, which bound every ratio to PyTorch."""
  rows = cases(found, "what").get(("FFN forward and backward",), results.Rows())
  yield Goal("FFN forward and backward, over three times its forward products",
             _median(rows, "three times the products", "ours"), 1.15, least=False)


def model_goals(found: dict) -> Iterator[Goal]:
  for (batch,), rows in cases(found, "batch").items():
    torch = best(rows, *TORCH_F32)
    linen = _median(rows, "dense", "plain Linen")
    yield Goal(f"dense over plain Linen, batch {batch}", linen, 1.05)
    yield Goal(f"dense over torch f32, batch {batch}", _median(rows, "dense", torch), 1.9)
    for name, target in MODEL_TARGETS.items():
      if rows[name].get("reason", "").startswith("not at batch"):
        continue
      yield Goal(f"{name}, batch {batch}", _median(rows, name, "dense"), target)
    yield Goal(f"{ALL} over torch f32, batch {batch}", _median(rows, ALL, torch), 3.5)
    yield Goal(f"{ALL} over torch bf16, batch {batch}", _median(rows, ALL, "torch bf16"), 1)
    yield Goal(f"EViT 0.7, time's ratio of MACs' ratio, batch {batch}",
               quotient(_median(rows, "EViT 0.7", "dense"), macs_ratio(rows, "EViT 0.7")), 0.93)


def layer_goals(found: dict) -> Iterator[Goal]:
  by_case = {(tokens, which): rows
             for (tokens, which), rows in cases(found, "tokens", "pass").items()}
  targets = {
      "forward": {"hMHSA": {197: 1.3, 577: 1.3, 1025: 1.3, 4097: 1.35},
                  "hMHSA, logits site": {197: 0.9, 577: 0.9, 1025: 0.9},
                  "block-sparse 25%": {577: 1.4, 1025: 1.7, 4097: 2.3}},
      "forward and backward": {"hMHSA": {197: 1.3, 1025: 1.4}, "block-sparse 25%": {1025: 1.3}}}
  for which, names in targets.items():
    for name, by_tokens in names.items():
      for tokens, target in by_tokens.items():
        if rows := by_case.get((tokens, which)):
          yield Goal(f"{name} layer, {tokens} tokens, {which}",
                     _median(rows, name, best_dense(rows)), target)
  for tokens in (197, 577, 1025):
    if rows := by_case.get((tokens, "forward")):
      base, other = rows[best_dense(rows)], rows["hMHSA, logits site"]
      yield Goal(f"hMHSA, logits site, temporary memory over dense, {tokens} tokens",
                 quotient(other.get("temporary_bytes"), base.get("temporary_bytes")), 1.5,
                 least=False)
  if (1025, "forward") in by_case and (4097, "forward") in by_case:
    yield from _growth(by_case)


def _growth(by_case) -> Iterator[Goal]:
  for name, target in (("dense", 3.0), ("hMHSA", 2.9), ("block-sparse 25%", 2.3)):
    per_token = [quotient(row["seconds"], row.get("tokens"))
                 for row in _short_and_long(by_case, name, "forward")]
    yield Goal(f"{name}: time per token, 4097 over 1025", quotient(per_token[1], per_token[0]),
               target, least=False)
  for which, target in (("forward", 3.0), ("forward and backward", 6.0)):
    for name in ("dense", "hMHSA", "block-sparse 25%"):
      short, long = _short_and_long(by_case, name, which)
      yield Goal(f"{name}: temporary memory over input and output, 4097 tokens, {which}",
                 quotient(long.get("temporary_bytes"), long.get("inputs_and_outputs_bytes")),
                 target, least=False)
      yield Goal(f"{name}: temporary memory, 4097 over 1025 tokens, {which}",
                 quotient(long.get("temporary_bytes"), short.get("temporary_bytes")), 4.6,
                 least=False)


def _short_and_long(by_case, name: str, which: str) -> list[dict]:
  """Returns the rows at 1025 and at 4097 tokens; "dense" is the fastest of our dense layers."""
  out = []
  for tokens in (1025, 4097):
    rows = by_case[tokens, which]
    out.append(rows[best_dense(rows) if name == "dense" else name])
  return out


def train_goals(found: dict) -> Iterator[Goal]:
  rows, = cases(found, "batch").values()
  yield Goal("step over plain Linen + Optax", _median(rows, "dense", "plain Linen + Optax"), 1.2)
  yield Goal("step over torch f32", _median(rows, "dense", best(rows, *TORCH_F32)), 1.6)
  yield Goal("step, ffn, one bare branch", _median(rows, "ffn, one bare branch", "dense"), 1.13)
  for name, row in rows.items():
    if "macs" in row and name != "dense":
      yield Goal(f"step, {name}: time's ratio of MACs' ratio",
                 quotient(_median(rows, name, "dense"), macs_ratio(rows, name)), 0.9)


def tokens_goals(found: dict) -> Iterator[Goal]:
  for (tokens,), rows in cases(found, "tokens").items():
    yield Goal(f"block-sparse in a network, {tokens} tokens",
               _median(rows, "attention", "dense"), 0.95)


def startup_goals(found: dict) -> Iterator[Goal]:
  by_what = {what: rows for (what,), rows in cases(found, "what").items()}
  pair = [by_what["import"][name]["rounds"] for name in ("and every name of it", "jax and flax")]
  more = None if None in pair else statistics.median(a - b for a, b in zip(*pair, strict=True))
  yield Goal("seconds to import every name, beyond jax and flax", more, 0.3, least=False)
  for what in ("compile a forward", "compile a training step"):
    longer = _median(by_what[what], "plain Linen", "ours")
    yield Goal(f"{what}, ours over plain Linen", longer, 1.25, least=False)
  yield Goal("start from the persistent cache over a cold one",
             _median(by_what["a first forward, and a training step compiled"], "cold", "warm"), 0.3,
             least=False)


def data_goals(found: dict) -> Iterator[Goal]:
  by_what = {what: rows for (what,), rows in cases(found, "what").items()}
  yield Goal("pipeline over a PIL loop, per core",
             _median(by_what["CPU seconds of a batch"], "threads", "PIL loop"), 0.95)
  yield Goal("two workers over one, wall time",
             _median(by_what["wall seconds of a batch"], "2 workers", "1 worker"), 1.8)


def device_model_goals(found: dict) -> Iterator[Goal]:
  for (batch,), rows in cases(found, "batch").items():
    yield Goal(f"dense over torch.compile bf16, batch {batch}",
               _median(rows, "dense", "torch.compile bf16"), 0.95)
    for name, target in (("EViT 0.7", 1.35), (ALL, 1.6)):
      yield Goal(f"{name}, batch {batch}", _median(rows, name, "dense"), target)


def device_layer_goals(found: dict) -> Iterator[Goal]:
  targets = {1025: {"hMHSA": 1.25, "block-sparse 25%": 1.4},
             4097: {"hMHSA": 1.25, "block-sparse 25%": 2.0}}
  for (tokens, which), rows in cases(found, "tokens", "pass").items():
    for name, target in targets.get(tokens, {}).items():
      if which == "forward":
        yield Goal(f"{name} layer over cuDNN's dense, {tokens} tokens",
                   _median(rows, name, "dense, cudnn"), target)


MOST = "heads + ffn both + EViT 0.7"
# (dtype, runtimes, dense peers of the same precision)
EXIT_PEERS = (
    ("float32", ("XLA", "ONNX Runtime", "OpenVINO"),
     ("torch f32", "torch.compile f32", "ONNX Runtime: dense", "OpenVINO: dense")),
    ("bfloat16", ("OpenVINO, bfloat16",), ("torch bf16", "OpenVINO, bfloat16: dense")))


def exits_goals(found: dict) -> Iterator[Goal]:
  """Yields two kinds of goals: a plan's saving in MACs is a saving in time in every runtime, and
  the fastest runtime beats every dense peer."""
  for (model, side), rows in cases(found, "model", "image_size").items():
    plans = dict.fromkeys(name.partition(": ")[2] for name in rows if ": " in name)
    for name in EXITS.values():
      for plan in plans:
        if plan == "dense":
          continue
        ratio = _median(rows, f"{name}: {plan}", f"{name}: dense")
        macs = quotient(rows[f"{name}: dense"].get("macs"), rows[f"{name}: {plan}"].get("macs"))
        if plan.startswith("block"):
          yield Goal(f"{model} at {side}, {plan} in {name}", ratio, 1.3)
        else:
          yield Goal(f"{model} at {side}, {plan} in {name}, of the MACs' ratio",
                     quotient(ratio, macs), 0.95)
    for dtype, names, peers in EXIT_PEERS:
      if MOST in plans:
        peer, exit = best(rows, *peers), best(rows, *(f"{name}: {MOST}" for name in names))
        yield Goal(f"{MOST} in the fastest exit, over the fastest dense peer, {dtype}",
                   _median(rows, exit, peer), 2.0)


def methods_goals(found: dict) -> Iterator[Goal]:
  """Yields the goals of methods: where a method has enough tokens, it saves as much time as MACs.
  """
  for (model, pixels), rows in cases(found, "model", "image_size").items():
    for name in ("HeadPruning", "InLine", "ChannelAttention", "BiFormer"):
      if name in rows and (name == "HeadPruning" or pixels >= 512):
        yield Goal(f"{name} in {model} at {pixels}, time's ratio of MACs' ratio",
                   quotient(_median(rows, name, "dense"), macs_ratio(rows, name)), 0.9)
    if "FastPath" in rows:
      yield Goal(f"FastPath in {model} at {pixels}", _median(rows, "FastPath", "dense"), 1.15)


SUITES = {
    "cpu": {"gemm": gemm_goals, "model": model_goals, "exits": exits_goals, "layer": layer_goals,
            "train": train_goals, "tokens": tokens_goals, "methods": methods_goals,
            "startup": startup_goals, "data": data_goals},
    "gpu": {"model": device_model_goals, "layer": device_layer_goals}}
