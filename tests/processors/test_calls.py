"""Calls of pipelines: when a run begins and ends, whoever runs the denoiser, and what is said at the end."""

import logging

import diffusers
import pytest
import torch
from guests import both_ways, enable, forwards_due, forwards_told, put_on
from tiny import ALL_CASES, CASES

pytestmark = pytest.mark.usefixtures("no_gradients")
SMALL = (1, 2, 2)
BOTH_ENDS = {"warmup_steps": 2, "dense_last_steps": 1, "report": True}


# runs that were stopped, and other users of the denoiser


class Stopped(Exception):
    pass


def stop_at(step):
    def callback(pipe, index, timestep, kwargs):
        if index == step:
            raise Stopped
        return kwargs

    return {"callback_on_step_end": callback}


def loop_alone(denoiser, timesteps):
    for timestep in timesteps:
        denoiser(torch.ones(1, 16, 1, 4, 4), torch.tensor([timestep]), torch.ones(1, 8, 32))


@both_ways
def test_a_stopped_run_leaves_nothing_to_the_next_one(how):
    case = CASES["wan2.1"]
    pipe = put_on(case.build(), how, **BOTH_ENDS)
    small = {"grid": SMALL, "guidance": 1.0}
    sibling = diffusers.WanVideoToVideoPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    for step in range(3):
        with pytest.raises(Stopped):
            case.run(pipe, steps=5, **small, **stop_at(step))
        with pytest.raises(Stopped):
            ALL_CASES["wan-v2v"].run(sibling, steps=5, **small, **stop_at(1))
        ALL_CASES["wan-v2v"].run(sibling, steps=4, **small)
        assert forwards_told(pipe) == forwards_due(4, 2, last=1)
        case.run(pipe, steps=5, **small)
        assert forwards_told(pipe) == forwards_due(5, 2, last=1)


@both_ways
def test_two_pipelines_of_a_denoiser_take_turns(how):
    owner = put_on(CASES["cogvideox"].build(), how, **BOTH_ENDS)
    others = [type(owner).from_pipe(owner), diffusers.CogVideoXVideoToVideoPipeline.from_pipe(owner)]
    cases = [CASES["cogvideox"], CASES["cogvideox"], CASES["cogvideox-v2v"]]
    for steps in (4, 5):
        for pipe, case in zip([owner, *others], cases, strict=True):
            pipe.set_progress_bar_config(disable=True)
            case.run(pipe, steps=steps, grid=SMALL)
            assert forwards_told(owner) == forwards_due(steps, 2, last=1)


@both_ways
def test_a_loop_over_the_denoiser_between_runs_is_a_run(how):
    case = CASES["wan2.1"]
    pipe = put_on(case.build(), how, warmup_steps=2, report=True)
    for timesteps in ([900.0, 900.0, 700.0, 500.0], [300.0, 200.0, 100.0]):
        case.run(pipe, steps=4, grid=SMALL, guidance=1.0)
        assert forwards_told(pipe) == forwards_due(4, 2)
        loop_alone(pipe.transformer, timesteps)
        steps = sorted(set(timesteps), reverse=True)
        due = [(steps.index(each), "dense" if steps.index(each) < 2 else "sparse") for each in timesteps]
        assert forwards_told(pipe) == due


def test_a_run_in_a_callback_of_another_pipeline_is_that_pipelines_own():
    outer, inner = (enable(CASES["wan2.1"].build(), **BOTH_ENDS) for _ in range(2))
    small = {"grid": SMALL, "guidance": 1.0}

    def preview(pipe, index, timestep, kwargs):
        CASES["wan2.1"].run(inner, steps=4, **small)
        assert forwards_told(inner) == forwards_due(4, 2, last=1)
        return kwargs

    CASES["wan2.1"].run(outer, steps=5, **small, callback_on_step_end=preview)
    assert forwards_told(outer) == forwards_due(5, 2, last=1)


# nothing sparse is loud


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize(
    ("choice", "steps", "because"),
    [
        pytest.param({"warmup_steps": 9}, 3, "lower warmup_steps", id="warm-up"),
        pytest.param({"warmup_steps": 1, "dense_last_steps": 2}, 3, "lower warmup_steps", id="both-ends"),
        pytest.param({"steps": {"0:10": {"type": "dense"}}}, 2, "the preset is dense here", id="steps"),
        pytest.param({"dense_layers": "0:2"}, 2, "the preset is dense here", id="layers"),
    ],
)
def test_a_call_without_a_sparse_attention_says_so_once(choice, steps, because, report, caplog):
    pipe = enable(CASES["wan2.1"].build(), report=report, **choice)
    for _ in range(2):
        caplog.clear()
        CASES["wan2.1"].run(pipe, steps=steps, grid=SMALL)
        (message,) = warnings_of(caplog)
        assert "nothing" in message
        assert because in message


def test_a_mask_that_makes_all_dense_is_told_with_the_remedy(caplog):
    case = ALL_CASES["skyreels-forcing"]
    pipe = enable(case.build())
    case.run(pipe, steps=2, grid=(4, 2, 2), ar_step=1, causal_block_size=2)
    assert "nothing ran sparse in this call although PSA is on: an attention mask is in use" in caplog.text
    assert "psa_report(pipe)" in caplog.text


@pytest.mark.parametrize("choice", [{"type": "dense"}, {}, {"warmup_steps": 1}], ids=str)
def test_a_call_that_is_as_asked_says_nothing(choice, caplog):
    pipe = enable(CASES["wan2.1"].build(), **choice)
    CASES["wan2.1"].run(pipe, steps=3, grid=SMALL)
    assert not warnings_of(caplog)


def test_a_call_that_was_stopped_says_nothing(caplog):
    pipe = enable(CASES["wan2.1"].build(), warmup_steps=2)
    with pytest.raises(Stopped):
        CASES["wan2.1"].run(pipe, steps=4, grid=SMALL, **stop_at(0))
    assert not warnings_of(caplog)
