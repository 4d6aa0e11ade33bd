"""Switching on and off leaves nothing behind, and a pipeline is freed with its last name."""

import gc
import sys
import weakref

import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from guests import denoisers
from tiny import CASES, DROP, TINY_PRESET

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.calls import Listener
from psa_diffusers.processors.run import Run
from psa_diffusers.processors.site import Site

pytestmark = pytest.mark.usefixtures("no_gradients")
OTHER = WanVideoToVideoPipeline
KINDS = (FamilyProcessor, Listener, Run, Site)


def run_of(pipe):
    """Latents of a call of one that shares the denoiser of Wan, made of latents."""
    latents = torch.linspace(-1, 1, 16 * 2 * 8 * 8).view(1, 16, 2, 8, 8)
    inputs = CASES["wan2.1"].inputs(steps=1, guidance=1.0, height=64, width=64, num_frames=DROP)
    return pipe(**inputs, latents=latents, strength=1.0).frames


def held(pipe):
    """What of ours, and of torch's hooks, is alive around a pipeline."""
    gc.collect()
    objects = gc.get_objects()
    cls = type(pipe)
    modules = [module for denoiser in denoisers(pipe) for module in denoiser.modules()]
    return {
        "class": cls,
        "subclasses": len(cls.__subclasses__()),
        "finders": list(sys.meta_path),
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules),
        "attributes": set(vars(pipe)),
        # by type(), which asks the object nothing: some warn when they are looked at
        "ours": sum(issubclass(type(it), KINDS) for it in objects),
        "classes": sum(issubclass(type(it), type) and str(it.__module__).startswith("psa_") for it in objects),
    }


def test_three_hundred_cycles_leave_nothing_behind():
    case = CASES["wan2.2-a14b"]
    pipe = case.build()
    for report in (False, True):  # what is imported or cached once
        enable_psa(pipe, **TINY_PRESET, report=report)
        case.run(pipe, steps=1)
        disable_psa(pipe)
    before, dense = held(pipe), case.run(pipe, steps=1)
    objects = len(gc.get_objects())
    for cycle in range(300):
        enable_psa(pipe, **{**TINY_PRESET, "warmup_steps": cycle % 3}, report=cycle % 2 == 0)
        if cycle % 3 == 1:
            enable_psa(pipe, **TINY_PRESET)  # a notebook cell that is run twice
        if cycle % 50 == 0:
            case.run(pipe, steps=1)
        disable_psa(pipe)
    assert held(pipe) == before
    assert len(gc.get_objects()) - objects < 300, "less than one object a cycle: caches of others, not ours"
    assert torch.equal(case.run(pipe, steps=1), dense)


@pytest.mark.parametrize("state", ["on", "off again", "after a call", "after an error"])
def test_a_pipeline_is_freed_with_its_last_name(state):
    case = CASES["wan2.1"]
    pipe = case.build()
    enable_psa(pipe, **TINY_PRESET, report=True)
    if state == "off again":
        disable_psa(pipe)
    elif state == "after a call":
        case.run(pipe, steps=1)
    elif state == "after an error":
        with pytest.raises(ZeroDivisionError):
            case.run(pipe, steps=2, callback_on_step_end=lambda *_: 1 // 0)
    freed = [weakref.ref(part) for part in (pipe, pipe.transformer)]
    del pipe
    gc.collect()
    assert [ref() for ref in freed] == [None, None]


# pipelines that share a denoiser


def sharing(pipe):
    other = OTHER.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def test_pipelines_that_came_and_went_leave_nothing_on_the_one_they_share_with():
    case = CASES["wan2.1"]
    pipe = case.build()
    enable_psa(pipe, **TINY_PRESET)
    run_of(sharing(pipe))
    before = held(pipe)
    for _ in range(10):
        run_of(sharing(pipe))
    after = held(pipe)
    # the last one that was heard may wait for the next
    assert after["ours"] <= before["ours"] + 1
    assert after["hooks"] == before["hooks"]
    gc.collect()
    assert len(OTHER.__subclasses__()) <= 1


@pytest.mark.parametrize("taken_off", ["disabled", "replaced"])
def test_what_a_deleted_pipeline_left_on_a_shared_denoiser_goes_with_its_processors(taken_off):
    pipe = CASES["wan2.1"].build()
    dense = run_of(sharing(pipe))
    enable_psa(pipe, **TINY_PRESET)
    other = sharing(pipe)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert not torch.equal(run_of(other), dense), "what was switched on stays on where it is used"
    assert type(other) is not OTHER
    if taken_off == "disabled":
        disable_psa(other)
    else:
        other.transformer.set_attn_processor(type(other.transformer.blocks[0].attn2.processor)())
        run_of(other)
    modules = list(other.transformer.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert type(other) is OTHER
    assert torch.equal(run_of(other), dense)


def test_a_pipeline_that_shares_nothing_any_more_leaves_the_report_alone():
    case = CASES["wan2.1"]
    pipe = case.build()
    enable_psa(pipe, **TINY_PRESET, report=True)
    other = sharing(pipe)
    run_of(other)
    case.run(pipe, steps=2)
    records = psa_report(pipe).records
    assert {record["step"] for record in records} == {0, 1}
    other.transformer = case.build().transformer
    run_of(other)
    assert psa_report(pipe).records == records
    assert type(other) is OTHER
