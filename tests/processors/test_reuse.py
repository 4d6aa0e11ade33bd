"""`refresh_every`: for how long, for whom and under what a level map serves again, on small real pipelines."""

import gc
from collections import Counter
from dataclasses import replace

import oracle
import pytest
import tiny
import torch
from budget import assert_within_budget
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from forwards import captured_inputs
from guests import one_of_each
from tiny import ALL_CASES, CASES, TINY_PRESET

from psa_diffusers import PSAPreset, PSAProcessor, psa_attention
from psa_diffusers.ops import reference
from psa_diffusers.ops.layout import make_layout
from psa_diffusers.ops.orders import video_order
from psa_diffusers.ops.types import Schedule
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.pipelines.state import state_of
from psa_diffusers.processors import run
from psa_diffusers.processors import sparse as processor
from psa_diffusers.processors.reuse import MOST_BRANCHES, KeptSchedules

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    # of Mochi and of schedulers
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
SMALL = PSAPreset(block_size={"m": 16, "n": 16}, mask_ratios=TINY_PRESET["mask_ratios"], key_variance=True)


@pytest.fixture
def decided(monkeypatch):
    """How often importance was estimated, and thus something decided."""
    calls, real = Counter(), reference.block_importance

    def counting(*args, **kwargs):
        calls["importance"] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(reference, "block_importance", counting)
    return calls


@pytest.fixture
def calls(monkeypatch):
    """Every call of the operation by a processor: inputs, keywords, the schedule it was given and that it used."""
    seen, real = [], psa_attention

    def noting(q, k, v, preset, schedule=None, **kwargs):
        out, used = real(q, k, v, preset, schedule=schedule, **{**kwargs, "return_schedule": True})
        place = {key: value for key, value in kwargs.items() if key != "return_schedule"}
        seen.append({"qkv": (q, k, v), "place": place, "given": schedule, "used": used, "out": out})
        return (out, used) if kwargs.get("return_schedule") else out

    monkeypatch.setattr(processor, "psa_attention", noting)
    return seen


def enable(pipe, **kwargs):
    return enable_psa(pipe, **{**TINY_PRESET, "refresh_every": 3, **kwargs})


def records(pipe):
    return psa_report(pipe).records


def schedules_alive():
    gc.collect()
    return sum(type(thing) is Schedule for thing in gc.get_objects())  # isinstance would wake lazy objects


# the operation


@pytest.mark.parametrize("tilt_gain", ["full", "sampled"])
@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_a_call_with_its_own_schedule_changes_no_bit_and_decides_nothing(mode, tilt_gain, decided, rng):
    q, k, v = (torch.randn(1, 2, 126 + 9, 16, generator=rng) for _ in range(3))
    preset = SMALL.replace(mask_mode=mode, value_tilt=True, tilt_gain=tilt_gain, use_sim_mask=True)
    place = {"grid": (3, 6, 7), "text_tokens": 9}
    out, schedule = psa_attention(q, k, v, preset, **place, return_schedule=True)
    again, used = psa_attention(q, k, v, preset, **place, schedule=schedule, return_schedule=True)
    assert used is schedule
    assert torch.equal(again, out)
    assert torch.equal(psa_attention(q, k, v, preset, **place, schedule=schedule), out)
    assert decided["importance"] == 1


def test_gradients_flow_under_a_given_schedule(rng):
    q, k, v = (torch.randn(1, 1, 96, 16, generator=rng, dtype=torch.float64) for _ in range(3))
    _, schedule = psa_attention(q, k, v, SMALL, return_schedule=True)
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        psa_attention(*leaves, SMALL, schedule=schedule).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_a_dense_preset_stays_dense_under_its_schedule(rng):
    q, k, v = (torch.randn(1, 1, 96, 16, generator=rng) for _ in range(3))
    dense = PSAPreset(type="dense")
    out, schedule = psa_attention(q, k, v, dense, return_schedule=True)
    assert torch.equal(psa_attention(q, k, v, dense, schedule=schedule), out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.to_level_map(), TypeError, "a Schedule that psa_attention returned, got a Tensor"),
        (
            lambda s: replace(s, block_ids=s.block_ids[:, :, 1:]),
            ValueError,
            r"of another call: .* = \(1, 2, 6, 6\).*Leave",
        ),
        (
            lambda s: replace(s, offsets=s.offsets[..., 1:]),
            ValueError,
            r"F \+ 1\] = \(1, 2, 6, 4\).*got.* = \(1, 2, 6, 3\)",
        ),
        (lambda s: replace(s, factors=(1, 2)), ValueError, r"factors = \(1, 2, 8\).*got.*factors = \(1, 2\)"),
        (lambda s: replace(s, block_n=32), ValueError, "got .*block_n = 32"),
        (lambda s: replace(s, block_ids=s.block_ids.to("meta")), ValueError, "device = meta"),
    ],
)
def test_a_schedule_of_another_call_is_refused(change, error, message, rng):
    q, k, v = (torch.randn(1, 2, 96, 16, generator=rng) for _ in range(3))
    _, schedule = psa_attention(q, k, v, SMALL, return_schedule=True)
    with pytest.raises(error, match=message):
        psa_attention(q, k, v, SMALL, schedule=change(schedule))


