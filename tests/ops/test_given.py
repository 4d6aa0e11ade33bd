"""Schedules that are handed in: other strides, other heads, and numbers that no key block has."""

import copy
from dataclasses import replace

import oracle
import pytest
import torch
from budget import assert_within_rounding

from psa_diffusers import PSAPreset, psa_attention
from psa_diffusers.ops import given
from psa_diffusers.ops.orders import video_order
from psa_diffusers.ops.reference import make_schedule

PRESET = PSAPreset(block_size={"m": 16, "n": 16}, mask_ratios={1: [0, 0.3], 4: [0.3, 0.6], 0: [0.6, 1]})
TOKENS = 90


@pytest.fixture
def qkv(rng):
    return [torch.randn(2, 4, TOKENS, 16, generator=rng) for _ in "qkv"]


@pytest.fixture
def schedule(qkv):
    return psa_attention(*qkv, PRESET, return_schedule=True)[1]


def other_memory(part):
    """The same numbers, the first axis varying fastest, with something else between them."""
    room = part.new_full((*part.shape[::-1], 2), 77)
    room[..., 1] = part.permute(3, 2, 1, 0)
    return room[..., 1].permute(3, 2, 1, 0)


@pytest.mark.parametrize("which", [("block_ids",), ("offsets",), ("block_ids", "offsets")])
def test_strides_do_not_matter(which, qkv, schedule):
    moved = replace(schedule, **{name: other_memory(getattr(schedule, name)) for name in which})
    assert not getattr(moved, which[0]).is_contiguous()
    assert torch.equal(psa_attention(*qkv, PRESET, schedule=moved), psa_attention(*qkv, PRESET, schedule=schedule))


HEADS = [2, -1, [3], [3, 0, 2], slice(1, 3), slice(None, None, 3), torch.tensor([1, 1, 0]), range(1, 4)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_schedule_of_some_heads_is_read_by_these_heads(heads, qkv, schedule):
    index = torch.arange(4)[heads if not isinstance(heads, range) else list(heads)].view(-1)
    some = [x.index_select(1, index) for x in qkv]
    chosen = schedule[heads]
    assert torch.equal(chosen.to_level_map(), schedule.to_level_map()[:, index])
    assert all(part.is_contiguous() for part in (chosen.block_ids, chosen.offsets))
    out = psa_attention(*some, PRESET, schedule=chosen)
    case = {"level_map": chosen.to_level_map(), "block_m": 16, "block_n": 16}
    case["order"] = order()
    assert_within_rounding(out, oracle.oracle_attention(*some, **case), *some, **case)


def order():
    return video_order((1, 1, TOKENS), "gilbert", (2, 8, 8))


def test_a_head_that_is_not_there_is_an_index_error(schedule):
    with pytest.raises(IndexError):
        schedule[4]


def change(name, number, place=(0, 1, 2, 0)):
    def changed(schedule):
        part = getattr(schedule, name).clone()
        part[place] = number
        return replace(schedule, **{name: part})

    return changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change("block_ids", 6), "must lie in 0 to 5.*got ids from 0 to 6"),
        (change("block_ids", -1), "must lie in 0 to 5.*got ids from -1"),
        (change("block_ids", 3, (0, 0, 0, slice(0, 2))), "names one twice"),
        (lambda s: replace(s, block_ids=s.block_ids + 3), "must lie in 0 to 5"),
        (change("offsets", 7, (1, 3, 5, 2)), "rise from 0 to at most 6"),
        (change("offsets", 1), "rise from 0"),
        (change("offsets", -1, (0, 0, 0, 1)), "rise from 0"),
        (change("offsets", 5, (0, 0, 0, 1)), "rise from 0"),
        (lambda s: replace(s, block_ids=s.block_ids.int()), "dtype of the ids = torch.int16; got .* = torch.int32"),
        (lambda s: replace(s, block_ids=s.block_ids.float()), "dtype of the ids"),
        (lambda s: replace(s, offsets=s.offsets.long()), "dtype of the offsets = torch.int32; got .* = torch.int64"),
        (lambda s: replace(s, offsets=s.offsets.to("meta")), "device of the offsets"),
    ],
)
def test_numbers_out_of_range_are_refused(changed, message, qkv, schedule):
    with pytest.raises(ValueError, match=rf"(?s)schedule.*{message}.*Leave it out"):
        psa_attention(*qkv, PRESET, schedule=changed(schedule))


@pytest.mark.parametrize("name", ["block_ids", "offsets"])
def test_a_part_that_is_no_tensor_is_a_type_error(name, qkv, schedule):
    with pytest.raises(TypeError, match=f"schedule.{name} must be a tensor, got a list"):
        psa_attention(*qkv, PRESET, schedule=replace(schedule, **{name: getattr(schedule, name).tolist()}))


def test_what_follows_the_last_kept_block_is_not_looked_at(qkv, schedule):
    ids = schedule.block_ids.clone()
    ids[torch.arange(6) >= schedule.offsets[..., -1:]] = 99
    loose = replace(schedule, block_ids=ids)
    assert torch.equal(psa_attention(*qkv, PRESET, schedule=loose), psa_attention(*qkv, PRESET, schedule=schedule))


def test_numbers_are_looked_at_once(qkv, schedule, monkeypatch):
    looked = []
    monkeypatch.setattr(type(schedule), "to_level_map", lambda self: looked.append(1) or torch.ones(1))

    def use(given_schedule):
        looked.clear()
        try:
            psa_attention(*qkv, PRESET, schedule=given_schedule)
        except ValueError:  # of the map that is not there
            return True
        return bool(looked)

    assert not use(schedule), "made by a call"
    assert use(copy.copy(schedule)), "of another hand"
    given.know_right(other := copy.copy(schedule))
    assert not use(other)
    other.block_ids.add_(0)
    assert use(other), "written to"
    with torch.inference_mode():
        _, own = psa_attention(*qkv, PRESET, return_schedule=True)
        assert not use(own)
        assert use(replace(own))


def test_factors_above_16384_are_no_skips(rng):
    block = 2**15
    level_map = torch.tensor([[[[block, 0], [1, block // 2]]]], dtype=torch.int32)
    schedule = make_schedule(level_map, (1, block // 2, block), block)
    assert torch.equal(schedule.to_level_map(), level_map)
    assert schedule.to_level_map().dtype == torch.int32
