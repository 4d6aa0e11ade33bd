"""The clock alone. What it does inside pipelines is in test_pipelines.py."""

import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers.callbacks import PipelineCallback

from psa_diffusers.processors.clock import WarmupScheduler


def run_steps(clock, num_steps, stop_after=None):
    """Feed the callback as a pipeline does; return what each step was."""
    pipe, seen = SimpleNamespace(num_timesteps=num_steps), []
    for index in range(num_steps):
        seen.append((clock.step, clock.dense))
        assert clock(pipe, index, torch.tensor(0), {"latents": 1}) == {"latents": 1}
        if index == stop_after:
            break
    return seen


def observe_all(clock, timesteps):
    seen = []
    for timestep in timesteps:
        clock.observe(timestep)
        seen.append(clock.step)
    return seen


def test_it_is_a_callback_that_asks_for_no_tensors():
    clock = WarmupScheduler(3)
    assert isinstance(clock, PipelineCallback)
    assert clock.tensor_inputs == []


def test_the_first_steps_are_dense():
    assert run_steps(WarmupScheduler(2), 5) == [(0, True), (1, True), (2, False), (3, False), (4, False)]


def test_without_warmup_every_step_is_sparse():
    assert not any(dense for _, dense in run_steps(WarmupScheduler(), 4))


def test_the_last_steps_are_dense_once_the_number_of_steps_is_known():
    clock = WarmupScheduler(1, dense_last_steps=2)
    clock.set_length(5)
    assert [dense for _, dense in run_steps(clock, 5)] == [True, False, False, True, True]


def test_reason_says_which_rule_made_a_step_dense():
    clock = WarmupScheduler(1, dense_last_steps=1)
    clock.set_length(3)
    reasons = []
    for index in range(3):
        reasons.append(clock.reason)
        clock(SimpleNamespace(num_timesteps=3), index, None, {})
    assert reasons == ["warm-up", "", "one of the last steps"]


def test_after_the_last_step_it_stands_at_the_first_again():
    # pipelines that generate in segments run all their steps several times in one call
    clock = WarmupScheduler(1)
    assert run_steps(clock, 3) == run_steps(clock, 3)


def test_reset_forgets_a_call_that_did_not_end():
    clock = WarmupScheduler(1)
    run_steps(clock, 5, stop_after=2)
    clock.reset()
    assert (clock.step, clock.dense, clock.num_steps) == (0, True, None)


@pytest.mark.parametrize(
    ("timesteps", "steps"),
    [
        pytest.param([999, 750, 500], [0, 1, 2], id="one-forward-a-step"),
        pytest.param([999, 999, 750, 750], [0, 0, 1, 1], id="guidance-in-two-forwards"),
        pytest.param([999, 500, 999, 500], [0, 1, 0, 1], id="rising-is-a-new-run"),
        pytest.param([torch.tensor([999, 999]), torch.tensor([500, 500])], [0, 1], id="a-timestep-per-sample"),
        pytest.param([torch.tensor([[0, 999]]), torch.tensor([[0, 500]])], [0, 1], id="a-timestep-per-token"),
        pytest.param([0.9, 0.4, 0.1], [0, 1, 2], id="floats"),
    ],
)
def test_a_denoisers_timestep_tells_the_step(timesteps, steps):
    assert observe_all(WarmupScheduler(1), timesteps) == steps


def test_observe_tells_when_a_run_begins():
    clock = WarmupScheduler()
    assert [clock.observe(timestep) for timestep in (9, 9, 5, 9)] == [True, False, False, True]


def test_too_much_warmup_warns_once_a_call(caplog):
    clock = WarmupScheduler(4)
    for _ in range(2):
        clock.reset()
        run_steps(clock, 4)
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    assert "nothing will be sparse: warmup_steps=4 of a run of 4 steps; lower warmup_steps" in messages[0]


def test_warmup_and_last_steps_are_added_up_for_the_warning(caplog):
    WarmupScheduler(2, dense_last_steps=2).set_length(4)
    assert "warmup_steps=2 and dense_last_steps=2 of a run of 4 steps" in caplog.text


def test_enough_steps_warn_of_nothing(caplog):
    run_steps(WarmupScheduler(3), 4)
    run_steps(WarmupScheduler(), 1)
    assert not caplog.records


@pytest.mark.parametrize("steps", [-1, 1.0, "2", True])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="warmup_steps must be an integer of at least 0"):
        WarmupScheduler(steps)
    with pytest.raises(ValueError, match="dense_last_steps must be"):
        WarmupScheduler(dense_last_steps=steps)
