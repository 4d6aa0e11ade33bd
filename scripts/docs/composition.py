"""Write the table of docs/composition.md: PSA together with everything else that people switch on in a pipeline.

    python -m scripts.docs.composition

The rows below are what is promised. tests/pipelines/composition holds a test of the name of each, which proves all its
cells; a promise without a test, or a test without a promise, fails there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"

MODELS = {"cogvideox": "CogVideoX", "wan2.1": "Wan"}
"""The models with a column, by the names of the tests."""

BIT, ROUNDING, REFUSED = "equal to the bit", "equal to rounding", "refused"


@dataclass(frozen=True)
class Row:
    """One line of the table: what is combined with PSA, what comes out, and what to know.

    Attributes:
        name: Its test is `test_` and this.
        title: What is combined with PSA.
        outcome: BIT, ROUNDING or REFUSED.
        models: The models with a cell that is tested.
        missing: What stands in the cell of a model that has none.
        refusal: For REFUSED: the message, word for word.
        remark: What a user should know.
    """

    name: str
    title: str
    outcome: str = BIT
    models: tuple[str, ...] = tuple(MODELS)
    missing: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    remark: str = ""

    @property
    def cells(self) -> dict[str, str]:
        """What stands in the column of each model."""
        text = f"{self.outcome}: “{self.refusal}”" if self.outcome == REFUSED else self.outcome
        return {**dict.fromkeys(self.models, text), **self.missing}


BITSANDBYTES = (
    "Run with bitsandbytes 0.50, layer by layer on a CPU. Loading with `BitsAndBytesConfig` needs a GPU: not run."
)
FASTER_CACHE = "FasterCache (`FasterCacheConfig`)"
CACHE_DIT = "cache-dit (`cache_dit.enable_cache(pipe)`)"
RUNNING = "the pipeline is running: call enable_psa before or after the call, not from a callback"

ROWS = (
    Row("model_offload", "`pipe.enable_model_cpu_offload()`"),
    Row(
        "sequential_offload",
        "`pipe.enable_sequential_cpu_offload()`",
        remark="Tested with what it does to the denoiser, `accelerate.cpu_offload`; the rest needs a GPU.",
    ),
    Row("group_offload_of_leaves", "Group offload, leaves (`transformer.enable_group_offload(...)`)"),
    Row("group_offload_of_blocks", "Group offload, blocks"),
    Row(
        "layerwise_casting",
        "Layerwise casting to float8 (`transformer.enable_layerwise_casting(...)`)",
        outcome=ROUNDING,
    ),
    Row("torchao", "torchao, int8 weights", outcome=ROUNDING, remark="Run with torchao 0.18."),
    Row("bitsandbytes_int8", "bitsandbytes, int8", outcome=ROUNDING, remark=BITSANDBYTES),
    Row("bitsandbytes_nf4", "bitsandbytes, nf4", outcome=ROUNDING, remark=BITSANDBYTES),
    Row(
        "lora",
        "LoRA (`load_psa_lora`, or `pipe.load_lora_weights`), scaled",
        outcome=ROUNDING,
        remark="With several adapters, both experts and the LoRAs for four steps: tests/lora.",
    ),
    Row("fused_lora", "LoRA, fused (`fuse=True`)", outcome=ROUNDING),
    Row("unloaded_lora", "LoRA, loaded and unloaded again (`unload_psa_lora`)"),
    Row(
        "fused_projections",
        "Fused projections (`transformer.fuse_qkv_projections()`)",
        outcome=ROUNDING,
        remark="On CogVideoX diffusers replaces all processors; the next call of the pipeline takes them over.",
    ),
    Row(
        "first_block_cache",
        "First-block cache (`FirstBlockCacheConfig`)",
        outcome=ROUNDING,
        remark="Caches: see “What a cache skips” below.",
    ),
    Row("mag_cache", "MagCache (`MagCacheConfig`)", outcome=ROUNDING),
    Row(
        "pyramid_attention_broadcast",
        "Pyramid attention broadcast (`PyramidAttentionBroadcastConfig`)",
        outcome=ROUNDING,
        remark="diffusers keeps one state for both branches of guidance: on Wan the second gets what the first "
        "computed, with dense attention too.",
    ),
    Row(
        "faster_cache",
        FASTER_CACHE,
        outcome=ROUNDING,
        models=("cogvideox",),
        missing={"wan2.1": "see the next two rows"},
    ),
    Row(
        "faster_cache_without_a_batch_of_both_branches",
        f"{FASTER_CACHE} where the branches of guidance run one after the other",
        outcome=REFUSED,
        models=("wan2.1",),
        missing={"cogvideox": "–"},
        refusal="Pass FasterCacheConfig(..., is_guidance_distilled=True), or use another cache",
        remark="With dense attention diffusers raises an IndexError.",
    ),
    Row(
        "faster_cache_of_attention_alone",
        f"{FASTER_CACHE}, `is_guidance_distilled=True`",
        outcome=ROUNDING,
        models=("wan2.1",),
        missing={"cogvideox": "–"},
    ),
    Row(
        "taylor_seer",
        "TaylorSeer (`TaylorSeerCacheConfig`)",
        outcome=ROUNDING,
        remark="Its default identifiers match no attention of these models; pass "
        '`cache_identifiers=[r".*blocks\\.\\d+\\.attn1"]`.',
    ),
    Row("cache_dit", CACHE_DIT, outcome=ROUNDING, remark="Run with cache-dit 1.5."),
    Row("cache_dit_goes_first", f"{CACHE_DIT}, switched off while PSA stays on"),
    Row(
        "compiled_whole", "`torch.compile(pipe.transformer, fullgraph=True)`", remark="One dense and one sparse graph."
    ),
    Row(
        "compiled_blocks",
        "Blocks compiled one by one (`transformer.compile_repeated_blocks()`)",
        remark="CogVideoX does not name its repeated blocks to diffusers: `for block in "
        "transformer.transformer_blocks: block.compile()`. All layers share their graphs.",
    ),
    Row(
        "from_pipe",
        "`SomePipeline.from_pipe(pipe)` of an enabled pipeline",
        remark="The new pipeline shares the denoiser, and runs sparse as long as PSA is on in the first.",
    ),
    Row(
        "shared_denoiser",
        "`enable_psa` on a second pipeline that shares the denoiser",
        outcome=REFUSED,
        refusal="Call disable_psa on that pipeline, or set the processors of the denoiser back, first",
    ),
    Row(
        "saved_and_loaded",
        "`pipe.save_pretrained(...)` and `from_pretrained`",
        remark="What is saved knows nothing of PSA.",
    ),
    Row("deep_copy", "`copy.deepcopy(pipe)`", remark="The copy has its own switch, clock and report."),
    Row("deep_copy_of_a_denoiser", "`copy.deepcopy(transformer)` with a `PSAProcessor`"),
    Row("pickled_presets", "`pickle` of presets", remark="Presets are plain values: pickle, JSON and YAML keep them."),
    Row("enabling_inside_a_call", "`enable_psa` inside a running call", outcome=REFUSED, refusal=RUNNING),
    Row(
        "enabling_from_another_thread",
        "`enable_psa` while another thread runs the pipeline",
        outcome=REFUSED,
        refusal=RUNNING,
    ),
    Row(
        "threads",
        "Two pipelines in two threads",
        remark="A pipeline, as diffusers has it, belongs to one thread at a time.",
    ),
    Row(
        "modular",
        "Modular pipelines",
        outcome=ROUNDING,
        models=("wan2.1",),
        missing={"cogvideox": "diffusers has none"},
        remark="Their guider tells the step. `pipe.set_attn_processor(...)` works too.",
    ),
    Row(
        "skip_layer_guidance",
        "Skip-layer guidance (`SkipLayerGuidance`)",
        outcome=ROUNDING,
        models=("wan2.1",),
        missing={"cogvideox": "no guider in diffusers"},
    ),
    Row(
        "perturbed_attention_guidance",
        "Perturbed attention guidance (`PerturbedAttentionGuidance`)",
        outcome=ROUNDING,
        models=("wan2.1",),
        missing={"cogvideox": "no guider in diffusers"},
        remark="The layers that it perturbs run the original processor in that pass; the report says so. "
        "diffusers 0.42.1 itself does not know the processor of Wan, so without PSA it raises a ValueError.",
    ),
)


def with_table(page: str) -> str:
    """Return the text of the page with the table of the rows between its two marks."""
    lines = [f"| together with | {' | '.join(MODELS.values())} | |", f"|---|{'---|' * len(MODELS)}---|"]
    for row in ROWS:
        cells = " | ".join(row.cells[name] for name in MODELS)
        lines.append(f"| {row.title} | {cells} | {row.remark} |")
    table = "\n".join(lines)
    return re.sub(
        r"(<!-- table -->\n).*(\n<!-- end -->)", lambda marks: f"{marks[1]}{table}{marks[2]}", page, flags=re.DOTALL
    )


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
