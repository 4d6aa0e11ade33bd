"""Steps of pipelines that tell none: read from guiders and schedulers."""

import diffusers
import pytest
import tiny
import torch
from guests import both_ways, enable, forwards_due, forwards_told, put_on
from tiny import CASES, TINY_PRESET

from psa_diffusers.pipelines.enable import enable_psa
from psa_diffusers.processors.standalone import PSAProcessor

pytestmark = pytest.mark.usefixtures("no_gradients")
SMALL = (1, 2, 2)
BOTH_ENDS = {"warmup_steps": 2, "dense_last_steps": 1, "report": True}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
MERGED = {**FLOW, "flow_shift": 100.0}
"""Under which the first timesteps are one number in bfloat16."""

# loops that say little


class Loop:
    """Mixed into a pipeline: a loop of one's own, without callbacks, progress bar, or a timestep that is kept."""

    def __call__(self, steps, *, segments=1, skipped=(), begin=0):
        for _ in range(segments):
            self.scheduler.set_timesteps(steps)
            latents = torch.ones(1, 16, 1, 4, 4)
            for index, timestep in enumerate(self.scheduler.timesteps[begin:]):
                noise = torch.zeros_like(latents)
                for _ in range(0 if index in skipped else 2):
                    noise = self.transformer(latents, timestep.bfloat16()[None], torch.ones(1, 8, 32)).sample
                latents = self.scheduler.step(noise, timestep, latents).prev_sample


def with_a_loop_of_its_own(scheduler=None):
    pipe = CASES["wan2.1"].build()
    pipe.scheduler = scheduler or diffusers.UniPCMultistepScheduler(**MERGED)
    pipe.__class__ = type("Own", (Loop, type(pipe)), {})
    return pipe


@both_ways
def test_a_loop_of_ones_own_is_counted_by_the_scheduler(how):
    pipe = put_on(with_a_loop_of_its_own(), how, **BOTH_ENDS)
    for _ in range(2):
        pipe(6, segments=2)
        assert forwards_told(pipe) == forwards_due(6, 2, last=1, each=2) * 2
    pipe(6, skipped=(3,))
    assert forwards_told(pipe) == [each for each in forwards_due(6, 2, last=1, each=2) if each[0] != 3]


def test_a_loop_of_ones_own_that_begins_in_the_middle_begins_at_step_0():
    pipe = enable(with_a_loop_of_its_own(), warmup_steps=1, report=True)
    pipe(6, begin=2)
    assert forwards_told(pipe) == forwards_due(4, 1, each=2)


def test_a_loop_of_ones_own_with_two_evaluations_a_step():
    pipe = enable(with_a_loop_of_its_own(diffusers.FlowMatchHeunDiscreteScheduler()), **BOTH_ENDS)
    pipe(4)
    assert forwards_told(pipe) == forwards_due(4, 2, last=1, each=4)[:14]


def modular(blocks, **parts):
    """A modular pipeline of Wan."""
    import diffusers.modular_pipelines as modular_pipelines

    made = getattr(modular_pipelines, blocks, None) or pytest.skip("this diffusers has no such blocks")
    found = tiny.wan(experts=2 if "22" in blocks else 1).components
    pipe = made().init_pipeline()
    pipe.update_components(
        **{name: part for name, part in found.items() if part is not None and name in pipe.components}
    )
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_modular(pipe, steps):
    known = ("prompt", "negative_prompt", "num_inference_steps", "height", "width", "num_frames", "max_sequence_length")
    inputs = {name: x for name, x in CASES["wan2.1"].inputs(steps=steps, grid=SMALL).items() if name in known}
    pipe(**inputs, output="latents", output_type="np")
    return forwards_told(pipe)


@both_ways
@pytest.mark.parametrize(
    ("blocks", "scheduler"),
    [
        ("WanBlocks", ("UniPCMultistepScheduler", MERGED)),
        ("WanBlocks", ("FlowMatchHeunDiscreteScheduler", {})),
        ("Wan22Blocks", ("FlowMatchEulerDiscreteScheduler", {"shift": 100.0})),
    ],
    ids=["merged", "heun", "two-guiders"],
)
def test_a_modular_pipeline_is_counted_by_its_guiders(blocks, scheduler, how):
    name, options = scheduler
    pipe = modular(blocks, scheduler=getattr(diffusers, name)(**options))
    pipe.to(torch.bfloat16)
    if how == "pipeline":
        enable(pipe, **BOTH_ENDS)
    else:
        processor = PSAProcessor(**{**TINY_PRESET, **BOTH_ENDS})
        for part in {pipe.transformer, getattr(pipe, "transformer_2", pipe.transformer)}:
            part.set_attn_processor(processor)
    # under Heun guiders take evaluations for steps, and leave guidance out in later ones
    for steps in (5, 4) if pipe.scheduler.order == 1 else (5,):
        assert list(dict.fromkeys(run_modular(pipe, steps))) == forwards_due(steps, 2, last=1)


def test_the_warmup_of_a_preset_follows_a_short_modular_run():
    pipe = enable_psa(modular("WanBlocks"), report=True)
    assert {kind for _, kind in run_modular(pipe, 6)} == {"dense", "sparse"}
