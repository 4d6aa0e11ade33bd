"""What only a GPU shows: half precision at real sizes, offsets past 2**31, streams, graphs, no waiting for the host."""

import math

import forwards
import oracle
import pytest
import tiny
import torch
from budget import assert_within_budget
from torch.nn.attention import SDPBackend, sdpa_kernel

from psa_diffusers import PSAPreset, disable_psa, enable_psa, psa_attention, psa_report
from psa_diffusers.ops import reference
from psa_diffusers.ops.layout import make_layout
from psa_diffusers.ops.orders import video_order
from psa_diffusers.processors.dense import fastest_dense

pytestmark = pytest.mark.gpu

COVER = {1: [0, 0.06], 2: [0.06, 0.1], 4: [0.1, 0.2], 8: [0.2, 0.3], 16: [0.3, 0.4], 32: [0.4, 1]}
MIXES = {
    "cover": COVER,
    "top and mean": {1: [0, 0.13], 128: [0.13, 1]},
    "published": {1: [0, 0.1], 2: [0.1, 0.15], 8: [0.15, 0.35], 0: [0.35, 1]},
    "eight factors": {
        1: [0, 0.02],
        2: [0.02, 0.1],
        4: [0.1, 0.2],
        8: [0.2, 0.3],
        16: [0.3, 0.4],
        32: [0.4, 0.6],
        64: [0.6, 0.8],
        128: [0.8, 1],
    },
    "everything": {1: [0, 1]},
}
TERMS = {"key_variance": True, "value_tilt": True}
REAL = {"grid": (13, 30, 45), "text_tokens": 226}  # CogVideoX-5B at 480p


