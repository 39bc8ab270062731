"""Functions shared by make_old.py and test_old.py."""
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import trees

# A flag added to tests/conftest.py since then that changes the last bit.
NEW_FLAG = "--xla_cpu_use_fusion_emitters=false"


def images(model):
  """Returns three random images from the one generator whose numbers NumPy never changes."""
  height, width = np.broadcast_to(model.image_size, 2).tolist()
  draws = np.random.RandomState(0).standard_normal((3, height, width, model.in_chans))
  return jnp.asarray(draws, jnp.float32)


def jit_without_the_new_flag(jit):
  """Returns a jax.jit that compiles with the flags in made.json."""
  def same(*args, compiler_options=None, **kwargs):
    options = {**(compiler_options or {}), "xla_cpu_use_fusion_emitters": True}
    return jit(*args, compiler_options=options, **kwargs)
  return same


def machine():
  """Returns what the last bit of a training step depends on besides our code."""
  path = pathlib.Path("/proc/cpuinfo")
  fields = dict(re.findall(r"^(.+?)\s*:[ \t]*(.*)$", path.read_text() if path.exists() else "",
                           re.MULTILINE))
  sets = [flag for flag in fields.get("flags", "").split() if re.match("sse|avx|fma|amx", flag)]
  return {"processor": [fields.get(key, "") for key in ("model name", "cpu family", "model")],
          "instruction_sets": sorted(sets), "jax": jax.__version__,
          "xla_flags": sorted(set(os.environ["XLA_FLAGS"].split()) - {NEW_FLAG})}


def variables_of(state):
  """Returns {name: array} of everything in a state that belongs to the model."""
  fields = ("params", "batch_stats", "ema_params", "ema_batch_stats")
  return {name: np.asarray(leaf) for name, leaf in
          trees.named_leaves({field: getattr(state, field) for field in fields}).items()}
