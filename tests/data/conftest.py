"""Number of examples in the property tests: few by default, more with HYPOTHESIS_PROFILE=long."""
import os

from hypothesis import HealthCheck, settings

# Each example creates its own temporary folders, and the first read of a format is slow.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", max_examples=25, derandomize=True, **common)
settings.register_profile("long", max_examples=2000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