def random_qkv(dtype, heads, tokens, dim, *, batch=1, seed=0):
    """q, k, v as diffusers has them: views of ``[B, L, H, D]``."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return tuple(
        torch.randn(batch, tokens, heads, dim, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)
        for _ in range(3)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("mix", "dim", "block", "terms"),
    [
        ("cover", 64, 128, True),
        ("cover", 128, 128, True),
        ("cover", 96, 128, True),  # the general kernel
        ("cover", 64, 32, True),  # the same
        ("cover", 64, 64, True),
        ("cover", 128, 64, True),
        ("top and mean", 128, 128, True),
        ("published", 64, 128, False),
        ("eight factors", 64, 128, True),
        ("eight factors", 128, 128, True),
        ("everything", 64, 128, True),
    ],
)
def test_rows_of_a_real_video_agree_with_the_oracle(mix, dim, block, terms, dtype):
    ratios = {factor: part for factor, part in MIXES[mix].items() if factor <= block}
    preset = PSAPreset(
        mask_ratios=ratios,
        block_size={"m": block, "n": block},
        importance="pooled_moments" if terms else "pooled_mass",
        **(TERMS if terms else {}),
    )
    text, video = 226, math.prod(REAL["grid"])
    q, k, v = random_qkv(dtype, 2, text + video, dim)
    out, schedule = psa_attention(q, k, v, preset, **REAL, return_schedule=True)
    order = torch.cat([video_order(REAL["grid"], "gilbert", (2, 8, 8)) + text, torch.arange(text)])
    # the first and the last query block of the video, one in the middle, and text
    rows = {int(order[i]) for i in (0, 77, video // 2, video - 1)} | {0, text - 1}
    case = {"level_map": schedule.to_level_map()[:, 1:].cpu(), "block_m": block, "block_n": block, "only": rows}
    case |= {"order": order, "segments": [video, text], "key_variance": terms, "value_tilt": terms}
    head = [x[:, 1:].cpu() for x in (q, k, v)]
    truth = oracle.oracle_attention(*head, **case)
    # what rounding alone costs: the same map read by the torch stages, in the same dtype
    layout = make_layout(REAL["grid"], text, True, block, block, "gilbert", (2, 8, 8), q.device)
    q, k, v = (x[:, 1:] for x in (q, k, v))
    pyramid = reference.build_pyramid(k, v, layout, preset.factors, key_variance=terms, value_tilt=terms)
    map_of_head = schedule.to_level_map()[:, 1:]
    schedule = reference.make_schedule(map_of_head, preset.factors, block)
    plain = reference.attend(q, k, v, pyramid, schedule, layout, scale=dim**-0.5).cpu()
    index = sorted(rows)
    assert_within_budget(out[0, 1, index].cpu(), truth[0, 0, index], plain[0, 0, index])


@pytest.mark.parametrize("dim", [64, 128])
def test_everything_at_factor_1_is_dense_attention(dim):
    q, k, v = random_qkv(torch.bfloat16, 2, 17776, dim)
    out = psa_attention(q, k, v, PSAPreset(mask_ratios={1: [0, 1]}, **TERMS), **REAL)
    truth = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_within_budget(out, truth, dense)


@pytest.mark.parametrize("dim", [64, 128])
def test_queries_of_zero_give_the_mean_of_the_values(dim):
    _, k, v = random_qkv(torch.float16, 2, 17776, dim)
    out = psa_attention(torch.zeros_like(k), k, v, PSAPreset(mask_ratios=COVER, **TERMS), **REAL)
    mean = v.double().mean(2, keepdim=True).expand(out.shape)
    assert_within_budget(out, mean, mean.half())


@pytest.mark.parametrize("dim", [64, 128])
def test_a_run_repeats_to_the_bit_and_heads_do_not_touch_each_other(dim):
    q, k, v = random_qkv(torch.bfloat16, 4, 17776, dim)
    preset = PSAPreset(mask_ratios=COVER, importance="pooled_moments", tilt_gain="sampled", **TERMS)
    out = psa_attention(q, k, v, preset, **REAL)
    assert torch.equal(out, psa_attention(q, k, v, preset, **REAL))
    alone = psa_attention(q[:, 2:3], k[:, 2:3], v[:, 2:3], preset, **REAL)
    assert torch.equal(out[:, 2:3], alone)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dim", [64, 128])
def test_broken_numbers_come_out_where_dense_attention_has_them(name, value, dim):
    grid = (5, 9, 23)
    tensors = dict(zip("qkv", random_qkv(torch.bfloat16, 2, math.prod(grid), dim), strict=True))
    tensors[name][0, 1, 500, 3] = value
    out = psa_attention(**tensors, preset=PSAPreset(mask_ratios=COVER, **TERMS), grid=grid)
    dense = torch.nn.functional.scaled_dot_product_attention(*(tensors[n].double() for n in "qkv"))
    assert torch.equal(out.isnan(), dense.isnan())


@pytest.mark.parametrize("dim", [64, 128])
def test_strides_of_a_view_give_what_a_copy_gives(dim):
    q, k, v = random_qkv(torch.bfloat16, 3, 17776, dim)
    preset = PSAPreset(mask_ratios=COVER, **TERMS)
    assert torch.equal(
        psa_attention(q, k, v, preset, **REAL), psa_attention(*(x.contiguous() for x in (q, k, v)), preset, **REAL)
    )


def test_offsets_past_two_to_the_31():
    tokens, heads = (40, 64, 70), 48
    q, k, v = random_qkv(torch.bfloat16, heads, math.prod(tokens), 128, batch=2)
    assert q.numel() > 2**31
    preset = PSAPreset(mask_ratios={1: [0, 0.02], 128: [0.02, 1]}, **TERMS)
    out = psa_attention(q, k, v, preset, grid=tokens)
    last = psa_attention(*(x[1:, -1:].clone() for x in (q, k, v)), preset, grid=tokens)
    assert torch.equal(out[1:, -1:], last)


def test_token_strides_past_two_to_the_31():
    grid, heads = (20, 72, 120), 104
    base = torch.randn(1, math.prod(grid), heads, 128, device="cuda", dtype=torch.bfloat16)
    assert base.numel() > 2**31
    x = base.transpose(1, 2)[:, -1:]  # its last tokens lie past what 32 bits can count
    preset = PSAPreset(mask_ratios={1: [0, 0.05], 128: [0.05, 1]}, **TERMS)
    assert torch.equal(
        psa_attention(x, x, x, preset, grid=grid), psa_attention(*(x.clone() for _ in range(3)), preset, grid=grid)
    )


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="cuDNN comes first on Hopper"
)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["cogvideox", "wan2.1"])
def test_a_dense_step_runs_the_kernel_of_cudnn(name, dim):
    case = tiny.CASES[name]
    pipe = case.build(head_dim=dim)
    pipe.transformer.to("cuda", torch.bfloat16)
    inputs = forwards.captured_inputs(case.build(head_dim=dim), name, steps=1, guidance=1.0)[0]
    inputs = {key: on_gpu(value) for key, value in inputs.items()}
    enable_psa(pipe, "baseline", report=True)
    with torch.no_grad():
        forwards.forward(pipe, inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            forwards.forward(pipe, inputs)
    ran = {event.key: event.count for event in profile.key_averages()}
    assert [record["kind"] for record in psa_report(pipe).records] == ["dense"] * 4  # two layers, twice
    assert ran.get("aten::_scaled_dot_product_cudnn_attention", 0) >= 2, ran  # cross-attention is left to torch


def on_gpu(value):
    if isinstance(value, tuple):
        return tuple(map(on_gpu, value))
    if isinstance(value, torch.Tensor):
        return value.to("cuda", torch.bfloat16 if value.is_floating_point() else None)
    return value


@pytest.mark.parametrize("kind", ["plain", "strided", "mask", "grouped", "float32"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_fastest_dense_kernels_are_dense_attention(dim, kind):
    q, k, v = random_qkv(torch.float32 if kind == "float32" else torch.bfloat16, 4, 1000, dim)
    given = {}
    if kind == "plain":
        q, k, v = (x.contiguous() for x in (q, k, v))
    if kind == "mask":
        given = {"attn_mask": torch.ones(1000, 1000, dtype=torch.bool, device="cuda").tril()}
    if kind == "grouped":
        k, v, given = k[:, :2], v[:, :2], {"enable_gqa": True}
    with fastest_dense(q):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **given)
    truth = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **given)
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, **given)
    assert_within_budget(out, truth, plain)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # its own announcement
def test_a_call_does_not_wait_for_the_gpu():
    q, k, v = random_qkv(torch.bfloat16, 2, 17776, 64)
    preset = PSAPreset(mask_ratios=COVER, importance="pooled_moments", tilt_gain="sampled", **TERMS)
    psa_attention(q, k, v, preset, **REAL)  # the layout is made, and the kernels compiled, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        psa_attention(q, k, v, preset, **REAL)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dim", [64, 128])
def test_a_call_can_be_captured_as_a_graph(dim):
    q, k, v = random_qkv(torch.bfloat16, 2, 17776, dim)
    preset = PSAPreset(mask_ratios=COVER, importance="pooled_moments", tilt_gain="sampled", **TERMS)
    psa_attention(q, k, v, preset, **REAL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = psa_attention(q, k, v, preset, **REAL)
    for x, y in zip((q, k, v), random_qkv(torch.bfloat16, 2, 17776, dim, seed=1), strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(out, psa_attention(q, k, v, preset, **REAL))


@torch.no_grad()
def test_a_graph_of_a_denoiser_that_keeps_level_maps_decides_in_every_replay():
    case = tiny.CASES["wan2.1"]
    pipe = case.build(head_dim=64)
    inputs = forwards.captured_inputs(case.build(head_dim=64), "wan2.1", steps=1, guidance=1.0)[0]
    inputs = {key: on_gpu(value) for key, value in inputs.items()}
    pipe.transformer.to("cuda", torch.bfloat16)
    enable_psa(pipe, PSAPreset(mask_ratios={1: [0, 0.2], 4: [0.2, 1]}, block_size={"m": 16, "n": 16}, refresh_every=2))
    forwards.forward(pipe, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forwards.forward(pipe, inputs)
    inputs["hidden_states"].copy_(inputs["hidden_states"].flip(-1))
    graph.replay()
    disable_psa(pipe)
    enable_psa(pipe, PSAPreset(mask_ratios={1: [0, 0.2], 4: [0.2, 1]}, block_size={"m": 16, "n": 16}))
    assert torch.equal(out, forwards.forward(pipe, inputs))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_of_training_is_planned_by_the_kernels_and_can_be_captured(monkeypatch):
    from psa_diffusers.ops import triton as triton_backend

    planned, real = [], triton_backend.plan_blocks
    monkeypatch.setattr(
        triton_backend, "plan_blocks", lambda *args, **kwargs: planned.append(1) or real(*args, **kwargs)
    )
    inputs = [x.contiguous().requires_grad_() for x in random_qkv(torch.bfloat16, 2, 3360, 64)]
    preset = PSAPreset(mask_ratios=COVER, importance="pooled_moments", tilt_gain="sampled", **TERMS)
    where = {"grid": (13, 16, 16), "text_tokens": 32}

    def step():
        out = psa_attention(*inputs, preset, **where)
        return out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = step()
    graph.replay()
    assert len(planned) == 3
    for x, y in zip(got, expected, strict=True):
        # the order of a sum over query blocks may change: a rounding or two of the largest
        torch.testing.assert_close(x, y, rtol=0, atol=float(4 * torch.finfo(x.dtype).eps * y.abs().max()))
    out, schedule = psa_attention(*(x.detach() for x in inputs), preset, **where, return_schedule=True)
    plain = psa_attention(*inputs, preset, **where, schedule=schedule)
    wide = psa_attention(*(x.detach().double() for x in inputs), preset, **where, schedule=schedule)
    assert_within_budget(out, wide, plain.detach())


def test_two_streams_do_not_get_into_each_others_way():
    preset = PSAPreset(mask_ratios=COVER, **TERMS)
    inputs = [random_qkv(torch.bfloat16, 4, 17776, 64, seed=seed) for seed in range(2)]
    expected = [psa_attention(*x, preset, **REAL) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(psa_attention(*inputs[i], preset, **REAL))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(out, expected[i]) for out in results[i])


def test_compiled_code_is_one_graph():
    q, k, v = random_qkv(torch.bfloat16, 2, 17776, 64)
    preset = PSAPreset(mask_ratios=COVER, **TERMS)

    def layer(q, k, v):
        return psa_attention(q, k, v, preset, **REAL) * 2

    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(q, k, v), layer(q, k, v))


def test_memory_beyond_the_result_is_less_than_that_of_q_k_and_v():
    q, k, v = random_qkv(torch.bfloat16, 12, 64800, 128)
    preset = PSAPreset(mask_ratios=COVER, importance="pooled_moments", tilt_gain="sampled", **TERMS)
    psa_attention(q, k, v, preset, grid=(18, 45, 80))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = psa_attention(q, k, v, preset, grid=(18, 45, 80))
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra - out.numel() * out.element_size() <= 3 * q.numel() * q.element_size()
