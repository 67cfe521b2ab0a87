"""Settings common to all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Reproducible by default; HYPOTHESIS_PROFILE=explore looks for new examples, twenty times as many.
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", settings.get_profile("default"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
