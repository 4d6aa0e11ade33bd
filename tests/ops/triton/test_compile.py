"""Every launch that a sparse attention makes, compiled ahead of time for chips that are not there."""

import os
from types import SimpleNamespace

import pytest
import torch
from ahead import product_loops, record_launches, resources
from triton.backends.compiler import GPUTarget

from psa_diffusers import PSAPreset
from psa_diffusers.ops.layout import flat_layout, make_layout
from psa_diffusers.ops.types import LevelRule

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="the interpreter compiles nothing; this runs in a process of its own",
)

# compute capability: matrix unit in the tuning table, KiB of shared memory that a program may have
CHIPS = {80: ("mma", 163), 89: ("mma", 99), 90: ("wgmma", 227), 100: ("tcgen05", 227), 120: ("mma", 99)}
COVER = {1: [0, 0.06], 2: [0.06, 0.1], 4: [0.1, 0.2], 8: [0.2, 0.3], 16: [0.3, 0.4], 32: [0.4, 0.7], 128: [0.7, 1]}


def all_launches(monkeypatch, head_dim, unit):
    """The launches of a run with every option on, and of one with every option off."""
    from psa_diffusers.ops import triton as triton_backend
    from psa_diffusers.ops.triton import tuning

    monkeypatch.setattr(tuning, "matrix_unit", lambda device: unit)
    q, k, v = (torch.zeros(1, 226 + 13 * 30 * 45, 2, head_dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))

    def run(importance, mode, terms):
        preset = PSAPreset(mask_ratios=COVER)
        layout = make_layout((13, 30, 45), 226, True, 128, 128, "gilbert", (2, 8, 8), q.device)
        pyramid = triton_backend.build_pyramid(k, v, layout, preset.factors, key_variance=terms, value_tilt=terms)
        if terms:
            pyramid = triton_backend.fit_tilt(pyramid, q, k, v, layout, 0.1)
        scores = triton_backend.block_importance(q, k, layout, importance, 0.1)
        cap = triton_backend.key_cosine_cap(k, layout, ((2, 0.7), (4, 0.65), (8, 0.6))) if terms else None
        rule = (LevelRule(preset.levels, mode), preset.factors)
        schedule = triton_backend.plan_blocks(scores, layout, *rule, cap=cap, finite=pyramid.finite)
        triton_backend.attend(q, k, v, pyramid, schedule, layout, scale=0.1)

    def everything():
        run("pooled_moments", "topk", True)
        run("sampled_max", "thresholdbound", False)
        layout = flat_layout(k.shape[2], 128, 128, k.device)
        for factors in ((1, 4, 16, 64), (1, 128)):  # what the presets step by: other covariances, other cells kept
            triton_backend.build_pyramid(k, v, layout, factors, key_variance=True, value_tilt=True)

    return record_launches(monkeypatch, everything)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", CHIPS)
def test_every_kernel_compiles_fits_and_spills_nothing(capability, head_dim, monkeypatch, tmp_path):
    unit, kibibytes = CHIPS[capability]
    launches = all_launches(monkeypatch, head_dim, unit)
    assert len({launch.name for launch in launches}) >= 6, "one kernel a stage at least"
    for launch in launches:
        compiled = launch.compile(GPUTarget("cuda", capability, 32))
        assert compiled.metadata.shared <= kibibytes * 1024, f"{launch.name}: {compiled.metadata.shared} bytes shared"
        used = resources(compiled, tmp_path)
        assert used["stack"] == 0, f"{launch.name} spills: {used}"


