"""PSA together with everything else that people switch on in a pipeline, cell by cell.

Each cell is compared with the same thing under dense attention (at factor one everywhere they must agree) and with PSA
alone. What a cell promises stands in its `composes` line, and the test fails unless it is so; docs/composition.md is
the table of these lines. `python tests/test_composition.py` writes it.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import logging
import pickle
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from forwards import captured_inputs, error
from lora_files import lora_file
from packaging.version import Version
from tiny import CASES, TINY_PRESET

from psa_diffusers.lora.load import load_psa_lora, unload_psa_lora
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.presets.schema import list_presets, load_preset
from psa_diffusers.processors import base as ours
from psa_diffusers.processors.base import PSAProcessor

MODELS = {"cogvideox": "CogVideoX", "wan2.1": "Wan"}
PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
BIT, ROUNDING, REFUSED = "equal to the bit", "equal to rounding", "refused"
CPU = torch.device("cpu")
SPARSE = {**TINY_PRESET, "warmup_steps": 1}
ONE = {**TINY_PRESET, "mask_ratios": {1: [0, 1]}}
"""Sparse from the first step to the last, reading everything: dense attention by another way."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # FasterCache
]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# the table


@dataclass
class Row:
    """One line of the table: what is combined, what comes out by model, and what to know."""

    title: str
    cells: dict[str, str] = field(default_factory=dict)
    remark: str = ""


ROWS: list[Row] = []


