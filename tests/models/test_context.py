"""Tokens that are not of the grid: before it, behind it, on both sides, and more of them than of the video."""

import math

import pytest
import torch
from forwards import captured_inputs, forward
from guests import enable
from hypothesis import given
from hypothesis import strategies as st
from tiny import ALL_CASES, MISSING, OTHER_CASES, picture, pictures

from psa_diffusers.models.grid import find_grid
from psa_diffusers.pipelines.enable import disable_psa
from psa_diffusers.pipelines.report import psa_report

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    # of schedulers
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def positions(grid, start, size=32.0):
    """Positions ``[3, L]`` of a grid in raster order, eight pictures a frame but the first."""
    frames, height, width = grid
    times = start + torch.tensor([0.0, *(1.0 + 8 * frame for frame in range(frames - 1))])
    axes = times, torch.arange(height) * size, torch.arange(width) * size
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)


@st.composite
def sequences(draw):
    """A video and pieces of context on both sides, none as long as it: kept frames, keyframes of any size."""
    grid = tuple(draw(st.integers(2, 6)) for _ in range(3))
    start = draw(st.integers(0, 40))

    def piece(is_behind):
        # what follows the last frame at once would be its next one
        latest = 8 * (grid[0] - 2) if is_behind else 60
        size = grid[1:] if draw(st.booleans()) else (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
        frames = draw(st.integers(1, grid[0] - 1))
        return positions((frames, *size), start + draw(st.integers(0, latest)))

    before = [piece(False) for _ in range(draw(st.integers(0, 3)))]
    behind = [piece(True) for _ in range(draw(st.integers(0, 3)))]
    return grid, before, positions(grid, float(start)), behind


@given(sequences())
def test_the_video_is_found_wherever_the_context_stands(sequence):
    grid, before, video, behind = sequence
    placed = find_grid(torch.cat([*before, video, *behind], dim=1))
    if not any(math.isclose(float(piece[0, 0]), float(video[0, 0])) for piece in (*before, *behind)):
        assert placed == (grid, sum(piece.shape[1] for piece in before))


# in LTX-Video, whose tokens are told apart by their positions alone


def ltx_inputs(grid, context):
    """Inputs of a forward with the video first, then pieces of context: grid and time of each."""
    pipe = ALL_CASES["ltx-condition"].build()
    inputs = captured_inputs(pipe, "ltx-condition", steps=1, guidance=1.0)[0]
    places = torch.cat([positions(grid, 0.0), *(positions(piece, time) for piece, time in context)], dim=1)[None]
    tokens = torch.randn(
        1, places.shape[2], inputs["hidden_states"].shape[2], generator=torch.Generator().manual_seed(0)
    )
    times = torch.full((1, places.shape[2], 1), 500.0)
    return pipe, {**inputs, "hidden_states": tokens, "video_coords": places, "timestep": times}


def turned(inputs, order):
    """The same with tokens in another order."""
    return {
        **inputs,
        "hidden_states": inputs["hidden_states"][:, order],
        "video_coords": inputs["video_coords"][:, :, order],
        "timestep": inputs["timestep"][:, order],
    }


GRID = (4, 6, 7)
CONTEXT = [((1, 6, 7), 9.0), ((2, 6, 7), 17.0), ((1, 3, 3), 2.0)]


@pytest.mark.parametrize("in_front", [0, 1, 2, 3])
def test_where_the_context_stands_changes_nothing_but_the_order(in_front):
    pipe, inputs = ltx_inputs(GRID, CONTEXT)
    dense = forward(pipe, inputs)
    enable(pipe, report=True)
    video, sizes = math.prod(GRID), [math.prod(piece) for piece, _ in CONTEXT]
    edge = video + sum(sizes[:in_front])
    order = torch.tensor([*range(video, edge), *range(video), *range(edge, video + sum(sizes))])
    in_order = torch.tensor([*range(edge, len(order)), *range(video, edge), *range(video)])
    expected = torch.empty_like(dense)
    expected[:, in_order] = forward(pipe, turned(inputs, in_order))
    told = psa_report(pipe).records[-1]
    here = forward(pipe, turned(inputs, order))
    record = psa_report(pipe).records[-1]
    assert (record["kind"], record["grid"], record["tokens"]) == ("sparse", GRID, len(order))
    assert record["density"] == pytest.approx(told["density"])
    back = torch.empty_like(dense)
    back[:, order] = here
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(back, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_front", [False, True])
def test_with_everything_read_it_is_dense_attention(in_front):
    pipe, inputs = ltx_inputs(GRID, CONTEXT)
    count = inputs["hidden_states"].shape[1]
    order = torch.arange(count).roll(-math.prod(GRID) if in_front else 0)
    dense = forward(pipe, turned(inputs, order))
    enable(pipe, mask_ratios={1: [0, 1]}, report=True)
    torch.testing.assert_close(forward(pipe, turned(inputs, order)), dense, rtol=1e-4, atol=1e-5)
    assert {each["kind"] for each in psa_report(pipe).records} == {"sparse"}


def test_a_video_of_less_than_half_of_the_tokens_is_dense_and_says_so(caplog):
    pipe, inputs = ltx_inputs((2, 4, 5), [((1, 6, 7), 5.0)])
    dense = forward(pipe, inputs)
    enable(pipe, report=True)
    assert torch.equal(forward(pipe, inputs), dense)
    reasons = {each["reason"] for each in psa_report(pipe).records}
    assert reasons == {"the grid 2 x 4 x 5 is less than half of the 82 video tokens"}
    assert "less than half" in caplog.text


def test_several_keyframes_and_a_clip_stand_before_the_video():
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    case, (height, width) = ALL_CASES["ltx-condition"], (6 * 32, 7 * 32)
    given = [
        LTXVideoCondition(image=picture(height, width), frame_index=0),
        LTXVideoCondition(image=picture(height, width), frame_index=16),
        LTXVideoCondition(video=pictures(height, width, 9), frame_index=8),
    ]
    pipe = enable(case.build(), report=True)
    case.run(pipe, steps=2, grid=(5, 6, 7), conditions=given)
    shapes = {(each["kind"], each["grid"], each["tokens"] % 42) for each in psa_report(pipe).records}
    assert shapes == {("sparse", (5, 6, 7), 0)}
    assert {each["tokens"] > 5 * 42 for each in psa_report(pipe).records} == {True}


@pytest.mark.parametrize(("frames", "tile", "overlap"), [(97, 48, 16), (57, 32, 8), (73, 40, 24)])
def test_every_window_of_a_long_video_has_the_grid_of_its_own_frames(frames, tile, overlap):
    case = OTHER_CASES.get("ltx-long") or pytest.skip("this diffusers has no such pipeline")
    pipe = enable(case.build(), report=True)
    case.run(pipe, steps=2, guidance=1.0, num_frames=frames, temporal_tile_size=tile, temporal_overlap=overlap)
    shapes = {(each["kind"], each["grid"], each["tokens"]) for each in psa_report(pipe).records}
    assert len(shapes) > 1
    for kind, grid, tokens in shapes:
        assert kind == "sparse"
        assert grid[1:] == (6, 7)
        kept = tokens - math.prod(grid)
        assert kept in (0, overlap // 8 * 42)
        assert grid[0] <= tile // 8


def test_keyframes_behind_the_video_of_ltx2_are_no_part_of_its_grid():
    if "ltx2.3-condition" in MISSING:
        pytest.skip("this diffusers has no such pipeline")
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    case = ALL_CASES["ltx2.3-condition"]
    plain = {"crf": 0} if "crf" in LTX2VideoCondition.__dataclass_fields__ else {}
    frame = picture(6 * 32, 7 * 32)
    given = [LTX2VideoCondition(frames=frame, index=index, **plain) for index in (1, 2, -1)]
    pipe = enable(case.build(), report=True)
    case.run(pipe, steps=1, conditions=given)
    assert {(each["grid"], each["tokens"]) for each in psa_report(pipe).records} == {((3, 6, 7), 6 * 42)}
    assert {each["kind"] for each in psa_report(pipe).records} == {"sparse"}
    inputs = captured_inputs(pipe, "ltx2.3-condition", steps=1, conditions=given)[0]
    disable_psa(pipe)
    dense = forward(pipe, inputs)
    enable(pipe, mask_ratios={1: [0, 1]})
    torch.testing.assert_close(forward(pipe, inputs), dense, rtol=1e-4, atol=1e-5)
