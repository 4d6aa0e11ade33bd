"""What the small pipelines of several families are made of, and called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .case import DROP, TEXT_TOKENS

NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
"""The parts of a pipeline that is given embeddings instead of prompts."""
NO_TEXTS: dict[str, Any] = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
"""The same of a pipeline with two text encoders."""


def seeded(make: Callable[..., Any], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Build a module with weights that depend on `seed` alone, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args, **kwargs).eval()


def denoiser(kind: str, changes: dict[str, Any], **config: Any) -> Any:
    """Build a transformer of diffusers.

    Args:
        kind: Name of its class.
        changes: What a test wants otherwise, a `seed` among it.
        config: The family's configuration; two heads of 16 channels unless it says more.
    """
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    return seeded(getattr(diffusers, kind), **{**heads, **config, **changes})


def assemble(kind: str | type, **parts: Any) -> Any:
    """Build a pipeline without a progress bar, of a class or of the name of one of diffusers.

    A name is looked up now: where a test puts a stand-in in the place of a class, its builder must name the class.
    """
    pipe = (getattr(diffusers, kind) if isinstance(kind, str) else kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# texts


def tokenizer() -> PreTrainedTokenizerFast:
    """A character is a token; ids are the same in every process and version."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    backend = Tokenizer(
        models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], unk_id=2)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder(config_class: type = T5Config, model_class: type = T5EncoderModel) -> Any:
    config = config_class(
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return seeded(model_class, config)


def t5() -> dict[str, Any]:
    """The parts of a pipeline that reads prompts."""
    return {"tokenizer": tokenizer(), "text_encoder": text_encoder()}


def umt5() -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": text_encoder(UMT5Config, UMT5EncoderModel)}


def letters(prompt: str) -> int:
    return min(len(prompt), TEXT_TOKENS)


def embedded(prompts: Any, width: int, tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-ins for a text encoder's output ``[B, tokens, width]``, and the mask: a letter is a valid token."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    texts = [torch.randn(tokens, width, generator=torch.Generator().manual_seed(sum(p.encode()))) for p in prompts]
    mask = torch.stack([(torch.arange(tokens) < letters(p)).long() for p in prompts])
    return torch.stack(texts), mask


def masked(embeds: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Embeddings and their mask under the names that most pipelines give them."""
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def embeds_for_prompts(
    asked: dict[str, Any],
    names: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]] = masked,
    width: int = 16,
) -> dict[str, Any]:
    """Embeddings instead of both prompts.

    Args:
        asked: The inputs that all pipelines take.
        names: Makes a pipeline's arguments out of the embeddings of a prompt and their mask.
        width: Channels of the embeddings.
    """
    given = {"prompt": DROP, "negative_prompt": DROP}
    for prefix in ("", "negative_"):
        arguments = names(*embedded(asked[f"{prefix}prompt"], width))
        given |= {prefix + name: value for name, value in arguments.items()}
    return given


# pictures


def picture(height: int, width: int) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((width, height))


def pictures(height: int, width: int, frames: int) -> list[Image.Image]:
    return [picture(height, width).rotate(10 * frame) for frame in range(frames)]


def one_picture(height: int, width: int, frames: int) -> dict[str, Any]:
    """What a pipeline that begins with a picture takes beyond the rest."""
    return {"image": picture(height, width)}


def siglip() -> dict[str, Any]:
    """The parts of a pipeline that look at a picture."""
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    processor = SiglipImageProcessor(size={"height": 8, "width": 8})
    return {"image_encoder": seeded(SiglipVisionModel, config), "feature_extractor": processor}


# guidance


def guider() -> Any:
    return diffusers.ClassifierFreeGuidance(guidance_scale=3.0)


def set_guider(pipe: Any, asked: dict[str, Any]) -> None:
    """Where guidance is a part of the pipeline, no argument."""
    pipe.guider.guidance_scale = asked["guidance_scale"]
