"""Settings that every test shares: eight fake CPU devices, no silent rank promotion.

XLA optimises little here: tests compile much and run short, and the claims they check hold at any
level of optimisation.
"""
import os

# Read by XLA when the first device is asked for, so before any test imports the library.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                           " --xla_force_host_platform_device_count=8"
                           " --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

from tests.tiny_run import built, built_on_one, config, shared, uninterrupted  # noqa: E402, F401