@pytest.mark.parametrize("block", [16, 32, 64])
def test_planning_with_small_blocks_spills_nothing_on_hopper(block, monkeypatch, tmp_path):
    """A short video gets smaller blocks than its preset names: `PSAPreset.for_video`."""
    from psa_diffusers.ops import triton as triton_backend
    from psa_diffusers.ops.triton import tuning

    monkeypatch.setattr(tuning, "matrix_unit", lambda device: "wgmma")
    k = torch.zeros(1, 4096, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    layout = flat_layout(4096, max(32, block), block, k.device)

    def run():
        for factors in ((1, 2, 4, 8, 16), (1, 4, 16), (1, block)):
            pyramid = triton_backend.build_pyramid(k, k, layout, factors, key_variance=True, value_tilt=True)
        for method in ("pooled_mass", "pooled_moments", "sampled_max"):
            triton_backend.block_importance(k, k, layout, method, 0.1, pyramid)

    launches = record_launches(monkeypatch, run)
    assert {"pyramid_kernel", "covariance_kernel", "importance_kernel"} <= {launch.name for launch in launches}
    for launch in launches:
        used = resources(launch.compile(GPUTarget("cuda", 90, 32)), tmp_path)
        assert used["stack"] == 0, f"{launch.name} spills: {used}"


@pytest.mark.parametrize("num_blocks", [1024, 4096])
def test_the_selection_spills_nothing_on_long_rows(num_blocks, monkeypatch, tmp_path):
    from psa_diffusers.ops import triton as triton_backend

    preset = PSAPreset(mask_ratios=COVER)
    layout = flat_layout(16 * num_blocks, 16, 16, torch.device("cpu"))
    importance = torch.zeros(1, 1, 2, num_blocks)
    rule = (LevelRule(preset.levels, "topk"), preset.factors)
    (launch,) = record_launches(monkeypatch, lambda: triton_backend.plan_blocks(importance, layout, *rule))
    used = resources(launch.compile(GPUTarget("cuda", 90, 32)), tmp_path)
    assert used["stack"] == 0, f"{launch.name} spills: {used}"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_kernel_compiles_for_amd(head_dim, monkeypatch):
    for launch in all_launches(monkeypatch, head_dim, "mfma"):
        compiled = launch.compile(GPUTarget("hip", "gfx942", 64))
        assert compiled.metadata.shared <= 64 * 1024, f"{launch.name}: {compiled.metadata.shared} bytes shared"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_for_hopper_compiles_fits_and_keeps_its_products_in_flight(
    head_dim, block_m, dtype, monkeypatch, tmp_path
):
    from psa_diffusers.ops import triton as triton_backend
    from psa_diffusers.ops.triton import attend_hopper

    chip = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    q, k, v = (torch.zeros(1, 226 + 13 * 30 * 45, 2, head_dim, dtype=dtype).transpose(1, 2) for _ in range(3))
    preset = PSAPreset(mask_ratios=COVER)
    layout = make_layout((13, 30, 45), 226, True, block_m, 128, "gilbert", (2, 8, 8), q.device)

    def run():
        pyramid = triton_backend.build_pyramid(k, v, layout, preset.factors, key_variance=True, value_tilt=True)
        shape = (1, 2, layout.num_query_blocks, layout.num_key_blocks)
        schedule = triton_backend.make_schedule(torch.ones(shape, dtype=torch.int16), preset.factors, 128)
        assert attend_hopper.takes(q, k, v, layout, schedule, 0.1)
        attend_hopper.attend(q, k, v, pyramid, schedule, layout, scale=0.1)

    launch = next(launch for launch in record_launches(monkeypatch, run) if launch.kernel.is_gluon())
    compiled = launch.compile(GPUTarget("cuda", 90, 32))
    programs = 2 if block_m == 64 else 1  # on a multiprocessor, each with 1 KiB that the chip keeps
    assert programs * (compiled.metadata.shared + 1024) <= 228 * 1024, f"{compiled.metadata.shared} bytes shared"
    loops = product_loops(compiled, tmp_path)
    assert len(loops) >= 2
    for loop in loops:
        # one WARPGROUP instruction a product: the assembler waits for each before it starts the next
        assert loop["WARPGROUP"] < loop["HGMMA"], f"products are serialised: {loop}"
        # newer assemblers keep a few numbers of 500 instructions in memory at head dimension 128
        assert loop["LDL"] + loop["STL"] <= 20, f"registers are spilled in a loop: {loop}"
