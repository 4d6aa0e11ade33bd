"""How many random cases a test tries: few in the suite and always the same, many in `make fuzz` and new each time."""

import os

from hypothesis import HealthCheck, settings

LONG = os.environ.get("PSA_FUZZ") == "1"


def cases(suite: int, fuzz: int, **options) -> settings:
    """Decorates a hypothesis test (or sets a state machine's `settings`) with its number of cases, or of sequences."""
    return settings(
        max_examples=fuzz if LONG else suite,
        derandomize=not LONG,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        **options,
    )