# when it is made anew


@one_of_each
def test_by_default_every_call_decides(name, decided, calls):
    pipe = enable(CASES[name].build(), refresh_every=1)
    asked_for_one = CASES[name].run(pipe)
    assert all(call["given"] is None for call in calls)
    assert decided["importance"] == len(calls) == 4 * 2 * CASES[name].passes
    disable_psa(pipe)
    assert torch.equal(CASES[name].run(enable_psa(pipe, **TINY_PRESET)), asked_for_one)


@pytest.mark.parametrize("report", [True, False])
@one_of_each
def test_a_layer_decides_every_third_step_for_each_branch(name, report, decided, calls):
    pipe, case = enable(CASES[name].build(), report=report), CASES[name]
    case.run(pipe, steps=7)
    by_step = [calls[i : i + 2 * case.passes] for i in range(0, len(calls), 2 * case.passes)]
    assert len(by_step) == 7
    for step, made in enumerate(by_step):
        for place, call in enumerate(made):
            # the very object that the same layer of the same branch made
            assert call["given"] is (None if step % 3 == 0 else by_step[step - step % 3][place]["used"])
    assert decided["importance"] == 3 * 2 * case.passes  # steps, layers, branches that run one after the other
    if report:
        assert [record["kept"] for record in records(pipe)] == [call["given"] is not None for call in calls]


def test_two_experts_have_maps_of_their_own(decided, calls):
    pipe = enable(CASES["wan2.2-a14b"].build(), report=True)
    CASES["wan2.2-a14b"].run(pipe, steps=6)
    kept = {(record["denoiser"], record["step"]): record["kept"] for record in records(pipe)}
    assert kept == {
        ("transformer", 0): False, ("transformer", 1): True,
        ("transformer_2", 2): False, ("transformer_2", 3): True, ("transformer_2", 4): True,
        ("transformer_2", 5): False,
    }  # fmt: skip
    assert decided["importance"] == sum(call["given"] is None for call in calls) == len(calls) / 2


@one_of_each
def test_recording_changes_no_bit(name):
    silent = CASES[name].run(enable(CASES[name].build()))
    assert torch.equal(CASES[name].run(enable(CASES[name].build(), report=True)), silent)


def test_dense_steps_count_but_do_not_decide(decided):
    pipe = enable(CASES["wan2.1"].build(), warmup_steps=2, dense_last_steps=1, report=True)
    CASES["wan2.1"].run(pipe, steps=7)
    kept = {record["step"]: record["kept"] for record in records(pipe) if record["kind"] == "sparse"}
    assert kept == {2: False, 3: True, 4: True, 5: False}
    assert not any(record["kept"] for record in records(pipe) if record["kind"] == "dense")
    assert decided["importance"] == 2 * 2 * 2


def test_settings_that_change_with_the_step_decide_anew():
    changed = {"3:": {"mask_ratios": {1: [0, 0.5], 0: [0.5, 1]}}}
    pipe = enable(CASES["wan2.1"].build(), refresh_every=4, steps=changed, report=True)
    CASES["wan2.1"].run(pipe, steps=5)
    assert {record["step"]: record["kept"] for record in records(pipe)} == {
        0: False, 1: True, 2: True, 3: False, 4: True,
    }  # fmt: skip


@pytest.mark.parametrize("end", ["returns", "raises"])
def test_another_run_decides_anew_and_gives_the_same(end):
    pipe, case = enable(CASES["wan2.1"].build(), refresh_every=9, report=True), CASES["wan2.1"]
    first = case.run(pipe)
    if end == "raises":

        def stop(pipeline, index, timestep, kwargs):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            case.run(pipe, callback_on_step_end=stop)
    assert torch.equal(case.run(pipe), first)
    assert {record["step"] for record in records(pipe) if not record["kept"]} == {0}