def composes(
    title: str,
    *,
    outcome: str = BIT,
    models: tuple[str, ...] = tuple(MODELS),
    orders: tuple[str, ...] = ("before", "after"),
    refusal: str = "",
    remark: str = "",
    needs: str = "",
    missing: dict[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Mark a test as a row of the table.

    The test takes the name of a model and, if it has orders, when the technique is applied; it returns what it found
    to hold, which must be `outcome` or better.

    Args:
        title: What is combined with PSA.
        outcome: BIT, ROUNDING or REFUSED.
        models: The models with a cell.
        orders: Whether the technique is applied before or after `enable_psa`; empty if that means nothing.
        refusal: For REFUSED: the message, as a regular expression without special characters.
        remark: What a user should know.
        needs: Package without which the test is skipped.
        missing: What stands in the cell of a model that has none.
    """

    def mark(test: Any) -> Any:
        text = f"{outcome}: “{refusal}”" if outcome == REFUSED else outcome
        ROWS.append(Row(title, {**dict.fromkeys(models, text), **(missing or {})}, remark))

        @functools.wraps(test)
        def checked(**kwargs: Any) -> None:
            if outcome == REFUSED:
                with pytest.raises(RuntimeError, match=re.escape(refusal)):
                    test(**kwargs)
                return
            found = test(**kwargs)
            assert found in (BIT, ROUNDING), "a cell must say what it has found"
            assert found == BIT or outcome == ROUNDING, f"{title}: {found}, promised: {outcome}"

        if orders:
            checked = pytest.mark.parametrize("order", orders)(checked)
        checked = pytest.mark.parametrize("name", models)(checked)
        if needs:
            is_there = importlib.util.find_spec(needs) is not None
            reason = f"needs {needs}: pip install --no-deps --target DIR, and DIR in PYTHONPATH"
            checked = pytest.mark.skipif(not is_there, reason=reason)(checked)
        return checked

    return mark


# what cells are compared with


def build(name: str) -> Any:
    return CASES[name].build()


@functools.cache
def latents_of(name: str) -> torch.Tensor:
    """Noise to start from: drawn in float32, so that runs in float64 start from the same."""
    drawn = []
    pipe = build(name)

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: drawn.append(prepare(*args, **kwargs)) or drawn[-1]
    CASES[name].run(pipe, steps=1, callback_on_step_end=callback)
    return drawn[0].clone()


def run(pipe: Any, name: str, **kwargs: Any) -> torch.Tensor:
    dtype = pipe.vae.dtype
    return CASES[name].run(pipe, latents=latents_of(name).to(dtype), **kwargs)


def calls(pipe: Any) -> list[tuple[int, str, str]]:
    """Step, layer and kind of every call of a self-attention in the last run."""
    return [(record["step"], record["layer"], record["kind"]) for record in psa_report(pipe).records]


@functools.cache
def alone(name: str, which: str) -> tuple[torch.Tensor, list[tuple[int, str, str]]]:
    """Video and calls of a pipeline with nothing but PSA: `sparse`, `one` (everything read) or `dense`."""
    pipe = build(name)
    switch_on(pipe, which)
    return run(pipe, name), calls(pipe)


def switch_on(pipe: Any, which: str) -> None:
    if which == "dense":
        enable_psa(pipe, "baseline", report=True)
    else:
        enable_psa(pipe, report=True, **(SPARSE if which == "sparse" else ONE))


def assert_as_close(actual: torch.Tensor, other: torch.Tensor, truth: torch.Tensor) -> str:
    """No further from the truth than twice another way to compute the same, and one rounding: as in forwards.py."""
    if torch.equal(actual, other):
        return BIT
    budget = 2 * (error(other, truth) + torch.finfo(actual.dtype).eps)
    assert error(actual, truth) <= budget, f"error {error(actual, truth):.2e}, budget {budget:.2e}"
    return ROUNDING


def sparse_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """PSA, which runs float64 dense otherwise, runs it sparse."""
    monkeypatch.setattr(ours, "DTYPES", (*ours.DTYPES, torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_psa_alone_at_factor_one_is_dense_attention(name):
    """What all the cells lean on."""
    dense, calls_dense = alone(name, "dense")
    one, calls_one = alone(name, "one")
    pipe = build(name).to(torch.float64)
    assert_as_close(one, dense, run(pipe, name))
    assert [call[:2] for call in calls_one] == [call[:2] for call in calls_dense]
    assert {kind for *_, kind in calls_one} == {"sparse"}
    sparse, calls_sparse = alone(name, "sparse")
    assert error(sparse, dense) > 100 * error(one, dense), "PSA must matter in these cells"
    assert {kind for step, _, kind in calls_sparse if step == 0} == {"dense"}
    assert {kind for step, _, kind in calls_sparse if step > 0} == {"sparse"}


def check_exact(name: str, technique: Callable[[Any], Any], order: str) -> str:
    """For what changes no arithmetic: with it, PSA gives what it gives alone, and so does dense attention.

    Two runs each, because hooks can be lost after the first.
    """
    pipe = build(name)
    if order == "before":
        pipe = technique(pipe) or pipe
    for which in ("sparse", "one", "dense"):
        switch_on(pipe, which)
        if order == "after" and which == "sparse":
            pipe = technique(pipe) or pipe
        video, expected = alone(name, which)
        for _ in range(2):
            assert torch.equal(run(pipe, name), video)
            assert calls(pipe) == expected
        disable_psa(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])
    return BIT


def check_weights(name: str, technique: Callable[[Any], Any], order: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """For what changes the weights or the order of sums: compared with a plain denoiser of the same weights.

    In one forward: rounding that decides otherwise which blocks are read would be another, right, result.
    """
    pipe, plain = build(name), build(name)
    inputs = captured_inputs(pipe, name, steps=1)[0]
    results = {}
    if order == "before":
        technique(pipe)
    for which in ("sparse", "one"):
        switch_on(pipe, which)
        pipe._psa_switch.run.clock.warmup_steps = 0
        pipe._psa_switch.run.clock.reset()
        if order == "after" and which == "sparse":
            technique(pipe)
        results[which] = pipe.transformer(**inputs)[0]
        assert {record["kind"] for record in psa_report(pipe).records} == {"sparse"}
        disable_psa(pipe)
    results["dense"] = pipe.transformer(**inputs)[0]
    for path, module in plain.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            _copy_effective_weights(pipe.transformer.get_submodule(path), module)

    enable_psa(plain, **TINY_PRESET)
    plain_sparse = plain.transformer(**inputs)[0]
    sparse_in_float64(monkeypatch)
    wide = {key: _widen(value) for key, value in inputs.items()}
    plain.transformer.double()
    sparse_truth = plain.transformer(**wide)[0]
    disable_psa(plain)
    truth = plain.transformer(**wide)[0]
    found = {
        assert_as_close(results["sparse"], plain_sparse, sparse_truth),
        assert_as_close(results["one"], results["dense"], truth),
    }
    return BIT if found == {BIT} else ROUNDING


def _copy_effective_weights(layer: torch.nn.Module, plain: torch.nn.Linear) -> None:
    """Give a plain linear layer the weights with which `layer` computes, whatever it stores."""
    rows = torch.eye(plain.in_features)[None]
    bias = layer(torch.zeros_like(rows[:, :1]))[0, 0]
    plain.weight.copy_((layer(rows)[0] - bias).T)
    if plain.bias is not None:
        plain.bias.copy_(bias)


def _widen(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_widen, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check_cache(
    name: str,
    order: str,
    idle: Callable[[Any], Any],
    busy: Callable[[Any], Any],
    off: Callable[[Any], Any] = lambda pipe: pipe.transformer.disable_cache(),
) -> str:
    """For what skips work: where it never skips, PSA is as alone; where it does, it skips the same as under dense.

    Args:
        name: Model.
        order: Whether the cache is switched on before or after PSA.
        idle: Switches it on such that it never skips.
        busy: Switches it on such that it does.
        off: Switches it off.
    """
    pipe = build(name)
    _both_on(pipe, idle, "sparse", order)
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    assert calls(pipe) == alone(name, "sparse")[1]
    disable_psa(pipe)
    off(pipe)

    videos, made = {}, {}
    for which in ("dense", "one", "sparse"):
        _both_on(pipe, busy, which, order)
        videos[which], made[which] = run(pipe, name), calls(pipe)
        assert torch.equal(run(pipe, name), videos[which]), "a second run starts with an empty cache"
        disable_psa(pipe)
        assert torch.equal(run(pipe, name), videos["dense"])
        off(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])

    skipped = {call[:2] for call in alone(name, "dense")[1]} - {call[:2] for call in made["dense"]}
    assert skipped or len(made["dense"]) < len(alone(name, "dense")[1]), "the cache must skip something here"
    for which in ("one", "sparse"):
        assert [call[:2] for call in made[which]] == [call[:2] for call in made["dense"]]
    assert {kind for *_, kind in made["one"]} == {"sparse"}
    assert {kind for step, _, kind in made["sparse"] if step > 0} == {"sparse"}
    truth_pipe = build(name).to(torch.float64)
    busy(truth_pipe)
    truth = run(truth_pipe, name)
    off(truth_pipe)
    assert_as_close(videos["one"], videos["dense"], truth)
    assert error(videos["sparse"], videos["dense"]) > 10 * error(videos["one"], videos["dense"])
    return ROUNDING


def _both_on(pipe: Any, technique: Callable[[Any], Any], which: str, order: str) -> None:
    if order == "before":
        technique(pipe)
    switch_on(pipe, which)
    if order == "after":
        technique(pipe)


# where weights wait


@composes("`pipe.enable_model_cpu_offload()`")
def test_model_offload(name, order):
    return check_exact(name, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), order)


@composes(
    "`pipe.enable_sequential_cpu_offload()`",
    remark="Tested with what it does to the denoiser, `accelerate.cpu_offload`; the rest needs a GPU.",
)
def test_sequential_offload(name, order):
    def technique(pipe):
        accelerate.cpu_offload(pipe.transformer, CPU, offload_buffers=True)

    return check_exact(name, technique, order)


GROUPS = {"leaf": {"offload_type": "leaf_level"}, "block": {"offload_type": "block_level", "num_blocks_per_group": 1}}


@composes("Group offload, leaves (`transformer.enable_group_offload(...)`)")
def test_group_offload_of_leaves(name, order):
    return check_exact(name, functools.partial(_offload_groups, kind="leaf"), order)


@composes("Group offload, blocks")
def test_group_offload_of_blocks(name, order):
    return check_exact(name, functools.partial(_offload_groups, kind="block"), order)


def _offload_groups(pipe: Any, kind: str) -> None:
    if torch.accelerator.current_accelerator() is None and Version(diffusers.__version__) < Version("0.41"):
        pytest.skip(f"group offload of diffusers {diffusers.__version__} asks for an accelerator, even from CPU to CPU")
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **GROUPS[kind])


# how weights are stored


@composes("Layerwise casting to float8 (`transformer.enable_layerwise_casting(...)`)", outcome=ROUNDING)
def test_layerwise_casting(name, order, monkeypatch):
    def technique(pipe):
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    return check_weights(name, technique, order, monkeypatch)


@composes("torchao, int8 weights", outcome=ROUNDING, needs="torchao", remark="Run with torchao 0.18.")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchao(name, order, monkeypatch):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    return check_weights(name, lambda pipe: quantize_(pipe.transformer, Int8WeightOnlyConfig()), order, monkeypatch)


BITSANDBYTES = (
    "Run with bitsandbytes 0.50, layer by layer on a CPU. Loading with `BitsAndBytesConfig` needs a GPU: not run."
)


@composes("bitsandbytes, int8", outcome=ROUNDING, needs="bitsandbytes", remark=BITSANDBYTES)
def test_bitsandbytes_int8(name, order, monkeypatch):
    from bitsandbytes.nn import Linear8bitLt

    make = functools.partial(Linear8bitLt, has_fp16_weights=False)
    return check_weights(name, lambda pipe: _replace_linears(pipe, make), order, monkeypatch)


@composes("bitsandbytes, nf4", outcome=ROUNDING, needs="bitsandbytes", remark=BITSANDBYTES)
def test_bitsandbytes_nf4(name, order, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    make = functools.partial(Linear4bit, compute_dtype=torch.float32, quant_type="nf4")
    return check_weights(name, lambda pipe: _replace_linears(pipe, make), order, monkeypatch)


def _replace_linears(pipe: Any, make: Callable[..., torch.nn.Module]) -> None:
    for path, part in list(pipe.transformer.named_modules()):
        for child, layer in list(part.named_children()):
            if isinstance(layer, torch.nn.Linear) and "attn" in path:
                other = make(layer.in_features, layer.out_features, bias=layer.bias is not None)
                other.load_state_dict(layer.state_dict())
                setattr(part, child, other.to("cpu"))


# LoRA and fused projections


@composes(
    "LoRA (`load_psa_lora`, or `pipe.load_lora_weights`), scaled",
    outcome=ROUNDING,
    remark="With several adapters, both experts and the LoRAs for four steps: tests/test_lora.py.",
)
def test_lora(name, order, monkeypatch, tmp_path):
    path = lora_file(tmp_path, name)
    return check_weights(name, lambda pipe: load_psa_lora(pipe, path, scale=0.5), order, monkeypatch)


@composes("LoRA, fused (`fuse=True`)", outcome=ROUNDING)
def test_fused_lora(name, order, monkeypatch, tmp_path):
    path = lora_file(tmp_path, name)
    return check_weights(name, lambda pipe: load_psa_lora(pipe, path, scale=0.5, fuse=True), order, monkeypatch)


@composes("LoRA, loaded and unloaded again (`unload_psa_lora`)")
def test_unloaded_lora(name, order, tmp_path):
    path = lora_file(tmp_path, name)
    return check_exact(name, lambda pipe: unload_psa_lora(load_psa_lora(pipe, path)), order)


@composes(
    "Fused projections (`transformer.fuse_qkv_projections()`)",
    outcome=ROUNDING,
    remark="On CogVideoX diffusers replaces all processors; the next call of the pipeline takes them over.",
)
def test_fused_projections(name, order, monkeypatch):
    def technique(pipe):
        pipe.transformer.fuse_qkv_projections()
        if order == "after":
            run(pipe, name, steps=1)

    return check_weights(name, technique, order, monkeypatch)


# caches


def _config(name: str, **kwargs: Any) -> Any:
    """A cache configuration that this diffusers may not have."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return kind(**kwargs)


@composes(
    "First-block cache (`FirstBlockCacheConfig`)", outcome=ROUNDING, remark="Caches: see “What a cache skips” below."
)
def test_first_block_cache(name, order):
    def on(threshold):
        return lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    return check_cache(name, order, on(0.0), on(0.5))


@composes("MagCache (`MagCacheConfig`)", outcome=ROUNDING)
def test_mag_cache(name, order):
    def on(threshold):
        shape = {"num_inference_steps": 4, "mag_ratios": [1.01] * 8, "retention_ratio": 0.2, "max_skip_steps": 2}
        return lambda pipe: pipe.transformer.enable_cache(_config("MagCacheConfig", threshold=threshold, **shape))

    return check_cache(name, order, on(0.0), on(0.5))


@composes(
    "Pyramid attention broadcast (`PyramidAttentionBroadcastConfig`)",
    outcome=ROUNDING,
    remark="diffusers keeps one state for both branches of guidance: on Wan the second gets what the first computed, "
    "with dense attention too.",
)
def test_pyramid_attention_broadcast(name, order):
    def on(skip_range):
        def technique(pipe):
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip_range,
                spatial_attention_timestep_skip_range=(-1, 1001),
                spatial_attention_block_identifiers=("blocks",),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
            pipe.transformer.enable_cache(config)

        return technique

    return check_cache(name, order, on(1), on(2))


def _faster_cache(pipe: Any, timesteps: tuple[int, int], is_guidance_distilled: bool = False) -> None:
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=timesteps,
        spatial_attention_block_identifiers=("blocks",),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=timesteps,
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BFCHW",
        is_guidance_distilled=is_guidance_distilled,
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(config)


FASTER_CACHE = "FasterCache (`FasterCacheConfig`)"


@composes(FASTER_CACHE, outcome=ROUNDING, models=("cogvideox",), missing={"wan2.1": "see the next two rows"})
def test_faster_cache(name, order):
    return check_cache(
        name, order, lambda pipe: _faster_cache(pipe, (2000, 3000)), lambda pipe: _faster_cache(pipe, (-1, 1001))
    )


@composes(
    f"{FASTER_CACHE} where the branches of guidance run one after the other",
    outcome=REFUSED,
    models=("wan2.1",),
    missing={"cogvideox": "–"},
    refusal="Pass FasterCacheConfig(..., is_guidance_distilled=True), or use another cache",
    remark="With dense attention diffusers raises an IndexError.",
)
def test_faster_cache_without_a_batch_of_both_branches(name, order):
    pipe = build(name)
    _both_on(pipe, lambda pipe: _faster_cache(pipe, (-1, 1001)), "sparse", order)
    run(pipe, name)


@composes(
    f"{FASTER_CACHE}, `is_guidance_distilled=True`",
    outcome=ROUNDING,
    models=("wan2.1",),
    missing={"cogvideox": "–"},
)
def test_faster_cache_of_attention_alone(name, order):
    return check_cache(
        name,
        order,
        lambda pipe: _faster_cache(pipe, (2000, 3000), is_guidance_distilled=True),
        lambda pipe: _faster_cache(pipe, (-1, 990), is_guidance_distilled=True),
    )


@composes(
    "TaylorSeer (`TaylorSeerCacheConfig`)",
    outcome=ROUNDING,
    remark="Its default identifiers match no attention of these models; pass "
    '`cache_identifiers=[r".*blocks\\.\\d+\\.attn1"]`.',
)
def test_taylor_seer(name, order):
    def on(interval):
        def technique(pipe):
            config = _config(
                "TaylorSeerCacheConfig",
                cache_interval=interval,
                disable_cache_before_step=1,
                max_order=1,
                cache_identifiers=[r".*blocks\.\d+\.attn1"],
            )
            pipe.transformer.enable_cache(config)

        return technique

    return check_cache(name, order, on(1), on(2))


CACHE_DIT = "cache-dit (`cache_dit.enable_cache(pipe)`)"


def _cache_dit(pipe: Any, threshold: float) -> None:
    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=threshold
    )
    cache_dit.enable_cache(pipe, cache_config=config)


@composes(CACHE_DIT, outcome=ROUNDING, needs="cache_dit", remark="Run with cache-dit 1.5.")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cache_dit(name, order):
    import cache_dit

    return check_cache(
        name, order, lambda pipe: _cache_dit(pipe, 0.0), lambda pipe: _cache_dit(pipe, 0.5), cache_dit.disable_cache
    )


@composes(f"{CACHE_DIT}, switched off while PSA stays on", needs="cache_dit")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cache_dit_goes_first(name, order):
    import cache_dit

    pipe = build(name)
    cls, call = type(pipe), type(pipe).__call__
    _both_on(pipe, lambda pipe: _cache_dit(pipe, 0.5), "sparse", order)
    run(pipe, name)
    cache_dit.disable_cache(pipe)
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    assert calls(pipe) == alone(name, "sparse")[1]
    disable_psa(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])
    assert isinstance(pipe, cls)
    assert cls.__call__ is call
    return BIT


