"""Settings that every test shares: eight fake CPU devices, no silent rank promotion, few passes.

XLA optimises little here: tests compile much and run short, and the claims they check hold at any
level of optimisation. What one process compiled, the others of the same call of pytest read: its
workers and what tests start.
"""
import ctypes
import gc
import os
import pathlib
import shutil
import tempfile

# Tracing makes millions of small objects that live: collecting at every 700 of them was a tenth.
gc.set_threshold(200_000, 20, 50)
# Read by XLA when the first device is asked for, so before any test imports the library. A worker
# has those of the process that started it: each is there once (tests/old/common.py compares them).
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
         "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
GIVEN = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*GIVEN, *(flag for flag in FLAGS if flag not in GIVEN)])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  COMPILED = tempfile.mkdtemp(prefix="vitcompact-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

from tests.hub_server import server  # noqa: E402, F401
from tests.tiny_run import built, built_on_one, config, shared, uninterrupted  # noqa: E402, F401


def pytest_unconfigure():
  """Of the process that made the folder, after its workers have ended."""
  gc.freeze()   # what is left ends with the process: pytest would look through gigabytes of it
  if COMPILED:
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forgets(request):
  """Above 6 GB, what a process compiled is dropped after a module. Not after those of whole runs: a
  worker has died of a segmentation fault there, with threads of an ended run still about."""
  yield
  if request.path.parent.name == "run":
    return
  statm = pathlib.Path("/proc/self/statm")    # of Linux
  if not statm.exists():
    return
  if int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > 6e9:
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)   # glibc keeps what was freed
    if trim:
      trim(0)
