"""Random calls of the Triton kernels in Triton's interpreter: the definition within rounding.

bfloat16 is left to a GPU: the interpreter computes noise in it.
"""

import pytest
import torch
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from operation_cases import Call, calls, judge, view

from psa_diffusers import PSAPreset, psa_attention, pyramid_attention
from psa_diffusers.ops.orders import video_order

# numpy, in the interpreter, announces the logarithm of 0 and NaN, which are meant here
pytestmark = [pytest.mark.fuzz, pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DTYPES = (torch.float32, torch.float16)


@cases(suite=6, fuzz=2_500)
@given(call=calls(dtypes=DTYPES, longest=24, least_block=16))
def test_attention_is_the_definition(call):
    judge(pyramid_attention(call.q, call.k, call.v, backend="triton", **call.case), call)


@cases(suite=2, fuzz=100)
@given(
    importance=st.sampled_from(("pooled_mass", "pooled_moments", "sampled_max")),
    mode=st.sampled_from(("topk", "thresholdbound")),
    terms=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    text=st.sampled_from((0, 5)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_the_whole_flow_reads_what_its_schedule_says(importance, mode, terms, text, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (view("transposed", (2, 2, 30 + text, 16), 1, dtype, rng) for _ in "qkv")
    preset = PSAPreset(
        block_size={"m": 16, "n": 16},
        mask_ratios={1: [0, 0.3], 4: [0.3, 0.6], 16: [0.6, 0.8], 0: [0.8, 1]},
        mask_mode=mode,
        importance=importance,
        use_sim_mask=terms[0],
        key_variance=terms[1],
        value_tilt=terms[2],
    )
    where = {"grid": (2, 3, 5), "text_tokens": text, "backend": "triton"}
    out, schedule = psa_attention(q, k, v, preset, **where, return_schedule=True)
    case = {"level_map": schedule.to_level_map(), "block_m": 16, "block_n": 16, "scale": None}
    case |= {"key_variance": terms[1], "value_tilt": terms[2]}
    order = torch.cat([video_order((2, 3, 5), "gilbert", (2, 8, 8)) + text, torch.arange(text)])
    judge(out, Call(q, k, v, case, False), order=order, segments=[30, text])
    again = psa_attention(*(x[:, 1:] for x in (q, k, v)), preset, **where, schedule=schedule[1:])
    assert torch.equal(again, out[:, 1:]), "the schedule of a head gives its output"
