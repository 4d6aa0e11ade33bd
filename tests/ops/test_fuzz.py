"""Random calls of the operation in plain torch: the definition within rounding, or an error that explains itself."""

import oracle
import pytest
import torch
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from operation_cases import HEADS, VIEWS, Call, calls, explained, judge, view

from psa_diffusers import PSAPreset, assign_levels, load_preset, psa_attention, pyramid_attention
from psa_diffusers.ops.orders import video_order
from psa_diffusers.presets import parse_overrides

pytestmark = pytest.mark.fuzz

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@cases(suite=40, fuzz=20_000)
@given(call=calls())
def test_attention_is_the_definition(call):
    judge(pyramid_attention(call.q, call.k, call.v, backend="torch", **call.case), call)


@st.composite
def presets(draw):
    """A preset of small blocks with anything else."""
    ends = sorted(draw(st.lists(st.integers(0, 16), min_size=4, max_size=4)))
    starts = [0, *ends]
    ratios = {f: [a / 16, b / 16] for f, a, b in zip((1, 2, 8, 16, 0), starts, [*ends, 16], strict=True)}
    return PSAPreset(
        block_size={"m": draw(st.sampled_from((16, 32))), "n": draw(st.sampled_from((16, 32)))},
        mask_ratios=ratios,
        mask_mode=draw(st.sampled_from(("topk", "thresholdbound"))),
        importance=draw(st.sampled_from(("pooled_mass", "pooled_moments", "sampled_max"))),
        use_rearrange=draw(st.booleans()),
        rearrange_method=draw(st.sampled_from(("Gilbert", "tiles", "boxes"))),
        tile_size=draw(st.sampled_from(((1, 2, 2), (2, 8, 8)))),
        use_sim_mask=draw(st.booleans()),
        key_variance=draw(st.booleans()),
        value_tilt=draw(st.booleans()),
        min_blocks=draw(st.sampled_from((0, 4))),
        min_full_ratio=draw(st.sampled_from((0, 0.06, 1))),
    )


@cases(suite=15, fuzz=5_000)
@given(
    preset=presets(),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    text=st.tuples(st.sampled_from((0, 0, 5, 17)), st.booleans()),
    form=st.tuples(st.sampled_from(HEADS), st.sampled_from(VIEWS), st.sampled_from(DTYPES)),
    seed=st.integers(0, 2**32),
)
def test_the_whole_flow_reads_what_its_schedule_says(preset, grid, text, form, seed):
    rng = torch.Generator().manual_seed(seed)
    heads, kind, dtype = form
    video = grid[0] * grid[1] * grid[2]
    q, k, v = (view(kind, (*heads, video + text[0], 16), 1, dtype, rng) for _ in "qkv")
    where = {"grid": grid, "text_tokens": text[0], "text_first": text[1], "backend": "torch"}
    out, schedule = psa_attention(q, k, v, preset, **where, return_schedule=True)
    used = preset.for_video(video)
    walk = video_order(grid, used.order, used.tile_size) + (text[0] if text[1] else 0)
    order = torch.cat([walk, torch.arange(text[0]) + (0 if text[1] else video)])
    level_map = schedule.to_level_map()
    case = {"level_map": level_map, "block_m": used.block_m, "block_n": used.block_n, "scale": None}
    case |= {"key_variance": preset.key_variance, "value_tilt": preset.value_tilt}
    judge(out, Call(q, k, v, case, False), order=order, segments=[video, text[0]])
    assert ((level_map == 1).any(-1)).all(), "every row reads a block in full"
    again = psa_attention(*(x[:, :1] for x in (q, k, v)), preset, **where, schedule=schedule[:1])
    assert torch.equal(again, out[:, :1]), "the schedule of a head gives its output"