# compiled


@composes("`torch.compile(pipe.transformer, fullgraph=True)`", remark="One dense and one sparse graph.")
def test_compiled_whole(name, order):
    def technique(pipe):
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")

    return _check_compiled(name, technique, order)


@composes(
    "Blocks compiled one by one (`transformer.compile_repeated_blocks()`)",
    remark="CogVideoX does not name its repeated blocks to diffusers: `for block in transformer.transformer_blocks: "
    "block.compile()`. All layers share their graphs.",
)
def test_compiled_blocks(name, order):
    def technique(pipe):
        if name == "cogvideox":
            for block in pipe.transformer.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
        else:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")

    return _check_compiled(name, technique, order)


def _check_compiled(name: str, technique: Callable[[Any], Any], order: str) -> str:
    torch._dynamo.reset()
    pipe = build(name)
    if order == "before":
        technique(pipe)
    enable_psa(pipe, **SPARSE)  # no report: it breaks the graph at each self-attention
    if order == "after":
        technique(pipe)
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    disable_psa(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])
    if order == "after":  # once: tracing is what takes long here
        enable_psa(pipe, **ONE)
        assert torch.equal(run(pipe, name), alone(name, "one")[0])
    torch._dynamo.reset()
    return BIT


# copies


@composes(
    "`SomePipeline.from_pipe(pipe)` of an enabled pipeline",
    orders=(),
    remark="The new pipeline shares the denoiser, and runs sparse as long as PSA is on in the first.",
)
def test_from_pipe(name):
    pipe = build(name)
    cls = type(pipe)
    switch_on(pipe, "sparse")
    other = cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(run(other, name), alone(name, "sparse")[0])
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    disable_psa(pipe)
    assert torch.equal(run(other, name), alone(name, "dense")[0])
    return BIT


