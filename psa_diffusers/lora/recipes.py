"""The LoRAs that were distilled to a few steps with PSA: how each is recognised, and what it needs of a pipeline."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psa_diffusers.models.registry import find_family
from psa_diffusers.pipelines.host import unwrap

__all__ = ["DEFAULT_FILE", "RECIPES", "REPOSITORY", "Recipe", "choose_recipe", "published_models", "recipes_for"]

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers saves a LoRA."""

REPOSITORY = "GYP666/BLADE"
"""The repository on the hub that has the published LoRAs."""


@dataclass(frozen=True)
class Recipe:
    """What a LoRA that was distilled to a few steps needs besides its weights.

    Attributes:
        family: Family of the denoisers that it is for.
        sections: Sections of the preset file whose models it is for.
        preset: Section and name of the preset that it was trained with.
        file: Where the published weights stand in their repository; None for those that ship with the package.
        targets: Regular expression for the modules that it changes, all of the denoiser that match `required` among
            them. With `rank` this is the form by which a file is recognised.
        required: Regular expression for the modules that it must change.
        rank: Its rank.
        scheduler: Scheduler class of diffusers; None for the pipeline's own.
        settings: What to change in the settings of the pipeline's scheduler.
        call: Arguments of the pipeline's call.
    """

    family: str
    sections: frozenset[str]
    preset: tuple[str, str]
    file: str | None
    targets: str
    required: str
    rank: int
    scheduler: str | None
    settings: Mapping[str, Any]
    call: Mapping[str, Any]


_PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0)"
_FOUR_STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0}
RECIPES = (
    Recipe(
        family="CogVideoX",
        sections=frozenset({"CogVideo_5b", "demo"}),
        preset=("CogVideo_5b", "psa_4steps"),
        file=f"cogvideox-5b-psa-lora/{DEFAULT_FILE}",
        targets=rf"transformer_blocks\.\d+\.attn1\.{_PROJECTIONS}",
        required=rf"transformer_blocks\.\d+\.attn1\.{_PROJECTIONS}",
        rank=64,
        scheduler="CogVideoXDPMScheduler",
        settings={"timestep_spacing": "trailing"},
        call=_FOUR_STEPS,
    ),
    # the schedule of this one was not published: it is that of the same authors' LoRA for eight steps
    Recipe(
        family="Wan",
        sections=frozenset({"Wan2.1_1.3b"}),
        preset=("Wan2.1_1.3b", "psa_4steps"),
        file=f"wan21-1.3b-psa-lora/{DEFAULT_FILE}",
        targets=rf"blocks\.\d+\.attn[12]\.{_PROJECTIONS}",
        required=rf"blocks\.\d+\.attn1\.{_PROJECTIONS}",
        rank=64,
        scheduler="UniPCMultistepScheduler",
        settings={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        call=_FOUR_STEPS,
    ),
    # ships with the package
    Recipe(
        family="CogVideoX",
        sections=frozenset({"demo"}),
        preset=("demo", "psa_4steps"),
        file=None,
        targets=rf"transformer_blocks\.\d+\.attn1\.{_PROJECTIONS}",
        required=rf"transformer_blocks\.\d+\.attn1\.{_PROJECTIONS}",
        rank=48,
        scheduler=None,
        settings={},
        call=_FOUR_STEPS,
    ),
)


def recipes_for(pipe: Any) -> list[Recipe]:
    """Return the recipes of the few-step LoRAs for this kind of pipeline."""
    denoiser = getattr(pipe, "transformer", None)
    if denoiser is None:
        return []
    denoiser = unwrap(denoiser)
    family = find_family(denoiser)
    if family is None or not set(_FOUR_STEPS) <= inspect.signature(type(pipe).__call__).parameters.keys():
        return []
    section, _ = family.section_of(denoiser, pipe)
    return [recipe for recipe in RECIPES if family.name == recipe.family and section in recipe.sections]


def choose_recipe(pipe: Any, modules: Mapping[str, Mapping[str, int]], few_steps: bool | None) -> Recipe | None:
    """Return the recipe for a LoRA, None for an ordinary one.

    Args:
        pipe: The pipeline that it goes into.
        modules: Rank by component and module path, as `check_lora` returns them.
        few_steps: Whether it is one for few steps; None tells that by its form.

    Raises:
        ValueError: If `few_steps` is True and there is no such LoRA for this pipeline.
    """
    recipes = [] if few_steps is False else recipes_for(pipe)
    if few_steps and not recipes:
        raise ValueError(
            f"few_steps=True: there is no LoRA for few steps for this pipeline, only for {published_models()}"
        )
    by_form = next((recipe for recipe in recipes if _has_form(pipe, modules, recipe)), None)
    return recipes[0] if few_steps and by_form is None else by_form


def _has_form(pipe: Any, modules: Mapping[str, Mapping[str, int]], recipe: Recipe) -> bool:
    ranks = modules.get("transformer", {})
    required = {path for path, _ in unwrap(pipe.transformer).named_modules() if re.fullmatch(recipe.required, path)}
    return (
        modules.keys() == {"transformer"}
        and required <= ranks.keys()
        and all(re.fullmatch(recipe.targets, path) and rank == recipe.rank for path, rank in ranks.items())
    )


def published_models() -> str:
    """Return the models that have a LoRA for few steps, for messages."""
    return ", ".join(sorted(recipe.preset[0] for recipe in RECIPES if recipe.file is not None))
