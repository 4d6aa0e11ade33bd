"""The clock alone. What it does inside pipelines is in test_run.py."""

import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from hypothesis import given
from hypothesis import strategies as st

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


# by the timesteps that a pipeline is at


@st.composite
def segments(draw):
    """Timesteps of the segments of a call, as schedulers make them, in dtypes in which neighbours are one number."""
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.int64)))
    top = draw(st.sampled_from((999.0, 1.0, 0.004)))
    counts = draw(st.lists(st.integers(1, 100), min_size=1, max_size=3))
    if draw(st.booleans()):
        return [torch.linspace(top, 0, count).to(dtype) for count in counts]
    return [torch.linspace(top, 0, counts[0]).to(dtype)] * len(counts)  # the very tensor again


ORDERS = st.sampled_from((1, 2))


def hear_all(clock, timesteps, order, repeats=1):
    """Feed the timesteps of a segment as a pipeline does that keeps the one it is at."""
    clock.begin_loop()
    seen = []
    for timestep in timesteps:
        for _ in range(repeats):
            clock.set_length(len(timesteps), order)
            clock.at(timestep)
            seen.append((clock.step, clock.dense))
    return seen


def due(num_evaluations, order, warmup, last, repeats=1):
    num_steps = -(-num_evaluations // order)
    steps = [evaluation // order for evaluation in range(num_evaluations) for _ in range(repeats)]
    return [(step, step < warmup or step >= num_steps - last) for step in steps]


@given(segments(), ORDERS, st.integers(0, 12), st.integers(0, 12), st.integers(1, 3))
def test_steps_are_exact_whatever_the_timesteps_are_rounded_to(segments, order, warmup, last, repeats):
    clock = WarmupScheduler(warmup, dense_last_steps=last)
    for timesteps in segments:
        assert hear_all(clock, timesteps, order, repeats) == due(len(timesteps), order, warmup, last, repeats)


@given(segments(), st.sampled_from(("copy", "complement", "number", "piece-of-a-copy")), ORDERS)
def test_timesteps_that_are_made_anew_are_counted(segments, how, order):
    make = {
        "copy": lambda timesteps, i: timesteps[i].clone(),
        "complement": lambda timesteps, i: 1000 - timesteps[i],
        "number": lambda timesteps, i: object(),
        "piece-of-a-copy": lambda timesteps, i: timesteps.clone()[i],
    }[how]
    clock = WarmupScheduler(1)
    for timesteps in segments:
        made = [make(timesteps, i) for i in range(len(timesteps))]
        assert hear_all(clock, made, order) == due(len(timesteps), order, 1, 0)


@given(st.integers(2, 60), st.data())
def test_a_segment_is_seen_by_its_first_timestep_alone(count, data):
    clock = WarmupScheduler(1)
    timesteps = torch.linspace(999, 0, count)
    stop, begin = data.draw(st.integers(1, count - 1)), data.draw(st.integers(0, count - 2))
    for timestep in timesteps[: stop + 1]:  # no loop is announced
        clock.at(timestep)
    assert clock.step == stop
    clock.at(timesteps[min(begin, stop - 1)])
    assert (clock.step, clock.dense) == (0, True)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_an_index_is_believed_and_one_that_falls_back_begins_a_segment(indices):
    clock, rounds, last = WarmupScheduler(2), 0, None
    for index in indices:
        before = clock.rounds
        clock.go_to(index)
        assert (clock.step, clock.dense) == (index, index < 2)
        rounds = clock.rounds - before
        assert rounds == (last is not None and index < last)
        last = index


def test_a_second_step_0_is_another_segment_if_it_is_known_to_be_new():
    clock = WarmupScheduler()
    clock.go_to(0, is_new=True)
    rounds = clock.rounds
    clock.go_to(0)
    assert clock.rounds == rounds
    clock.go_to(0, is_new=True)
    assert clock.rounds == rounds + 1


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 3), ORDERS)
def test_callbacks_of_a_scheduler_with_two_evaluations_a_step_count_steps(num_steps, warmup, last, order):
    clock, seen = WarmupScheduler(warmup, dense_last_steps=last), []
    evaluations = num_steps * order - (order - 1)
    pipe = SimpleNamespace(num_timesteps=evaluations, scheduler=SimpleNamespace(order=order))
    clock.set_length(evaluations, order)
    for index in range(evaluations):
        seen.append((clock.step, clock.dense))
        clock(pipe, index, None, {})
    assert seen == due(evaluations, order, warmup, last)


# a warm-up that nobody chose for this run


@given(st.integers(1, 100), st.integers(0, 60))
def test_a_warmup_that_follows_leaves_sparse_steps_where_it_can(num_steps, warmup):
    clock = WarmupScheduler(warmup, follows=True)
    clock.set_length(num_steps)
    if warmup < num_steps:
        assert clock.warmup == warmup
    elif warmup < 50:
        assert clock.warmup < num_steps or num_steps * warmup / 50 > num_steps - 1
        assert clock.warmup == -(-num_steps * warmup // 50)
    assert (clock.warmup == 0) == (warmup == 0)


@pytest.mark.parametrize(("num_steps", "dense"), [(4, 2), (8, 3), (10, 3), (15, 5), (16, 15), (50, 15)])
def test_15_of_50_steps_are_a_share_of_short_runs(num_steps, dense):
    clock = WarmupScheduler(15, follows=True)
    clock.set_length(num_steps)
    assert clock.warmup == dense


def test_a_count_that_was_chosen_for_the_run_stays():
    clock = WarmupScheduler(15)
    clock.set_length(10)
    assert clock.warmup == 15
