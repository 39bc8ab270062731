"""What tests of runs read from their workdirs and states."""
import json

import jax
import numpy as np

from vitcompact import trees


def lines(directory):
  return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def bits(state):
  state = state.replace(key=jax.random.key_data(state.key))
  return {name: np.asarray(leaf).tobytes() for name, leaf in trees.named_leaves(state).items()}


def contents(directory):
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
