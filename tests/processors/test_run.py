"""Which step each forward of a denoiser is, and that what is known of a forward ends with it; on real pipelines."""

import itertools

import diffusers
import pytest
import torch
from guests import both_ways, enable, forwards_due, forwards_told, put_on
from tiny import ALL_CASES, CASES, OTHER_CASES

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report

SMALL = (1, 2, 2)
BOTH_ENDS = {"warmup_steps": 2, "dense_last_steps": 1, "report": True}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

# one forward a step for what no gradient is asked of
quiet = pytest.mark.usefixtures("no_gradients")
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


# schedulers


SCHEDULERS = {
    "euler-merged": ("FlowMatchEulerDiscreteScheduler", {"shift": 100.0}),
    "euler-karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 5.0}),
    "lcm": ("FlowMatchLCMScheduler", {}),
    "unipc-merged": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 100.0}),
    "dpm-sde": ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "dpm-single": ("DPMSolverSinglestepScheduler", FLOW),
    "deis": ("DEISMultistepScheduler", FLOW),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "heun-noise": ("HeunDiscreteScheduler", {}),
}


@quiet
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_counts_steps(name):
    scheduler, options = SCHEDULERS[name]
    pipe = CASES["wan2.1"].build().to(torch.bfloat16)
    pipe.scheduler = getattr(diffusers, scheduler)(**options)
    enable(pipe, **BOTH_ENDS)
    for steps in (1, 5):
        CASES["wan2.1"].run(pipe, steps=steps, grid=SMALL, guidance=1.0)
        num_forwards = len(pipe.scheduler.timesteps)
        assert forwards_told(pipe) == forwards_due(steps, 2, last=1, each=pipe.scheduler.order)[:num_forwards]


@quiet
@both_ways
@pytest.mark.parametrize("name", ["CogVideoXDPMScheduler", "DDIMScheduler"])
def test_a_scheduler_without_an_index_counts_steps(name, how):
    pipe = CASES["cogvideox"].build()
    pipe.scheduler = getattr(diffusers, name)()
    put_on(pipe, how, **BOTH_ENDS)
    for steps in (3, 7):
        CASES["cogvideox"].run(pipe, steps=steps, grid=SMALL)
        assert forwards_told(pipe) == forwards_due(steps, 2, last=1)


@quiet
@both_ways
def test_noise_levels_that_a_user_gives_may_repeat(how):
    pipe = put_on(ALL_CASES["hunyuan-video"].build(), how, **BOTH_ENDS)
    pipe.to(torch.bfloat16)
    inputs = ALL_CASES["hunyuan-video"].inputs(steps=4, grid=SMALL, sigmas=[1.0, 0.9999, 0.9999, 0.5])
    pipe(**{name: each.bfloat16() if isinstance(each, torch.Tensor) else each for name, each in inputs.items()})
    assert forwards_told(pipe) == forwards_due(4, 2, last=1, each=2)


@quiet
@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_run_that_begins_in_the_middle_has_a_warmup_of_its_own(scheduler):
    case = ALL_CASES["wan-v2v"]
    pipe = case.build()
    pipe.scheduler = getattr(diffusers, scheduler)(shift=3.0)
    enable(pipe, **BOTH_ENDS)
    case.run(pipe, steps=8, strength=0.5, guidance=1.0, grid=SMALL)
    told, order = forwards_told(pipe), pipe.scheduler.order
    assert len(told) in (4, 7)
    assert told == forwards_due(4, 2, last=1, each=order)[: len(told)]


# pipelines that begin again in a call


@quiet
@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        pytest.param("framepack", {"num_frames": 24}, id="framepack-sections"),
        pytest.param("helios", {"num_frames": 24}, id="helios-chunks"),
        pytest.param("ltx-long", {"num_frames": 57, "temporal_tile_size": 24, "temporal_overlap": 8}, id="ltx-windows"),
    ],
)
def test_every_segment_begins_at_step_0(name, inputs):
    case = {**ALL_CASES, **OTHER_CASES}.get(name) or pytest.skip("this diffusers has no such pipeline")
    pipe = enable(case.build(), warmup_steps=1, report=True)
    case.run(pipe, steps=2, guidance=1.0, **inputs)
    told = forwards_told(pipe)
    segments = [index for index, (step, _) in enumerate(told) if step == 0]
    assert len(segments) > 1
    for begin, end in zip(segments, [*segments[1:], len(told)], strict=True):
        assert told[begin:end] == forwards_due(end - begin, 1)
    assert len({end - begin for begin, end in itertools.pairwise(segments)}) == 1