@cases(suite=100, fuzz=10_000)
@given(
    row=st.lists(st.integers(0, 250), min_size=1, max_size=24).filter(any),
    form=st.sampled_from(
        [(d, e) for d, top in ((torch.float16, 7), (torch.bfloat16, 115), (torch.float32, 119)) for e in (0, -14, top)]
        + [(torch.float32, -140), (torch.float64, 1015), (torch.int64, 0), (torch.int32, 0), (torch.uint8, 0)]
    ),
    ends=st.lists(st.integers(0, 64), min_size=3, max_size=3).map(sorted),
    mode=st.sampled_from(("topk", "thresholdbound")),
    least=st.sampled_from((0, 0.06, 0.5, 1)),
)
def test_levels_are_the_definition(row, form, ends, mode, least):
    # whole numbers of eight bits times a power of two: every dtype holds them, and bounds are met exactly
    dtype, exponent = form
    importance = (torch.tensor(row, dtype=torch.float64) * 2.0**exponent).to(dtype)
    levels = [(f, end / 64) for f, end in zip((1, 2, 8, 0), [*ends, 64], strict=True)]
    starts = [0, *(end for _, end in levels)]
    ratios = {factor: [start, end] for (factor, end), start in zip(levels, starts, strict=False)}
    filled = [(factor, end) for (factor, end), start in zip(levels, starts, strict=False) if end > start]
    actual = assign_levels(importance[None, None, None], ratios, mode, min_full_ratio=least)
    assert actual.flatten().tolist() == oracle.oracle_levels(row, filled, mode, least)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["${oc.env:HOME}", "5:2", "0:5", "topk", "auto", "torch", "psa_cover", "???", b"x", object(), 2.0]),
    st.lists(st.integers(0, 3), max_size=4),
    st.dictionaries(st.sampled_from(["0", "0:2", "type", "m", 1, 0, None]), st.integers(0, 9), max_size=2),
    st.sampled_from([torch.ones(1, 4, 3, 3), torch.ones(1, 4, 3, 3).int(), torch.ones(36).numpy(), torch.ones(())]),
)  # fmt: skip
CALLS = {
    psa_attention: ("q", "k", "v", "preset", "grid", "text_tokens", "text_first", "scale", "backend", "schedule"),
    pyramid_attention: ("q", "k", "v", "level_map", "block_m", "block_n", "scale", "backend"),
    assign_levels: ("importance", "mask_ratios", "mask_mode", "min_full_ratio"),
    load_preset: (
        "mask_ratios", "block_size", "steps", "layers", "dense_layers", "description", "mask_mode", "tile_size",
        "min_full_ratio", "warmup_steps", "use_sim_mask", "sim_thresholds", "importance", "refresh_every", "min_blocks",
    ),
}  # fmt: skip


def good_arguments(call):
    q, k, v = torch.ones(3, 1, 4, 36, 16)
    if call is psa_attention:
        return {"q": q, "k": k, "v": v, "preset": PSAPreset(block_size={"m": 16, "n": 16})}
    if call is pyramid_attention:
        ones = torch.ones(1, 4, 3, 3, dtype=torch.int16)
        return {"q": q, "k": k, "v": v, "level_map": ones, "block_m": 16, "block_n": 16}
    if call is assign_levels:
        return {"importance": torch.rand(1, 4, 3, 3), "mask_ratios": {1: [0, 0.5], 0: [0.5, 1]}}
    return {"model": "default", "name": "psa_cover"}


@cases(suite=80, fuzz=10_000)
@given(call=st.sampled_from(list(CALLS)), data=st.data())
def test_an_argument_of_any_kind_works_or_is_explained(call, data):
    arguments = good_arguments(call)
    for name in data.draw(st.lists(st.sampled_from(CALLS[call]), min_size=1, max_size=2)):
        arguments[name] = data.draw(ANYTHING, name)
    try:
        call(**arguments)
    except Exception as error:
        if not explained(error):
            raise


PLACE = ("model", "name", "config")  # arguments of `load_preset` that are no overrides


@cases(suite=100, fuzz=3_000)
@given(text=st.one_of(st.text(max_size=12), st.from_regex(r"[a-z_.\[\]]{0,9}=[-{}\[\]&*!'\"a-z0-9:,.%$ ]{0,12}")))
def test_an_override_of_any_text_works_or_is_explained(text):
    try:
        overrides = parse_overrides([text])
        load_preset("default", "psa_cover", **{key: overrides[key] for key in overrides if key not in PLACE})
    except Exception as error:
        if not explained(error):
            raise
