"""Settings shared by all tests: eight fake CPU devices, no silent rank promotion, few XLA passes.

XLA optimises little here: tests compile a lot and run briefly, and their claims hold at any
optimisation level. All processes of one pytest call (its workers, and programs that tests start)
share a compilation cache.
"""
import ctypes
import gc
import os
import pathlib
import shutil
import tempfile

# Tracing makes millions of long-lived objects: collecting after every 700 took a tenth of the time.
gc.set_threshold(200_000, 20, 50)
# XLA reads these when the first device is requested, so set them before any test imports the
# library. A worker inherits them: add each only once (tests/old/common.py compares them).
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
  """Removes the cache, in the process that made it, after its workers have ended."""
  gc.freeze()   # the process ends now: spares pytest a collection over gigabytes
  if COMPILED:
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forgets(request):
  """Drops a process's compiled programs after a module once it holds 6 GB. Not after tests of whole
  runs: a worker has died of a segmentation fault there with threads of an ended run active."""
  yield
  if request.path.parent.name == "run":
    return
  statm = pathlib.Path("/proc/self/statm")    # Linux only
  if not statm.exists():
    return
  if int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > 6e9:
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)   # glibc keeps freed memory
    if trim:
      trim(0)
