"""Whatever is done to pipelines, in any order, each self-attention does what it must."""

import gc
import time
from collections import Counter

import pytest
from fuzz import cases
from hypothesis.stateful import run_state_machine_as_test
from machine import Machine
from machine_pipelines import choices, write_config

pytestmark = [pytest.mark.usefixtures("no_gradients"), pytest.mark.fuzz]


@pytest.fixture
def quick_collection():
    """Deleted pipelines are looked for by a collection each time: it must not walk through all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collection")
def test_any_sequence_of_operations(watch, tmp_path, record_property):
    done, started = Counter(), time.perf_counter()
    offered = choices(write_config(tmp_path / "presets.yaml"))
    settings = cases(suite=20, fuzz=2000, stateful_step_count=12)
    run_state_machine_as_test(lambda: Machine(watch, offered, done), settings=settings)
    done["seconds"] = round(time.perf_counter() - started)
    for name, count in done.items():
        record_property(name, count)
    assert done["calls"]
