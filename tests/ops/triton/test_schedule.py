"""A schedule of an earlier step under the kernels, in Triton's interpreter: `refresh_every` and `schedule=`."""

from dataclasses import replace

import oracle
import pytest
import torch
from budget import assert_within_budget
from tiny import CASES, TINY_PRESET

from psa_diffusers import PSAPreset, psa_attention
from psa_diffusers.ops.orders import video_order
from psa_diffusers.pipelines.enable import enable_psa
from psa_diffusers.processors import sparse as processor

# numpy, in the interpreter, announces the logarithm of 0 and NaN, which are meant here
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

PRESET = PSAPreset(
    block_size={"m": 32, "n": 16},
    mask_ratios={1: [0, 0.2], 2: [0.2, 0.4], 8: [0.4, 0.7], 0: [0.7, 1]},
    key_variance=True,
    value_tilt=True,
)


@pytest.mark.parametrize(
    ("text_tokens", "mode", "dtype"), [(0, "thresholdbound", torch.float32), (17, "topk", torch.float16)]
)
def test_a_given_schedule_is_read_as_by_the_stages(text_tokens, mode, dtype, rng):
    earlier, later = (
        [torch.randn(1, 2, 105 + text_tokens, 16, generator=rng).to(dtype) for _ in "qkv"] for _ in range(2)
    )
    where = {"preset": PRESET.replace(mask_mode=mode), "grid": (3, 5, 7), "text_tokens": text_tokens}
    _, schedule = psa_attention(*earlier, **where, backend="triton", return_schedule=True)
    out, plain = (psa_attention(*later, **where, backend=backend, schedule=schedule) for backend in ("triton", "torch"))
    order = torch.cat([video_order((3, 5, 7), "gilbert", (2, 8, 8)) + text_tokens, torch.arange(text_tokens)])
    case = {"level_map": schedule.to_level_map(), "block_m": 32, "block_n": 16, "order": order}
    case |= {"segments": [105, text_tokens], "key_variance": True, "value_tilt": True}
    assert_within_budget(out, oracle.oracle_attention(*later, **case), plain)


def test_a_call_with_its_own_schedule_changes_no_bit(rng):
    q, k, v = (torch.randn(1, 2, 105, 16, generator=rng) for _ in "qkv")
    where = {"preset": PRESET, "grid": (3, 5, 7), "backend": "triton"}
    out, schedule = psa_attention(q, k, v, **where, return_schedule=True)
    assert torch.equal(psa_attention(q, k, v, **where, schedule=schedule), out)


def test_the_memory_of_a_schedule_does_not_matter(rng):
    q, k, v = (torch.randn(1, 4, 40, 16, generator=rng) for _ in "qkv")
    where = {"preset": PRESET, "grid": (2, 4, 5)}
    _, schedule = psa_attention(q, k, v, **where, backend="torch", return_schedule=True)
    where["backend"] = "triton"
    out = psa_attention(q, k, v, **where, schedule=schedule)
    turned = replace(schedule, block_ids=schedule.block_ids.mT.contiguous().mT)
    assert torch.equal(psa_attention(q, k, v, **where, schedule=turned), out)
    heads = slice(1, None, 2)
    views = [x[:, heads] for x in (q, k, v)]
    sliced = replace(schedule, block_ids=schedule.block_ids[:, heads], offsets=schedule.offsets[:, heads])
    for given in (sliced, schedule[heads]):
        assert torch.equal(psa_attention(*views, **where, schedule=given), out[:, heads])


def test_block_ids_out_of_range_reach_no_kernel(rng):
    q, k, v = (torch.randn(1, 2, 105, 16, generator=rng) for _ in "qkv")
    where = {"preset": PRESET, "grid": (3, 5, 7)}
    _, schedule = psa_attention(q, k, v, **where, backend="torch", return_schedule=True)
    for shift in (7, -7, 2**14):
        shifted = replace(schedule, block_ids=schedule.block_ids + shift)
        with pytest.raises(ValueError, match="must lie in 0 to 6"):
            psa_attention(q, k, v, **where, backend="triton", schedule=shifted)


@pytest.mark.parametrize("importance", ["pooled_mass", "pooled_moments", "sampled_max"])
def test_training_reads_what_the_kernels_choose(importance, rng, monkeypatch):
    from psa_diffusers.ops import triton as triton_backend

    decided, real = [], triton_backend.plan_blocks
    monkeypatch.setattr(triton_backend, "plan_blocks", lambda *args, **kw: decided.append(1) or real(*args, **kw))
    q, k, v = (torch.randn(1, 2, 105, 16, generator=rng) for _ in "qkv")
    where = {"preset": PRESET.replace(importance=importance), "grid": (3, 5, 7), "return_schedule": True}
    _, expected = psa_attention(q, k, v, **where)
    k.requires_grad_()
    out, schedule = psa_attention(q, k, v, **where)
    out.square().sum().backward()
    assert k.grad.abs().max() > 0
    assert len(decided) == 2
    assert torch.equal(schedule.to_level_map(), expected.to_level_map())


@torch.no_grad()
def test_a_pipeline_reads_with_the_kernels_what_it_reads_with_the_stages(monkeypatch):
    from psa_diffusers.ops import triton as triton_backend

    decided, given, real, attention = [], [], triton_backend.block_importance, processor.psa_attention
    monkeypatch.setattr(triton_backend, "block_importance", lambda *args, **kw: decided.append(1) or real(*args, **kw))

    def checked(q, k, v, preset, **kwargs):
        out, schedule = attention(q, k, v, preset, **kwargs)  # under the interpreter the kernels are the default
        if kwargs["schedule"] is not None:
            plain = attention(q, k, v, preset, **kwargs, backend="torch")[0]
            wide = attention(*(x.double() for x in (q, k, v)), preset, **kwargs, backend="torch")[0]
            assert_within_budget(out, wide, plain)
            given.append(schedule)
        return out, schedule

    monkeypatch.setattr(processor, "psa_attention", checked)
    case = CASES["wan2.1"]
    case.run(enable_psa(case.build(), **TINY_PRESET, refresh_every=3), steps=3, guidance=1.0, grid=(2, 4, 6))
    assert (len(decided), len(given)) == (2, 4)  # two layers, of three steps the first decides
