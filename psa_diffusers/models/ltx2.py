"""LTX-2, 2.3 and 2.5: video tokens, keyframes and references behind them; sound and text enter by cross-attention.

Mirrors `LTX2AudioVideoAttnProcessor` and `LTX2PerturbedAttnProcessor` of
diffusers/models/transformers/transformer_ltx2.py, one call changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psa_diffusers.models.registry import Family, Grid, SectionRule, register_family
from psa_diffusers.processors.base import FamilyProcessor, Projected, project_out

UPSTREAM_DIGESTS = {
    "diffusers.models.transformers.transformer_ltx2.LTX2AudioVideoAttnProcessor": {"49e4d7077b2a", "0391667b7f0a"},
    "diffusers.models.transformers.transformer_ltx2.LTX2PerturbedAttnProcessor": {"ab3b88fd4d26"},
}
"""Start of the SHA-256 of the source of `__call__` in the diffusers versions that were read and tested."""


class LTX2PSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention over the video of an LTX-2 block."""

    arguments = (
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "query_rotary_emb",
        "key_rotary_emb",
        "perturbation_mask",
        "all_perturbed",
    )
    has_context = True

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        tokens = given["hidden_states"]
        q, k, v = attn.norm_q(attn.to_q(tokens)), attn.norm_k(attn.to_k(tokens)), attn.to_v(tokens)
        if (angles := given.get("query_rotary_emb")) is not None:
            rotate = find_rotation(attn.rope_type)
            q, k = rotate(q, angles), rotate(k, given.get("key_rotary_emb") or angles)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def put_out(self, attn: Any, out: Tensor, given: Mapping[str, Any]) -> Tensor:
        if getattr(attn, "to_gate_logits", None) is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(given["hidden_states"]))
            out = out * gates.transpose(1, 2).unsqueeze(-1)
        return project_out(attn, out)

    def why_not(self, given: Mapping[str, Any]) -> str:
        is_perturbed = given.get("perturbation_mask") is not None
        return "spatio-temporal guidance leaves attention out in this layer" if is_perturbed else ""


def find_rotation(kind: str) -> Any:
    from diffusers.models.transformers import transformer_ltx2

    return getattr(transformer_ltx2, f"apply_{kind}_rotary_emb")


def read_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    """Sizes in tokens."""
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    return None if frames is None or height is None or width is None else (frames, height, width)


def make_default(config: Any, path: str, attn: Any) -> Any:
    from diffusers.models.transformers import transformer_ltx2

    is_perturbed = getattr(config, "perturbed_attn", False)
    return getattr(transformer_ltx2, f"LTX2{'Perturbed' if is_perturbed else 'AudioVideo'}AttnProcessor")()


FAMILY = Family(
    name="LTX-2",
    denoisers=("LTX2VideoTransformer3DModel",),
    attentions=r"transformer_blocks\.\d+\.attn1",
    read_grid=read_grid,
    text_first=False,
    sections=(SectionRule("LTX-2", 32, 48),),
    processor=LTX2PSAProcessor,
    make_default=make_default,
    pipelines=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2HDRPipeline",
    ),
    sparse="every self-attention over video; keyframes and references beside the grid are read in full",
    dense="all over sound, which is short; layers that spatio-temporal guidance perturbs; calls with an attention "
    "mask (a reference of reduced strength); the DFR pipelines, whose inputs do not tell the grid",
)
register_family(FAMILY)
