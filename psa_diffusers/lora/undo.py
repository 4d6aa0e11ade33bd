"""What a few-step LoRA sets in a pipeline besides its weights, and how all of it goes back.

The scheduler, the defaults of the call and the default preset change when such a LoRA is loaded. They go back when its
last adapter goes, whichever way that is: through us, `pipe.unload_lora_weights()` or `pipe.delete_adapters(...)`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any

from psa_diffusers.lora.adapters import adapters_of, loadable_parts, take_out_of_weights
from psa_diffusers.lora.recipes import Recipe
from psa_diffusers.pipelines.enable import enable_psa
from psa_diffusers.pipelines.host import is_running, pop_subclass, push_subclass
from psa_diffusers.pipelines.state import set_state, state_of
from psa_diffusers.presets import load_preset

__all__ = ["FewStepSetup", "apply_setup", "check_idle", "forget_adapters", "make_setup", "recipe_of", "setup_of"]

logger = logging.getLogger("psa_diffusers")


@dataclass
class FewStepSetup:
    """What a few-step LoRA has set in a pipeline, and what was there before.

    Attributes:
        recipe: What the LoRA needs.
        adapters: Names of the adapters of such LoRAs; with the last of them the set-up goes.
        scheduler_before: The scheduler that was there.
        scheduler: The one in its place.
        subclass: The class that the pipeline was given for the defaults of its call.
    """

    recipe: Recipe
    adapters: list[str]
    scheduler_before: Any
    scheduler: Any
    subclass: type | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the pipeline gets a class of its own."""
        return {**vars(self), "subclass": None}

    def wake(self, pipe: Any) -> None:
        """Sit down on a copy of the pipeline, whose scheduler and weights are copies already."""
        set_state(pipe, lora=self, default_preset=self.recipe.preset)
        self.subclass = push_subclass(pipe, _methods(type(pipe), self.recipe))


def setup_of(pipe: Any) -> FewStepSetup | None:
    """Return what a few-step LoRA has set in the pipeline, None if it has none."""
    setup: FewStepSetup | None = state_of(pipe).lora
    return setup


def recipe_of(pipe: Any) -> Recipe | None:
    """Return the recipe of the few-step LoRA that the pipeline has, None if it has none."""
    setup = setup_of(pipe)
    return None if setup is None else setup.recipe


def make_setup(pipe: Any, recipe: Recipe, adapter_name: str) -> FewStepSetup:
    """Make all that can fail, and change nothing.

    Raises:
        RuntimeError: If the pipeline is running.
        ValueError: If the arguments that PSA was enabled with do not fit the preset of the LoRA.
    """
    import diffusers

    check_idle(pipe)
    switch = state_of(pipe).switch
    if switch is not None and switch.arguments["preset"] is None:
        load_preset(
            *recipe.preset, **{key: value for key, value in switch.arguments.items() if key not in ("preset", "report")}
        )
    scheduler = pipe.scheduler
    if recipe.scheduler is not None:
        scheduler = getattr(diffusers, recipe.scheduler).from_config(scheduler.config, **recipe.settings)
    return FewStepSetup(recipe, [adapter_name], pipe.scheduler, scheduler)


def apply_setup(pipe: Any, setup: FewStepSetup) -> None:
    """Give the pipeline what the LoRA needs, or add the adapter to a set-up that is there."""
    before = setup_of(pipe)
    if before is not None:
        before.adapters += setup.adapters
        return
    pipe.scheduler = setup.scheduler
    setup.wake(pipe)
    _change_preset(pipe)
    recipe = setup.recipe
    logger.info(
        "for this LoRA the pipeline has now %s, %s as defaults of its call, and the preset %s of enable_psa",
        type(setup.scheduler).__name__,
        ", ".join(f"{name}={value}" for name, value in recipe.call.items()),
        recipe.preset[1],
    )
    switch = state_of(pipe).switch
    if switch is not None and switch.run.preset.name != recipe.preset[1]:
        logger.warning(
            "PSA stays at the preset %r, which was chosen; the LoRA was trained with %r",
            switch.run.preset.name,
            recipe.preset[1],
        )


def forget_adapters(pipe: Any) -> None:
    """Give back what the few-step LoRA has set, if its adapters are gone."""
    setup = setup_of(pipe)
    if setup is None:
        return
    there = {name for denoiser in loadable_parts(pipe).values() for name in adapters_of(denoiser)}
    setup.adapters = [name for name in setup.adapters if name in there]
    if not setup.adapters:
        _give_back(pipe, setup)


def check_idle(pipe: Any) -> None:
    """Refuse to change the schedule of a pipeline that is running.

    Raises:
        RuntimeError: If it is running.
    """
    if is_running(pipe):
        raise RuntimeError("the pipeline is running: load and unload a LoRA for few steps before or after the call")


def _give_back(pipe: Any, setup: FewStepSetup) -> None:
    set_state(pipe, lora=None, default_preset=None)
    if pipe.scheduler is setup.scheduler:  # else somebody has chosen another since
        pipe.scheduler = setup.scheduler_before
    if setup.subclass is not None:
        pop_subclass(pipe, setup.subclass)
    _change_preset(pipe)


def _change_preset(pipe: Any) -> None:
    """Follow the default preset, where PSA is on with it."""
    switch = state_of(pipe).switch
    if switch is not None and switch.arguments["preset"] is None:
        enable_psa(pipe, **switch.arguments)


def _methods(cls: Any, recipe: Recipe) -> dict[str, Any]:
    """Methods of a subclass of a pipeline class: defaults of the call, and unloading that gives back everything."""
    signature = inspect.signature(cls.__call__)

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if recipe_of(self) is not None:
            try:
                given = signature.bind_partial(self, *args, **kwargs).arguments
            except TypeError:
                return cls.__call__(self, *args, **kwargs)  # lets the pipeline complain in its own words
            kwargs = {**{name: value for name, value in recipe.call.items() if name not in given}, **kwargs}
        return cls.__call__(self, *args, **kwargs)

    defaults = [
        each.replace(default=recipe.call.get(name, each.default)) for name, each in signature.parameters.items()
    ]
    __call__.__signature__ = signature.replace(parameters=defaults)  # type: ignore[attr-defined]

    @functools.wraps(cls.unload_lora_weights)
    def unload_lora_weights(self: Any) -> None:
        if (setup := setup_of(self)) is not None:
            check_idle(self)
            take_out_of_weights(self, setup.adapters)
        cls.unload_lora_weights(self)
        forget_adapters(self)

    @functools.wraps(cls.delete_adapters)
    def delete_adapters(self: Any, adapter_names: str | list[str]) -> None:
        if (setup := setup_of(self)) is not None:
            check_idle(self)
            names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
            take_out_of_weights(self, [name for name in names if name in setup.adapters])
        cls.delete_adapters(self, adapter_names)
        forget_adapters(self)

    return {"__call__": __call__, "unload_lora_weights": unload_lora_weights, "delete_adapters": delete_adapters}
