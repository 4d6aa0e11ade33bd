"""Copies and pickles of a pipeline with the LoRA for four steps have all that it brings, and their own way back."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from lora_files import lora_file
from tiny import CASES

from psa_diffusers.lora import load_psa_lora, recipe_of, unload_psa_lora
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.state import state_of


def pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


def saved(pipe):
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def run(pipe, name):
    """A call that leaves steps and guidance to the pipeline."""
    inputs = CASES[name].inputs()
    del inputs["num_inference_steps"], inputs["guidance_scale"]
    return torch.as_tensor(pipe(**inputs).frames)


def preset_of(pipe):
    return state_of(pipe).switch.run.preset.name


WAYS = [
    ("cogvideox", copy.deepcopy, False),
    ("cogvideox", pickled, True),
    ("wan2.1", pickled, False),
    ("wan2.1", saved, False),
]


@pytest.mark.parametrize(
    ("name", "way", "fuse"),
    WAYS,
    ids=[f"{name}-{way.__name__}-{'fused' if fuse else 'loose'}" for name, way, fuse in WAYS],
)
def test_a_copy_runs_the_same_and_goes_back_on_its_own(name, way, fuse, tmp_path):
    pipe = CASES[name].build()
    cls, scheduler, dense = type(pipe), type(pipe.scheduler), run(pipe, name)
    load_psa_lora(pipe, lora_file(tmp_path, name, rank=64), fuse=fuse)
    enable_psa(pipe)
    video = run(pipe, name)
    other = way(pipe)
    assert recipe_of(other) == recipe_of(pipe)
    assert preset_of(other) == "psa_4steps"
    assert inspect.signature(other.__call__).parameters["num_inference_steps"].default == 4
    assert torch.equal(run(other, name), video)

    unload_psa_lora(other)
    assert type(other.scheduler) is scheduler
    assert preset_of(other) != "psa_4steps"
    disable_psa(other)
    assert type(other) is cls
    assert not [attribute for attribute in vars(other) if "psa" in attribute]
    if not fuse:
        assert torch.equal(run(other, name), dense)

    assert preset_of(pipe) == "psa_4steps"
    assert torch.equal(run(pipe, name), video), "the original has not noticed"
    pipe.unload_lora_weights()
    disable_psa(pipe)
    assert type(pipe) is cls


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_with_psa_off_it_is_the_lora_that_comes_along(way, tmp_path):
    pipe = load_psa_lora(CASES["wan2.1"].build(), lora_file(tmp_path, "wan2.1", rank=64))
    pipe.scheduler = mine = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=7.0)
    other = way(way(pipe))
    assert state_of(other).switch is None
    enable_psa(other)
    assert preset_of(other) == "psa_4steps"
    disable_psa(other)
    other.delete_adapters("psa")
    assert recipe_of(other) is None
    assert other.scheduler.config.flow_shift == 7.0, "one that was chosen since stays"
    assert recipe_of(pipe) is not None
    assert pipe.scheduler is mine


def test_a_preset_that_was_chosen_comes_along(tmp_path):
    pipe = load_psa_lora(CASES["wan2.1"].build(), lora_file(tmp_path, "wan2.1", rank=64))
    enable_psa(pipe, "psa_topk", report=True, warmup_steps=1)
    other = pickled(pipe)
    unload_psa_lora(other)
    switch = state_of(other).switch
    assert (switch.run.preset.name, switch.run.preset.warmup_steps) == ("psa_topk", 1)
    assert switch.run.recorder is not None