@composes(
    "`enable_psa` on a second pipeline that shares the denoiser",
    orders=(),
    outcome=REFUSED,
    refusal="Call disable_psa on that pipeline, or set the processors of the denoiser back, first",
)
def test_shared_denoiser(name):
    pipe = build(name)
    other = type(pipe)(**pipe.components)
    switch_on(pipe, "sparse")
    before = {attention.processor for attention in pipe.transformer.modules() if hasattr(attention, "processor")}
    try:
        switch_on(other, "one")
    finally:
        after = {attention.processor for attention in pipe.transformer.modules() if hasattr(attention, "processor")}
        assert after == before
        assert torch.equal(run(pipe, name), alone(name, "sparse")[0])


@composes("`pipe.save_pretrained(...)` and `from_pretrained`", orders=(), remark="What is saved knows nothing of PSA.")
def test_saved_and_loaded(name, tmp_path):
    pipe = build(name)
    cls = type(pipe)
    pipe.save_pretrained(tmp_path / "off")
    switch_on(pipe, "sparse")
    pipe.save_pretrained(tmp_path / "on")
    files = sorted(path.relative_to(tmp_path / "off") for path in (tmp_path / "off").rglob("*") if path.is_file())
    for path in files:
        assert (tmp_path / "on" / path).read_bytes() == (tmp_path / "off" / path).read_bytes()
    assert len(list((tmp_path / "on").rglob("*"))) == len(list((tmp_path / "off").rglob("*")))
    loaded = cls.from_pretrained(tmp_path / "on")
    assert type(loaded) is cls
    loaded.set_progress_bar_config(disable=True)
    state, expected = loaded.transformer.state_dict(), pipe.transformer.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    switch_on(loaded, "sparse")
    run(loaded, name)
    assert calls(loaded) == alone(name, "sparse")[1]
    return BIT


