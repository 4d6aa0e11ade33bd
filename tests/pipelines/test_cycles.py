"""Switching on and off leaves nothing behind, and a pipeline is freed with its last name."""

import gc
import sys
import weakref

import pytest
import torch
from guests import denoisers
from tiny import CASES, TINY_PRESET

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.calls import Listener
from psa_diffusers.processors.run import Run
from psa_diffusers.processors.site import Site

pytestmark = pytest.mark.usefixtures("no_gradients")
KINDS = (FamilyProcessor, Listener, Run, Site)


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
