"""Shared by all tests: fixtures, and the two rings that not every process can run."""

import os

import pytest
import torch
from hypothesis import settings

# deterministic, and no time limit an example: other work on the machine must not fail a test
settings.register_profile("psa", derandomize=True, deadline=None)
settings.load_profile("psa")


def pytest_collection_modifyitems(items):
    unmet = {}
    if not torch.cuda.is_available():
        unmet["gpu"] = "needs a CUDA or ROCm device"
    if os.environ.get("TRITON_INTERPRET") != "1":
        unmet["interpreter"] = "needs TRITON_INTERPRET=1 before Python starts; make test sets it"
    for item in items:
        for marker, reason in unmet.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng():
    """The only source of randomness of a test; the global generator stays as it is."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_gradients():
    """For modules whose pipelines only run."""
    with torch.no_grad():
        yield


@pytest.fixture
def watch(monkeypatch):
    """What self-attentions really did."""
    # not at the top: tests of the operation alone need no diffusers
    from watch import Watch

    return Watch(monkeypatch)