@composes("`copy.deepcopy(pipe)`", orders=(), remark="The copy has its own switch, clock and report.")
def test_deep_copy(name):
    pipe = build(name)
    switch_on(pipe, "sparse")
    other = copy.deepcopy(pipe)
    assert torch.equal(run(other, name), alone(name, "sparse")[0])
    assert calls(other) == alone(name, "sparse")[1]
    assert calls(pipe) == [], "the copy has not run in the original"
    disable_psa(other)
    assert torch.equal(run(other, name), alone(name, "dense")[0])
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    disable_psa(pipe)
    assert type(pipe) is type(other)
    return BIT


@composes("`copy.deepcopy(transformer)` with a `PSAProcessor`", orders=())
def test_deep_copy_of_a_denoiser(name):
    pipe = build(name)
    pipe.transformer.set_attn_processor(PSAProcessor(report=True, **SPARSE))
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    recorded = calls(pipe)
    other = build(name)
    other.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(run(other, name, steps=4), alone(name, "sparse")[0])
    assert [call[0] for call in calls(other)] == [call[0] for call in recorded]
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    assert [call[0] for call in calls(pipe)] == [call[0] for call in recorded]
    return BIT


@composes("`pickle` of presets", orders=(), remark="Presets are plain values: pickle, JSON and YAML keep them.")
def test_pickled_presets(name):
    count = 0
    for section, names in list_presets().items():
        for preset_name in names:
            preset = load_preset(section, preset_name)
            assert pickle.loads(pickle.dumps(preset)) == preset
            count += 1
    assert count > 20
    pipe = build(name)
    preset = pickle.loads(pickle.dumps(load_preset("default", **SPARSE)))
    enable_psa(pipe, preset)
    given = run(pipe, name)
    disable_psa(pipe)
    enable_psa(pipe, load_preset("default", **SPARSE))
    assert torch.equal(run(pipe, name), given)
    return BIT


