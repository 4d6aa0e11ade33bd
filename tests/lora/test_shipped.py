"""The LoRA for four steps that ships with the package: in Python it brings its preset too, whatever comes first."""

from collections import Counter

import pytest

from psa_diffusers import PSAProcessor, psa_report
from psa_diffusers.cli.demo import build_demo_pipeline, demo_lora
from psa_diffusers.lora import load_psa_lora, recipe_of, unload_psa_lora
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.state import state_of


@pytest.fixture(scope="module")
def demo():
    pipe = build_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(demo):
    yield demo
    disable_psa(demo)
    demo.unload_lora_weights()


def lora(pipe):
    load_psa_lora(pipe, demo_lora())


def processor(pipe):
    pipe.set_attn_processor(PSAProcessor(report=True))


def enable(pipe):
    enable_psa(pipe, report=True)


ORDERS = {
    "lora-first": (lora, enable),
    "psa-first": (enable, lora),
    "again": (enable, lora, enable),
    "processor": (lora, processor),
    "processor-first": (processor, lora),
    "off-and-on": (enable, lora, disable_psa, enable),
    "lora-twice": (lora, unload_psa_lora, enable, lora),
}


@pytest.mark.parametrize("order", ORDERS)
def test_it_brings_its_preset_in_any_order(order, pipe):
    for step in ORDERS[order]:
        step(pipe)
    preset = state_of(pipe).switch.run.preset
    assert (preset.model, preset.name) == ("demo", "psa_4steps")
    unload_psa_lora(pipe)
    assert state_of(pipe).switch.run.preset.name == "psa_cover"


def test_four_steps_without_guidance_are_sparse_from_the_first(pipe):
    scheduler = pipe.scheduler
    lora(pipe)
    enable(pipe)
    assert pipe.scheduler is scheduler, "it was trained with the model's own"
    pipe("a red circle moves left", height=64, width=64, num_frames=9, output_type="latent")
    calls = Counter((record["step"], record["kind"]) for record in psa_report(pipe).records)
    assert calls == {(step, "sparse"): 8 for step in range(4)}


def test_it_can_be_an_ordinary_lora(pipe):
    load_psa_lora(pipe, demo_lora(), few_steps=False)
    assert recipe_of(pipe) is None
    unload_psa_lora(pipe)
    load_psa_lora(pipe, demo_lora(), few_steps=True)
    assert recipe_of(pipe).preset == ("demo", "psa_4steps")
