"""The self-attention of HunyuanVideo and its relatives: video and then padded text in one sequence.

Mirrors `HunyuanVideoAttnProcessor2_0` of diffusers/models/transformers/transformer_hunyuan_video.py, one call changed.
The processors of HunyuanVideo 1.5 and Motif-Video do the same, but for the mask that they make of the padding: here
padding is left out of the sequence, so no mask is needed, and that of HunyuanVideo 1.5, ``[B, 1, L, L]``, is not made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.registry import make_instance_of
from psa_diffusers.processors.base import TEXT_ARGUMENTS, FamilyProcessor, Projected

UPSTREAM = "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0"
"""The processor of HunyuanVideo and Framepack."""


class JointPSAProcessor(FamilyProcessor):
    """Pyramid sparse self-attention of a block with one stream (one projection for all) or two.

    History, where a family has any, stands before the video in the sequence.
    """

    arguments = TEXT_ARGUMENTS
    text_in_sequence = True
    masks_padding = True

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        video, text = given["hidden_states"], given["encoder_hidden_states"]
        q, k, v = project(attn, video, text, given.get("image_rotary_emb"))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Any]) -> Tensor:
        text = given["encoder_hidden_states"].shape[1]
        context = self.context_tokens(given["hidden_states"]) if self.has_context else 0
        # PSA wants the video in front and all that is read in full behind it
        end = q.shape[2] - text
        q, k, v = (roll(x, context, end) for x in (q, k, v))
        lengths = self._text_lengths() + context
        return roll(self.sparse_padded(q, k, v, text_tokens=text + context, text_lengths=lengths), end - context, end)

    def put_out(self, attn: Any, out: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        tokens, text = out.transpose(1, 2).flatten(2), given["encoder_hidden_states"].shape[1]
        return project_back(attn, tokens[:, :-text], tokens[:, -text:])


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)


def project(
    attn: Any,
    video: Tensor,
    text: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    rotate: Callable[[Tensor, Any], Tensor] = rotate,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v ``[B, L, H, D]`` of video and then text; only the video is rotated."""
    if attn.add_q_proj is None:
        tokens = torch.cat([video, text], dim=1)
        q, k, v = (to(tokens).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = norm(attn.norm_q, q), norm(attn.norm_k, k)
        length = video.shape[1]
        q, k = (torch.cat([rotate(x[:, :length], rotary), x[:, length:]], dim=1) for x in (q, k))
        return q, k, v
    q, k, v = (to(video).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q, k = rotate(norm(attn.norm_q, q), rotary), rotate(norm(attn.norm_k, k), rotary)
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_q, text_k, text_v = (to(text).unflatten(2, (attn.heads, -1)) for to in added)
    text_q, text_k = norm(attn.norm_added_q, text_q), norm(attn.norm_added_k, text_k)
    return torch.cat([q, text_q], dim=1), torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)


def norm(module: nn.Module | None, x: Tensor) -> Tensor:
    return x if module is None else module(x)


def project_back(attn: Any, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of a block; those with one stream project later."""
    if getattr(attn, "to_out", None) is not None:
        video = attn.to_out[1](attn.to_out[0](video))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text


def roll(x: Tensor, first: int, end: int) -> Tensor:
    """Move the first tokens of ``[B, H, L, D]`` behind those up to `end`."""
    return torch.cat([x[:, :, first:end], x[:, :, :first], x[:, :, end:]], dim=2) if 0 < first < end else x


def count_valid(masks: Tensor) -> Tensor | None:
    """Return the valid tokens of each sample ``[B]`` on the CPU; None if a mask ``[B, S]`` has padding before them."""
    masks = masks.bool().cpu()
    lengths = masks.sum(1)
    padded_behind = masks == (torch.arange(masks.shape[1]) < lengths[:, None])
    return lengths if padded_behind.all() else None


def read_mask(config: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Valid text tokens, where the denoiser takes any mask for one of so many tokens in front."""
    return inputs["encoder_attention_mask"].sum(1, dtype=torch.int).cpu()


def make_default_of(upstream: str) -> Callable[[Any, str, nn.Module], Any]:
    """`make_instance_of` for blocks behind a refiner, which sees text only and has a processor of its own."""
    make = make_instance_of(upstream)
    make_refiners = make_instance_of("diffusers.models.attention_processor.AttnProcessor2_0")

    def make_default(config: Any, path: str, attn: Any) -> Any:
        return (make_refiners if "token_refiner" in path else make)(config, path, attn)

    return make_default