# the moment, and threads


RUNNING = "the pipeline is running: call enable_psa before or after the call, not from a callback"


@composes("`enable_psa` inside a running call", orders=(), outcome=REFUSED, refusal=RUNNING)
def test_enabling_inside_a_call(name):
    pipe = build(name)

    def callback(pipeline, step, timestep, kwargs):
        switch_on(pipeline, "sparse")
        return kwargs

    try:
        run(pipe, name, callback_on_step_end=callback)
    finally:
        assert torch.equal(run(pipe, name), alone(name, "dense")[0])


@composes("`enable_psa` while another thread runs the pipeline", orders=(), outcome=REFUSED, refusal=RUNNING)
def test_enabling_from_another_thread(name):
    pipe = build(name)
    is_in_step, may_go_on = threading.Event(), threading.Event()

    def callback(pipeline, step, timestep, kwargs):
        is_in_step.set()
        may_go_on.wait(60)
        return kwargs

    videos = []
    thread = threading.Thread(target=lambda: videos.append(run(pipe, name, callback_on_step_end=callback)))
    with torch.no_grad():
        thread.start()
    assert is_in_step.wait(60)
    try:
        switch_on(pipe, "sparse")
    finally:
        may_go_on.set()
        thread.join()
        assert torch.equal(videos[0], alone(name, "dense")[0])