def test_after_a_run_and_when_switched_off_nothing_is_held():
    before = schedules_alive()
    pipe = enable(CASES["wan2.1"].build())
    CASES["wan2.1"].run(pipe)
    assert schedules_alive() == before
    CASES["wan2.1"].run(pipe, callback_on_step_end=lambda pipe, i, t, kwargs: (disable_psa(pipe), kwargs)[1])
    assert schedules_alive() == before


def test_what_a_denoiser_keeps_that_is_called_by_itself_goes_when_switched_off():
    before, pipe = schedules_alive(), enable(CASES["wan2.1"].build())
    site = state_of(pipe).switch.sites[0][1]  # as a copy of a processor holds it
    pipe.transformer(**captured_inputs(CASES["wan2.1"].build(), "wan2.1", steps=1, guidance=1.0)[0])
    assert schedules_alive() == before + 2  # layers
    disable_psa(pipe)
    assert schedules_alive() == before
    assert not site.run.is_on


def test_while_the_pipeline_tells_the_step_the_timestep_is_not_read(monkeypatch):
    pipe = enable(CASES["wan2.1"].build())
    monkeypatch.setattr(type(state_of(pipe).switch.run.clock), "observe", None)
    CASES["wan2.1"].run(pipe)


# what serves again is right


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize(("name", "text"), [("cogvideox", tiny.TEXT_TOKENS), ("wan2.1", 0)])
def test_a_kept_map_is_read_with_the_keys_and_values_of_its_step(name, text, terms, calls):
    terms = {"key_variance": terms, "value_tilt": terms}
    preset = SMALL.replace(refresh_every=3, **terms)
    CASES[name].run(enable_psa(CASES[name].build(), preset), steps=3)
    number = len(calls) // 3
    video = tiny.GRID[0] * tiny.GRID[1] * tiny.GRID[2]
    order = torch.cat([video_order(tiny.GRID, "gilbert", (2, 8, 8)) + text, torch.arange(text)])
    case = {"block_m": 16, "block_n": 16, "order": order, "segments": [video, text], **terms}
    for place in (0, number - 1):  # the first and the last layer, and of Wan both branches
        first, last = calls[place], calls[2 * number + place]
        assert last["given"] is first["used"]
        q, k, v = last["qkv"]
        # decided here once more, from what the layer saw in the first step
        _, schedule = psa_attention(*first["qkv"], preset, **last["place"], return_schedule=True)
        level_map = schedule.to_level_map()
        truth = oracle.oracle_attention(q, k, v, level_map, **case)
        layout = make_layout(tiny.GRID, text, True, 16, 16, "gilbert", (2, 8, 8), q.device)
        pyramid = reference.build_pyramid(k, v, layout, (1, 2, 8), **terms)
        schedule = reference.make_schedule(level_map, (1, 2, 8), 16)
        plain = reference.attend(q, k, v, pyramid, schedule, layout, scale=q.shape[-1] ** -0.5)
        assert_within_budget(last["out"], truth, plain)
        stale = oracle.oracle_attention(*first["qkv"], level_map, **case)
        assert not torch.allclose(truth, stale, rtol=0.01), "keys and values must have moved on"


def test_density_is_that_of_what_ran(calls):
    mode = {"mask_mode": "thresholdbound", "mask_ratios": {1: [0, 0.2], 2: [0.2, 0.4], 0: [0.4, 1]}}
    pipe = enable(CASES["wan2.1"].build(), **mode, report=True)
    CASES["wan2.1"].run(pipe)
    densities = [record["density"] for record in records(pipe)]
    assert densities == pytest.approx([float(call["used"].density()) for call in calls])
    assert densities[4:8] == densities[:4]
    assert densities[12:] != densities[:4]


# which branch


@pytest.fixture
def denoiser():
    denoiser = tiny.wan_transformer(layers=1)
    denoiser.set_attn_processor(PSAProcessor(**TINY_PRESET, refresh_every=2))
    return denoiser


@pytest.fixture
def bare(denoiser, calls):
    """The denoiser without a pipeline, and inputs for it: `run(timestep, text)`."""

    def run(timestep, text, grid=tiny.GRID):
        latents = torch.linspace(0, 1, 16 * grid[0] * grid[1] * grid[2] * 4).view(1, 16, grid[0], 2 * grid[1], -1)
        denoiser(latents * timestep, torch.tensor([timestep]), text)
        return calls[-1]

    return run


def texts():
    return torch.ones(1, 8, 32), -torch.ones(1, 8, 32)


