"""Shared by the tests of the command."""

import pytest

from psa_diffusers.cli import worklist


@pytest.fixture
def short_waits(monkeypatch):
    """Who waits for another process looks again soon."""
    monkeypatch.setattr(worklist, "POLL_SECONDS", 0.02)