@composes(
    "Two pipelines in two threads",
    orders=(),
    remark="A pipeline, as diffusers has it, belongs to one thread at a time.",
)
def test_threads(name):
    expected = {which: alone(name, which) for which in ("sparse", "one")}
    pipes = {which: build(name) for which in expected}
    for which, pipe in pipes.items():
        switch_on(pipe, which)
    start = threading.Barrier(len(pipes))
    videos = {which: [] for which in pipes}

    def work(which):
        start.wait(60)
        with torch.no_grad():  # a thread has its own
            for _ in range(3):
                videos[which].append((run(pipes[which], name), calls(pipes[which])))

    threads = [threading.Thread(target=work, args=(which,)) for which in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, (video, made) in expected.items():
        assert len(videos[which]) == 3
        for each in videos[which]:
            assert torch.equal(each[0], video)
            assert each[1] == made
    return BIT


# modular pipelines and guiders


def _modular(guider: Any = None) -> Any:
    modular = pytest.importorskip("diffusers.modular_pipelines")
    blocks = getattr(modular, "WanBlocks", None) or pytest.skip("this diffusers has no modular pipeline of Wan")
    parts = build("wan2.1").components
    pipe = blocks().init_pipeline()
    pipe.update_components(**{key: part for key, part in parts.items() if part is not None and key in pipe.components})
    if guider is not None:
        pipe.update_components(guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run_modular(pipe: Any, **kwargs: Any) -> torch.Tensor:
    known = ("prompt", "negative_prompt", "num_inference_steps", "height", "width", "num_frames", "max_sequence_length")
    inputs = {key: value for key, value in CASES["wan2.1"].inputs(**kwargs).items() if key in known}
    latents = latents_of("wan2.1").to(pipe.vae.dtype)
    return pipe(**inputs, latents=latents, output="latents", output_type="np")


def _check_modular(make_guider: Callable[[], Any]) -> tuple[str, dict[str, list[Any]]]:
    """Modular Wan with a guider: factor one against dense, and dense again after PSA. Returns the records too."""
    pipe = _modular(make_guider())
    dense = _run_modular(pipe)
    videos, records = {}, {}
    for which in ("one", "sparse"):
        switch_on(pipe, which)
        videos[which], records[which] = _run_modular(pipe), psa_report(pipe).records
        disable_psa(pipe)
    assert torch.equal(_run_modular(pipe), dense)
    truth_pipe = _modular(make_guider())
    for part in truth_pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    assert_as_close(videos["one"], dense, _run_modular(truth_pipe))
    assert error(videos["sparse"], dense) > 10 * error(videos["one"], dense)
    return ROUNDING, records


@composes(
    "Modular pipelines",
    outcome=ROUNDING,
    models=("wan2.1",),
    missing={"cogvideox": "diffusers has none"},
    orders=(),
    remark="No step callback: the denoiser's `timestep` drives warm-up. `pipe.set_attn_processor(...)` works too.",
)
def test_modular(name):
    from diffusers import ClassifierFreeGuidance

    found, records = _check_modular(lambda: ClassifierFreeGuidance(guidance_scale=3.0))
    kinds = {(record["step"], record["kind"]) for record in records["sparse"]}
    assert kinds == {(0, "dense"), (1, "sparse"), (2, "sparse"), (3, "sparse")}
    pipe = _modular(ClassifierFreeGuidance(guidance_scale=3.0))
    pipe.set_attn_processor(PSAProcessor(**SPARSE))
    by_processor = _run_modular(pipe)
    disable_psa(pipe)
    switch_on(pipe, "sparse")
    assert torch.equal(_run_modular(pipe), by_processor)
    return found


def _layers(**kwargs: Any) -> Any:
    from diffusers.hooks import LayerSkipConfig

    return LayerSkipConfig([1], **kwargs)


@composes(
    "Skip-layer guidance (`SkipLayerGuidance`)",
    outcome=ROUNDING,
    models=("wan2.1",),
    missing={"cogvideox": "no guider in diffusers"},
    orders=(),
)
def test_skip_layer_guidance(name):
    from diffusers import SkipLayerGuidance

    share = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    found, records = _check_modular(lambda: SkipLayerGuidance(guidance_scale=3.0, skip_layer_config=_layers(), **share))
    layers = [record["layer"] for record in records["one"]]
    assert layers.count("blocks.1.attn1") < layers.count("blocks.0.attn1"), "one layer is skipped in one pass of three"
    return found


@composes(
    "Perturbed attention guidance (`PerturbedAttentionGuidance`)",
    outcome=ROUNDING,
    models=("wan2.1",),
    missing={"cogvideox": "no guider in diffusers"},
    orders=(),
    remark="The layers that it perturbs run the original processor in that pass; the report says so. diffusers 0.42.1 "
    "itself does not know the processor of Wan, so without PSA it raises a ValueError.",
)
def test_perturbed_attention_guidance(name, monkeypatch):
    from diffusers import PerturbedAttentionGuidance
    from diffusers.hooks import _helpers
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    known = {
        **_helpers.AttentionProcessorRegistry._registry,
        WanAttnProcessor: _helpers.AttentionProcessorMetadata(None),
    }
    _helpers.AttentionProcessorRegistry._register()
    monkeypatch.setattr(_helpers.AttentionProcessorRegistry, "_registry", known)
    share = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    scores = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    found, records = _check_modular(
        lambda: PerturbedAttentionGuidance(guidance_scale=3.0, perturbed_guidance_config=_layers(**scores), **share)
    )
    dense = [record for record in records["one"] if record["kind"] == "dense"]
    assert {record["layer"] for record in dense} == {"blocks.1.attn1"}
    assert {record["reason"] for record in dense} == {"perturbed attention guidance replaces its attention"}
    return found


# the page


def with_table(page: str) -> str:
    """The text of the page with the table as the rows above make it, between the two marks."""
    lines = [f"| together with | {' | '.join(MODELS.values())} | |", f"|---|{'---|' * len(MODELS)}---|"]
    for row in ROWS:
        cells = " | ".join(row.cells[name] for name in MODELS)
        lines.append(f"| {row.title} | {cells} | {row.remark} |")
    table = "\n".join(lines)
    return re.sub(
        r"(<!-- table -->\n).*(\n<!-- end -->)", lambda marks: f"{marks[1]}{table}{marks[2]}", page, flags=re.S
    )


def test_every_test_here_is_a_row_of_the_table():
    tests = [key for key, value in globals().items() if key.startswith("test_") and inspect.isfunction(value)]
    assert len(ROWS) == len(tests) - 3, "this one, the next, and what all cells lean on"
    titles = [row.title for row in ROWS]
    assert len(set(titles)) == len(titles)
    for row in ROWS:
        assert set(row.cells) == set(MODELS), f"{row.title}: a cell is silent"


def test_the_page_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- table -->" in page
    assert with_table(page) == page, "run python tests/test_composition.py"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
