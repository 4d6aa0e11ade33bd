"""PSA in modular pipelines, with their guiders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import ROUNDING, SPARSE, assert_as_close, build, composes, latents_of, switch_on
from forwards import error
from tiny import CASES

from psa_diffusers.pipelines.enable import disable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.processors.standalone import PSAProcessor


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


@composes(orders=())
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


@composes(orders=())
def test_skip_layer_guidance(name):
    from diffusers import SkipLayerGuidance

    share = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    found, records = _check_modular(lambda: SkipLayerGuidance(guidance_scale=3.0, skip_layer_config=_layers(), **share))
    layers = [record["layer"] for record in records["one"]]
    assert layers.count("blocks.1.attn1") < layers.count("blocks.0.attn1"), "one layer is skipped in one pass of three"
    return found


@composes(orders=())
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