def test_branches_are_known_by_their_text_not_by_their_order(bare):
    positive, negative = texts()
    made = {"+": bare(9.0, positive)["used"], "-": bare(9.0, negative)["used"]}
    assert bare(8.0, negative)["given"] is made["-"]
    assert bare(8.0, positive)["given"] is made["+"]


def test_a_branch_that_sits_out_leaves_the_other_its_map(bare):
    positive, negative = texts()
    bare(9.0, positive)
    made = bare(9.0, negative)["used"]
    assert bare(8.0, negative)["given"] is made


def test_forwards_of_one_step_with_one_text_are_told_apart_by_order(bare):
    positive, _ = texts()
    made = [bare(9.0, positive) for _ in range(3)]
    assert all(call["given"] is None for call in made)
    assert [bare(8.0, positive)["given"] for _ in range(2)] == [call["used"] for call in made[:2]]


def test_forwards_beyond_the_bound_decide_anew_and_leave_the_others_their_maps(bare):
    text = texts()[0]
    made = [bare(9.0, text) for _ in range(MOST_BRANCHES + 2)]
    again = [bare(8.0, text)["given"] for _ in range(MOST_BRANCHES + 2)]
    assert again == [call["used"] for call in made[:MOST_BRANCHES]] + [None] * 2


def test_one_timestep_again_and_again_does_not_fill_the_memory(bare, calls):
    before, text = schedules_alive(), texts()[0]
    for _ in range(3 * MOST_BRANCHES):
        bare(9.0, text)
    calls.clear()
    assert schedules_alive() - before == MOST_BRANCHES + 1  # with that of the forward that may still run


def test_when_other_processors_are_set_nothing_is_held(bare, calls, denoiser):
    before, ours = schedules_alive(), denoiser.blocks[0].attn1.processor
    bare(9.0, texts()[0])
    last = calls.copy()
    denoiser.set_attn_processor(WanAttnProcessor())
    bare(8.0, texts()[0])
    assert calls == last
    calls.clear(), last.clear()
    assert schedules_alive() == before
    assert isinstance(ours, PSAProcessor)  # which the user may keep


def test_a_text_that_is_made_anew_in_every_step_never_gets_the_map_of_another(bare):
    assert [bare(timestep, torch.full((1, 8, 32), timestep))["given"] for timestep in (9.0, 8.0, 7.0)] == [None] * 3


def test_a_view_of_the_same_text_is_the_same_branch(bare):
    both = torch.cat(texts())
    made = [bare(9.0, part) for part in both.split(1)]
    assert [bare(8.0, part)["given"] for part in both.split(1)] == [call["used"] for call in made]


def test_a_part_of_a_text_is_another_branch(bare):
    positive, _ = texts()
    bare(9.0, positive)
    assert bare(8.0, positive[:, :4])["given"] is None


def test_another_grid_drops_it(bare):
    positive, _ = texts()
    assert bare(9.0, positive)["given"] is None
    assert bare(8.0, positive, (3, 5, 7))["given"] is None
    made = bare(7.0, positive)  # the first grid again
    assert made["given"] is None
    assert bare(6.0, positive)["given"] is made["used"]


def test_a_rising_timestep_is_another_run(bare):
    positive, _ = texts()
    bare(9.0, positive)
    assert bare(9.5, positive)["given"] is None
    assert bare(9.0, positive)["given"] is not None


def test_a_segment_of_a_run_is_a_round_of_its_own():
    kept, text = KeptSchedules(9), torch.ones(1)
    attention = lambda schedule: (None, schedule or object())  # noqa: E731
    uses = [kept.branch("denoiser", text, now).attend("layer", (), attention)[2] for now in [(1, 0), (1, 1), (2, 0)]]
    assert uses == [False, True, False]
    assert not kept.branch("denoiser", text, (1, 5)).attend("layer", (), attention)[2], "of a round that is over"
    assert not kept.branch("denoiser", text, (1, 4)).attend("layer", (), attention)[2], "of a step to come"


def test_samples_with_unlike_texts_have_a_map_each(decided, calls):
    name = "hunyuan-video"
    pipe = enable(ALL_CASES[name].build(), report=True)
    given = {"prompt": ["a cat", "a dog that barks"], "negative_prompt": ["bad", "blurry"]}
    ALL_CASES[name].run(pipe, steps=3, **given)
    assert {call["qkv"][0].shape[0] for call in calls} == {1}
    assert decided["importance"] == len(calls) / 3 == 2 * 2 * 2  # samples, layers, branches
    assert {record["step"] for record in records(pipe) if not record["kept"]} == {0}