@quiet
@pytest.mark.parametrize("stages", [[4, 2], [1, 1]], ids=str)
def test_every_stage_of_a_pyramid_has_its_share_of_the_warmup(stages, tmp_path):
    case = OTHER_CASES.get("helios-pyramid") or pytest.skip("this diffusers has no such pipeline")
    config = tmp_path / "mine.yaml"
    config.write_text("Helios:\n  attention_configs:\n    mine:\n      type: psa\n      warmup_steps: 15\n")
    pipe = enable_psa(case.build(), "mine", config=config, report=True)
    case.run(pipe, guidance=1.0, pyramid_num_inference_steps_list=stages)
    told = forwards_told(pipe)
    assert told == [each for steps in stages for each in forwards_due(steps, -(-steps * 15 // 50))]


# what is known of a forward ends with it


WIDE, TALL = torch.ones(1, 16, 2, 8, 6), torch.ones(1, 16, 2, 6, 8)


class Stopped(Exception):
    pass


def denoise(denoiser, latents, timestep=500.0):
    return denoiser(latents, torch.tensor([timestep]), torch.ones(1, 8, 32)).sample


@quiet
@both_ways
def test_after_a_forward_that_raised_nothing_is_known(how):
    pipe = put_on(CASES["wan2.1"].build(), how, warmup_steps=0, report=True)
    right = denoise(pipe.transformer, TALL)

    def stop(*_):
        raise Stopped

    handle = pipe.transformer.blocks[1].attn1.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        denoise(pipe.transformer, WIDE)
    handle.remove()
    dense = pipe.transformer.forward(TALL, torch.tensor([500.0]), torch.ones(1, 8, 32)).sample  # past the hooks
    record = psa_report(pipe).records[-1]
    assert record["kind"] == "dense"
    assert "no forward of its denoiser is running" in record["reason"]
    assert torch.equal(denoise(pipe.transformer, TALL), right)
    disable_psa(pipe)
    assert torch.equal(denoise(pipe.transformer, TALL), dense)


@quiet
@both_ways
def test_one_attention_called_alone_is_dense(how):
    pipe = put_on(CASES["wan2.1"].build(), how, warmup_steps=0, report=True)
    denoise(pipe.transformer, WIDE)
    attention = pipe.transformer.blocks[0].attn1
    attention(torch.ones(1, 24, 32))
    assert psa_report(pipe).records[-1]["kind"] == "dense"


@quiet
def test_processors_on_another_denoiser_are_dense_there_and_stay_right_at_home(caplog):
    home, away = CASES["wan2.1"].build(), CASES["wan2.1"].build()
    dense = denoise(away.transformer, TALL)
    enable(home, report=True)
    right = denoise(home.transformer, WIDE)
    found = away.transformer.blocks[0].attn1.processor
    away.transformer.blocks[0].attn1.processor = home.transformer.blocks[0].attn1.processor
    assert torch.equal(denoise(away.transformer, TALL), dense)
    assert "no forward of its denoiser is running" in caplog.text
    disable_psa(away)
    assert type(away.transformer.blocks[0].attn1.processor) is type(found)
    assert torch.equal(denoise(home.transformer, WIDE), right)
    assert psa_report(home).records[-1]["kind"] == "sparse"


# gradient checkpointing


def gradients(denoiser, forwards, *, together=True):
    """All gradients of the sum of forwards, each of latents and a timestep."""
    denoiser.zero_grad()
    losses = []
    for seed, (shape, timestep) in enumerate(forwards):
        drawn = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(seed))
        losses.append(denoise(denoiser, drawn, timestep).square().mean())
        if not together:
            losses.pop().backward()
    if losses:
        sum(losses).backward()
    return torch.cat([each.grad.flatten() for each in denoiser.parameters() if each.grad is not None])


SIZES = [((2, 8, 6), 900.0), ((2, 6, 8), 500.0), ((2, 8, 6), 100.0)]


@both_ways
@pytest.mark.parametrize(
    ("choice", "reentrant"),
    [
        ({"warmup_steps": 1}, True),
        ({"steps": {"0": {"mask_ratios": {1: [0, 1]}}}}, False),
    ],
    ids=["warm-up", "steps"],
)
def test_checkpointing_computes_each_block_again_as_it_was(how, reentrant, choice):
    def checkpoint(function, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant, **kwargs)

    results, first = {}, {}
    for checkpointing in (False, True):
        pipe = put_on(CASES["wan2.1"].build(), how, **choice)
        if reentrant:
            pipe.transformer.patch_embedding.requires_grad_(True)
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
        first[checkpointing] = gradients(pipe.transformer.train(), SIZES[:1])
        results[checkpointing] = gradients(pipe.transformer, SIZES)
        apart = gradients(pipe.transformer, SIZES, together=False)
        torch.testing.assert_close(apart, results[checkpointing])
    torch.testing.assert_close(first[True], first[False])
    torch.testing.assert_close(results[True], results[False])


def test_two_denoisers_under_checkpointing_keep_apart():
    def both(checkpointing):
        pipe = enable(CASES["wan2.2-a14b"].build(), warmup_steps=0)
        denoisers = [pipe.transformer.train(), pipe.transformer_2.train()]
        if checkpointing:
            for each in denoisers:
                each.enable_gradient_checkpointing()
        losses = [
            denoise(each, latents).square().mean() for latents in (WIDE, TALL) for each in (*denoisers, denoisers[0])
        ]
        sum(losses).backward()
        return [each.blocks[0].attn1.to_q.weight.grad for each in denoisers]

    for plain, again in zip(both(False), both(True), strict=True):
        torch.testing.assert_close(again, plain)


def test_a_forward_between_that_raised_changes_no_gradient():
    def once(checkpointing):
        pipe = enable(CASES["wan2.1"].build())
        denoiser = pipe.transformer.train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        loss = denoise(denoiser, WIDE).square().mean()

        def stop(*_):
            raise Stopped

        handle = denoiser.blocks[1].attn1.register_forward_pre_hook(stop)
        with pytest.raises(Stopped):
            denoise(denoiser, TALL)
        handle.remove()
        loss.backward()
        return denoiser.blocks[0].attn1.to_q.weight.grad

    torch.testing.assert_close(once(True), once(False))


def test_switching_off_before_the_backward_is_safe():
    pipe = enable(CASES["wan2.1"].build())
    pipe.transformer.train().enable_gradient_checkpointing()
    denoise(pipe.transformer, WIDE)
    disable_psa(pipe)
    assert not type(pipe.transformer._gradient_checkpointing_func).__module__.startswith("psa_diffusers")
    denoise(pipe.transformer, WIDE).square().mean().backward()
