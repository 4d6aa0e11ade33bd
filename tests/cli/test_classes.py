"""Schedulers and pipelines by name: what would be dropped or would fail later is told."""

import diffusers
import pytest

from psa_diffusers.cli.classes import diffusers_class, scheduler_class, shifted
from psa_diffusers.cli.generation import load_pipeline
from psa_diffusers.presets import ModelEntry, list_model_entries, load_model_entry
from psa_diffusers.presets.model_entries import SchedulerChoice


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("UniPCMultistepScheduler", {"flow_shif": 3}, r"'flow_shif'. Did you mean 'flow_shift'\?"),
        ("FlowMatchEulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "Known arguments: num_train_timesteps"),
        ("DDIMScheduler", {"self": 1}, "no argument 'self'"),
        ("DDIMScheduler", {"kwargs": {}}, "no argument 'kwargs'"),
        ("ddimscheduler", {}, r"Did you mean 'DDIMScheduler'\?"),
        ("DiffusionPipeline", {}, "'DiffusionPipeline' is no scheduler"),
        ("AutoencoderKLWan", {}, "'AutoencoderKLWan' is no scheduler"),
        ("SchedulerMixin", {}, "is no scheduler"),
        ("__version__", {}, "is not in this diffusers"),
        ("utils", {}, "is no scheduler"),
    ],
)
def test_a_scheduler_that_would_not_do_what_is_asked_is_refused(name, kwargs, told):
    with pytest.raises(ValueError, match=told):
        scheduler_class(SchedulerChoice(name, kwargs))


def test_a_scheduler_whose_package_is_missing_says_which():
    schedulers = (name for name in dir(diffusers) if name.endswith("Scheduler"))
    name = next(name for name in schedulers if hasattr(getattr(diffusers, name), "_backends"))
    with pytest.raises(ImportError, match="pip install"):
        scheduler_class(SchedulerChoice(name))


def test_the_entries_of_the_package_ask_for_what_is_read():
    entries = [load_model_entry(name) for name in list_model_entries()]
    with_scheduler = [entry for entry in entries if entry.scheduler]
    assert len(with_scheduler) > 5
    for entry in with_scheduler:
        scheduler = scheduler_class(entry.scheduler)(**entry.scheduler.kwargs)
        if entry.flow_shift is not None:
            assert shifted(scheduler, entry.flow_shift).config.flow_shift == entry.flow_shift


def test_a_shift_that_nothing_reads_is_refused():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert shifted(flow, 7.0).config.shift == 7.0
    with pytest.raises(ValueError, match="DDIMScheduler does not shift"):
        shifted(diffusers.DDIMScheduler(), 3.0)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        shifted(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 3.0)


def test_pipelines_are_pipelines():
    assert diffusers_class("WanPipeline", "Pipeline", diffusers.DiffusionPipeline) is diffusers.WanPipeline
    for name, told in (("WanPipelin", "Did you mean 'WanPipeline'"), ("DDIMScheduler", "is no pipeline")):
        with pytest.raises(ValueError, match=told):
            load_pipeline(ModelEntry(source="nowhere", pipeline=name), device="cpu")
    with pytest.raises(ValueError, match="CogVideoXPipeline, WanPipeline, got 'LTXPipeline'"):
        load_pipeline(ModelEntry(pipeline="LTXPipeline"), device="cpu")