@pytest.mark.parametrize("name", ALL_CASES)
def test_every_family_keeps_its_maps(name, decided, calls):
    case = ALL_CASES[name]
    pipe = enable(case.build(), report=True, refresh_every=2)
    case.run(pipe)
    assert {record["kept"]: record["step"] % 2 for record in records(pipe)} == {False: 0, True: 1}
    assert len({(record["kept"], record["step"] % 2) for record in records(pipe)}) == 2
    assert decided["importance"] == sum(call["given"] is None for call in calls) == len(calls) / 2


# where it is not kept


def test_without_a_step_nothing_is_kept_and_it_is_said(caplog, decided):
    pipe = enable(CASES["wan2.1"].build(), report=True)
    assert state_of(pipe).switch.run.branch("transformer", {"encoder_hidden_states": torch.ones(1)}) is None
    site = state_of(pipe).switch.sites[0][1]
    site.run.branch = lambda denoiser, inputs: None
    CASES["wan2.1"].run(pipe)
    assert decided["importance"] == 16
    assert {(record["kept"], record["reason"]) for record in records(pipe)} == {
        (False, "nothing tells the denoising step")
    }
    assert caplog.text.count("PSA runs blocks.0.attn1 without keeping its level map: nothing tells the") == 1


def test_in_training_nothing_is_kept(decided):
    pipe = enable(CASES["wan2.1"].build(), report=True)
    inputs = captured_inputs(pipe, "wan2.1", steps=1, guidance=1.0)[0]
    decided.clear()
    with torch.enable_grad():
        for timestep in (900, 800):
            pipe.transformer(**{**inputs, "timestep": torch.tensor([timestep])})
    assert decided["importance"] == 4
    assert {record["reason"][:22] for record in records(pipe)} == {"a gradient is required"}


def test_while_a_cuda_graph_is_captured_nothing_is_kept_or_used(bare, monkeypatch, caplog):
    given, text = [], texts()[0]
    for timestep, is_captured in [(9.0, True), (8.0, False), (7.0, True)]:
        # of the queries: the clock goes on reading the timestep, which no graph lets it
        monkeypatch.setattr(processor, "is_captured", lambda x, now=is_captured: now and getattr(x, "ndim", 0) == 4)
        given.append(bare(timestep, text)["given"])
    assert given == [None] * 3
    assert caplog.text.count("a CUDA graph is being captured") == 1


@torch.no_grad()
def test_a_timestep_in_a_graph_that_is_captured_is_not_read_and_that_is_said(monkeypatch, caplog):
    pipe = enable_psa(CASES["wan2.1"].build(), PSAPreset(**TINY_PRESET), warmup_steps=1)
    inputs = captured_inputs(pipe, "wan2.1", steps=1, guidance=1.0)[0]
    monkeypatch.setattr(run, "is_captured", lambda x: getattr(x, "ndim", 0) == 1)
    clock = state_of(pipe).switch.run.clock
    for timestep in (900, 800):
        pipe.transformer(**{**inputs, "timestep": torch.tensor([timestep])})
        assert (clock.step, clock.dense) == (0, True)
    assert caplog.text.count("PSA runs the denoiser as in step 0: a CUDA graph is being captured") == 1


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("name", ["wan2.1", "hunyuan-video"])
def test_compiled_code_decides_in_every_call_and_says_so_once(name, report, decided, caplog):
    torch._dynamo.reset()
    processor.say_once.cache_clear()
    case = ALL_CASES[name]
    pipe = enable(case.build(), refresh_every=1)
    expected = case.run(pipe)
    disable_psa(pipe)
    decided.clear()
    enable(pipe, report=report)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=not report)
    assert torch.equal(case.run(pipe), expected)
    assert decided["importance"] == 4 * 2 * 2  # steps, layers, branches
    assert caplog.text.count("without keeping level maps: compiled code decides anew in every call") == 1
    if report:
        assert {record["reason"] for record in records(pipe)} == {
            "compiled code decides anew in every call what is read"
        }
    torch._dynamo.reset()


def test_the_report_counts_what_was_kept_and_says_why_not():
    pipe = enable(CASES["wan2.1"].build(), report=True)
    CASES["wan2.1"].run(pipe)
    assert "  level map of an earlier step in 8 calls" in psa_report(pipe).summary().splitlines()
    state_of(pipe).switch.sites[0][1].run.branch = lambda denoiser, inputs: None
    CASES["wan2.1"].run(pipe)
    lines = psa_report(pipe).summary().splitlines()
    assert "  level map not kept in 16 calls: nothing tells the denoising step" in lines
    assert not any("earlier step" in line for line in lines)
