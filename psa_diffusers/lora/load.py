"""Load a LoRA into a video pipeline, checked before anything changes, with the settings that a few-step LoRA needs."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from psa_diffusers.models.registry import find_family, unwrap
from psa_diffusers.pipelines.enable import DEFAULT_PRESET, disable_psa, enable_psa
from psa_diffusers.pipelines.host import is_running, pop_subclass, push_subclass
from psa_diffusers.pipelines.report import SWITCH
from psa_diffusers.presets.schema import load_preset

__all__ = ["Recipe", "load_psa_lora", "recipe_of", "unload_psa_lora"]

logger = logging.getLogger("psa_diffusers")

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
REPOSITORY = "GYP666/BLADE"
# endings of the two halves of a LoRA: the form of peft, and the older one of diffusers
_HALVES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora.down.weight": "A", "lora.up.weight": "B"}
_KEY = re.compile(
    r"(?P<component>transformer|transformer_2)\.(?P<module>.+?)\.(?P<ending>lora(_[AB]|\.down|\.up)\.\w+)"
)
_SETUP = "_psa_lora"  # attribute of a pipeline: the `_Setup` of its few-step LoRA


@dataclass(frozen=True)
class Recipe:
    """What a LoRA that was distilled to a few steps needs besides its weights.

    Attributes:
        family: Family of the denoisers that it is for.
        sections: Sections of the preset file whose models it is for.
        preset: Section and name of the preset that it was trained with.
        file: Where the published weights stand in their repository.
        targets: Regular expression for the modules that it changes, all of the denoiser that match `required` among
            them. With `rank` this is the form by which a file is recognised.
        required: Regular expression for the modules that it must change.
        rank: Its rank.
        scheduler: Scheduler class of diffusers.
        settings: What to change in the settings of the pipeline's scheduler.
        call: Arguments of the pipeline's call.
    """

    family: str
    sections: frozenset[str]
    preset: tuple[str, str]
    file: str
    targets: str
    required: str
    rank: int
    scheduler: str
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
)


@dataclass
class _Setup:
    """What a few-step LoRA has set in a pipeline, and what was there before."""

    recipe: Recipe
    adapters: list[str]
    scheduler_before: Any
    scheduler: Any
    subclass: type | None = None


def load_psa_lora(
    pipe: Any,
    source: str | Path,
    *,
    weight_name: str | None = None,
    adapter_name: str = "psa",
    scale: float = 1.0,
    fuse: bool = False,
    few_steps: bool | None = None,
    load_into_transformer_2: bool = False,
) -> Any:
    """Load a LoRA from a safetensors file and make it the active adapter.

    Works before and after `enable_psa`, with the same result. The file is checked against the denoiser first: that it
    exists, that its keys are those of a diffusers LoRA, that every target exists and has the right shape.

    A LoRA that was distilled to four steps with PSA (CogVideoX-5B, Wan2.1-1.3B) is recognised by its form, and the
    pipeline gets what it needs: its scheduler; four steps and guidance 1.0 as defaults of the call; the preset that it
    was trained with, psa_4steps, as default of `enable_psa`. All of it goes back with `unload_psa_lora(pipe)` or
    `pipe.unload_lora_weights()`.

        pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", torch_dtype=torch.bfloat16).to("cuda")
        load_psa_lora(pipe, "GYP666/BLADE")
        enable_psa(pipe)
        video = pipe("a panda plays the guitar").frames[0]

    Args:
        pipe: A diffusers pipeline that can load LoRAs.
        source: A safetensors file, a folder with one, or a repository on the hub.
        weight_name: The file in the folder or repository, if it has several. Of the repository with the published
            LoRAs, the one for this pipeline is known.
        adapter_name: Name of the adapter, for `pipe.set_adapters` and `pipe.delete_adapters`. Other adapters of the
            denoiser become inactive, as always when diffusers loads one; `pipe.set_adapters([...], [...])` combines
            several.
        scale: Strength, 1.0 as trained.
        fuse: Whether to merge the LoRA into the weights: faster, undone (to rounding) by `unload_psa_lora(pipe)`.
        few_steps: Whether it is a LoRA for four steps. None recognises that: rank 64 on the attention projections of
            every block, and nothing else, of a model that has such a LoRA. False loads any such file as an ordinary
            LoRA, True any LoRA of such a model with the settings for four steps.
        load_into_transformer_2: Whether a file without keys for `transformer_2` is for the second expert (Wan 2.2). A
            file with keys for both goes to both.

    Returns:
        The pipeline itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no LoRA of this model, the adapter name is taken, or `few_steps` is True for a model
            without such a LoRA.
        TypeError: If the pipeline cannot load LoRAs.
        RuntimeError: If the pipeline is running and the LoRA would change its schedule.
            Whatever is raised, the pipeline has not been changed.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"load_psa_lora needs a pipeline that can load LoRAs, got {type(pipe).__name__}")
    weights, metadata = _read(pipe, source, weight_name)
    if load_into_transformer_2 and not any(key.startswith("transformer_2.") for key in weights):
        weights = {re.sub(r"^transformer\.", "transformer_2.", key): weight for key, weight in weights.items()}
        metadata = metadata and {re.sub(r"^transformer\.", "transformer_2.", key): metadata[key] for key in metadata}
    modules = check_lora(pipe, weights, source)
    denoisers = {component: unwrap(getattr(pipe, component)) for component in modules}
    for component, denoiser in denoisers.items():
        if adapter_name in getattr(denoiser, "peft_config", {}):
            raise ValueError(
                f"{component} has an adapter {adapter_name!r} already; choose another adapter_name, or call "
                f"unload_psa_lora(pipe, {adapter_name!r}) first"
            )
    recipe = choose_recipe(pipe, modules, few_steps)
    setup = None if recipe is None else _make_setup(pipe, recipe, adapter_name)

    active = {component: _active_adapters(denoiser) for component, denoiser in denoisers.items()}
    fused = {component: _fused_adapters(denoiser) for component, denoiser in denoisers.items()}
    if any(fused.values()) and not fuse:
        names = ", ".join(sorted({name for names in fused.values() for name in names}))
        raise ValueError(
            f"the adapters {names} are fused into the weights, and peft computes with fused or with loose adapters, "
            "not with both. Pass fuse=True to fuse this one as well, or call pipe.unfuse_lora() first"
        )
    try:
        for component, denoiser in denoisers.items():
            _take_out_of_weights(pipe, fused[component], only=component, for_now=True)
            denoiser.load_lora_adapter(
                weights, prefix=component, adapter_name=adapter_name, metadata=metadata, _pipeline=pipe
            )
            # of the denoiser, not of the pipeline: what the other expert has stays
            denoiser.set_adapters([adapter_name], [scale])
            if fuse:
                _fuse(pipe, component, [*fused[component], adapter_name])
    except BaseException:
        _take_out_of_weights(pipe, [adapter_name], for_now=True)
        for component, denoiser in denoisers.items():
            _delete(denoiser, adapter_name, active[component])
            if fused[component] and not _fused_adapters(denoiser):
                _fuse(pipe, component, fused[component])
        raise
    if setup is not None:
        _set_up(pipe, setup)
    logger.info("LoRA %s in %s as %r, scale %g", source, " and ".join(denoisers), adapter_name, scale)
    return pipe


def unload_psa_lora(pipe: Any, adapter_name: str = "psa") -> Any:
    """Take a LoRA out again, out of the weights too if it was fused, and give back what it has set in the pipeline.

    Args:
        pipe: A pipeline after `load_psa_lora`.
        adapter_name: Name of the adapter. Other adapters stay; without any left, the denoiser has its own modules back.

    Returns:
        The pipeline itself.

    Raises:
        ValueError: If there is no such adapter. The message lists those that there are.
        RuntimeError: If the pipeline is running and the LoRA has changed its schedule.
    """
    denoisers = _loadable(pipe).values()
    names = sorted({name for denoiser in denoisers for name in _adapters(denoiser)})
    if adapter_name not in names:
        raise ValueError(f"the pipeline has no adapter {adapter_name!r}; it has {', '.join(names) or 'none'}")
    if getattr(pipe, _SETUP, None) is not None:
        _check_idle(pipe)
    _take_out_of_weights(pipe, [adapter_name])
    for denoiser in denoisers:
        _delete(denoiser, adapter_name, [name for name in _active_adapters(denoiser) if name != adapter_name])
    _forget_adapters(pipe)
    return pipe


def recipe_of(pipe: Any) -> Recipe | None:
    """Return the recipe of the few-step LoRA that the pipeline has, None if it has none."""
    setup = getattr(pipe, _SETUP, None)
    return None if setup is None else setup.recipe


def _read(pipe: Any, source: str | Path, weight_name: str | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the weights, with the keys of diffusers where diffusers can convert them, and the metadata of the file."""
    from safetensors import SafetensorError

    known = _published_file(pipe)
    path = _local_file(source, weight_name, known)
    place, name = source, weight_name
    if path is None and name is None and str(source) == REPOSITORY:
        if known is None:
            models = ", ".join(sorted(recipe.preset[0] for recipe in RECIPES))
            raise ValueError(
                f"{REPOSITORY} has no LoRA for this pipeline, only for {models}; pass weight_name for others"
            )
        name = known
    if path is not None:
        # offline, older diffusers wants the name of the file; with another ending and a name it would unpickle
        place, name = (path.parent, path.name) if path.suffix == ".safetensors" else (path, None)
    try:
        return pipe.lora_state_dict(str(place), weight_name=name, use_safetensors=True, return_lora_metadata=True)
    except OSError as error:
        raise FileNotFoundError(f"cannot get the LoRA {source!r} ({weight_name or 'any file'}): {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path or source} is not a safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path or source} is not a LoRA that diffusers can read: key {error} is missing") from error


def _published_file(pipe: Any) -> str | None:
    """Return where the published LoRA for this pipeline stands in its repository, None if there is none."""
    recipe = _recipe_for(pipe)
    return None if recipe is None else recipe.file


def _local_file(source: str | Path, weight_name: str | None, known: str | None = None) -> Path | None:
    """Return the file that is meant; None if `source` can only be a repository on the hub.

    Args:
        source: As the user gave it.
        weight_name: As the user gave it.
        known: Where the file stands in a copy of the repository of the published LoRAs.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if weight_name is None and known is not None and (path / known).is_file():
            return path / known
        names = sorted(file.name for file in path.glob("*.safetensors"))
        name = weight_name or (DEFAULT_FILE if DEFAULT_FILE in names else names[0] if len(names) == 1 else None)
        if name is None and names:
            raise ValueError(f"{path} has several files; pass weight_name, one of {', '.join(names)}")
        if name is None or not (path / name).is_file():
            raise FileNotFoundError(
                f"no LoRA file {name or '*.safetensors'} in {path}; it has {', '.join(names) or 'none'}"
            )
        return path / name
    is_repository = (
        isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix != ".safetensors"
    )
    if not is_repository:
        raise FileNotFoundError(
            f"no LoRA file at {path}; give a safetensors file, its folder, or a hub repository owner/name"
        )
    return None


def check_lora(pipe: Any, weights: Mapping[str, Tensor], source: str | Path) -> dict[str, dict[str, int]]:
    """Check the keys, ranks and shapes of a LoRA against the denoisers of a pipeline. Reads shapes only.

    Args:
        pipe: The pipeline. Its denoisers may be on the meta device.
        weights: The LoRA by key; so may these.
        source: Its name, for messages.

    Returns:
        The rank by component and module path.

    Raises:
        ValueError: If it does not fit. The message says where.
    """
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    foreign = []
    for key, weight in weights.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        elif half := _HALVES.get(match["ending"]):
            halves.setdefault((match["component"], match["module"]), {})[half] = weight
    if foreign or not halves:
        got = f"{foreign[0]!r} and {len(foreign) - 1} more of {len(weights)}" if foreign else "none at all"
        raise ValueError(
            f"{source} is not a LoRA for {type(pipe).__name__}: expected keys like "
            f"'transformer.blocks.0.attn1.to_q.lora_A.weight', got {got}. Convert it to the diffusers layout first"
        )
    modules: dict[str, dict[str, int]] = {}
    for component, module in halves:
        denoiser = getattr(pipe, component, None)
        if denoiser is None:
            raise ValueError(f"{source} has weights for {component}, which this {type(pipe).__name__} does not have")
        denoiser = unwrap(denoiser)
        problem = _mismatch(denoiser, module, halves[component, module])
        if problem:
            name = type(denoiser).__name__
            raise ValueError(f"{source} is a LoRA of another model than this {name}: {component}.{module} {problem}")
        modules.setdefault(component, {})[module] = halves[component, module]["A"].shape[0]
    return modules


def _mismatch(denoiser: nn.Module, path: str, halves: dict[str, Tensor]) -> str:
    """Say why two halves, A ``[rank, in]`` and B ``[out, rank]``, cannot be added to a module; empty if they can."""
    try:
        module = denoiser.get_submodule(path)
    except AttributeError:
        return "does not exist in it"
    if len(halves) < 2:
        return f"has only one half of a LoRA, lora_{next(iter(halves))}"
    down, up = halves["A"].shape, halves["B"].shape
    width = tuple(getattr(module, side, None) for side in ("in_features", "out_features"))
    if None in width:
        width = tuple(getattr(module, side, None) for side in ("in_channels", "out_channels"))
    if None in width:
        return f"is a {type(module).__name__}, not a linear or convolution layer"
    if down[0] != up[1]:
        return f"has halves of rank {down[0]} and {up[1]}"
    if (down[1], up[0]) != width:
        return f"has {width[0]} inputs and {width[1]} outputs, the LoRA {down[1]} and {up[0]}"
    return ""


def _recipe_for(pipe: Any) -> Recipe | None:
    """Return the recipe of the few-step LoRA for this kind of pipeline, None if there is no such LoRA."""
    denoiser = unwrap(getattr(pipe, "transformer", None))
    family = find_family(denoiser)
    if family is None or not set(_FOUR_STEPS) <= inspect.signature(type(pipe).__call__).parameters.keys():
        return None
    section, _ = family.section_of(denoiser, pipe)
    fitting = (recipe for recipe in RECIPES if family.name == recipe.family and section in recipe.sections)
    return next(fitting, None)


def choose_recipe(pipe: Any, modules: dict[str, dict[str, int]], few_steps: bool | None) -> Recipe | None:
    """Return the recipe for a LoRA, None for an ordinary one; `modules` as `check_lora` returns them."""
    recipe = None if few_steps is False else _recipe_for(pipe)
    if few_steps and recipe is None:
        models = ", ".join(sorted(recipe.preset[0] for recipe in RECIPES))
        raise ValueError(f"few_steps=True: there is no LoRA for few steps for this pipeline, only for {models}")
    if few_steps or recipe is None:
        return recipe
    ranks = modules.get("transformer", {})
    required = {path for path, _ in unwrap(pipe.transformer).named_modules() if re.fullmatch(recipe.required, path)}
    is_it = (
        modules.keys() == {"transformer"}
        and required <= ranks.keys()
        and all(re.fullmatch(recipe.targets, path) and rank == recipe.rank for path, rank in ranks.items())
    )
    return recipe if is_it else None


def _make_setup(pipe: Any, recipe: Recipe, adapter_name: str) -> _Setup:
    """Make all that can fail, and change nothing."""
    import diffusers

    _check_idle(pipe)
    switch = getattr(pipe, SWITCH, None)
    if switch is not None and switch.arguments["preset"] is None:
        load_preset(
            *recipe.preset, **{key: value for key, value in switch.arguments.items() if key not in ("preset", "report")}
        )
    scheduler = getattr(diffusers, recipe.scheduler).from_config(pipe.scheduler.config, **recipe.settings)
    return _Setup(recipe, [adapter_name], pipe.scheduler, scheduler)


def _set_up(pipe: Any, setup: _Setup) -> None:
    before = getattr(pipe, _SETUP, None)
    if before is not None:
        before.adapters += setup.adapters
        return
    psa = _switch_off(pipe)
    pipe.scheduler = setup.scheduler
    setattr(pipe, _SETUP, setup)
    setattr(pipe, DEFAULT_PRESET, setup.recipe.preset)
    setup.subclass = push_subclass(pipe, _methods(type(pipe), setup.recipe))
    _switch_on(pipe, psa)
    recipe = setup.recipe
    logger.info(
        "for this LoRA the pipeline has now %s, %s as defaults of its call, and the preset %s of enable_psa",
        recipe.scheduler,
        ", ".join(f"{name}={value}" for name, value in recipe.call.items()),
        recipe.preset[1],
    )
    switch = getattr(pipe, SWITCH, None)
    if switch is not None and switch.run.preset.name != recipe.preset[1]:
        logger.warning(
            "PSA stays at the preset %r, which was chosen; the LoRA was trained with %r",
            switch.run.preset.name,
            recipe.preset[1],
        )


def _give_back(pipe: Any, setup: _Setup) -> None:
    psa = _switch_off(pipe)
    delattr(pipe, _SETUP)
    delattr(pipe, DEFAULT_PRESET)
    if pipe.scheduler is setup.scheduler:  # else somebody has chosen another since
        pipe.scheduler = setup.scheduler_before
    pop_subclass(pipe, setup.subclass)
    _switch_on(pipe, psa)


def _switch_off(pipe: Any) -> dict[str, Any] | None:
    """Switch PSA off if it is on with the default preset, which changes; return how to switch it on again."""
    switch = getattr(pipe, SWITCH, None)
    if switch is None or switch.arguments["preset"] is not None:
        return None
    disable_psa(pipe)
    return switch.arguments


def _switch_on(pipe: Any, arguments: dict[str, Any] | None) -> None:
    if arguments is not None:
        enable_psa(pipe, **arguments)


def _methods(cls: type, recipe: Recipe) -> dict[str, Any]:
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
    __call__.__signature__ = signature.replace(parameters=defaults)

    @functools.wraps(cls.unload_lora_weights)
    def unload_lora_weights(self: Any) -> None:
        if (setup := getattr(self, _SETUP, None)) is not None:
            _check_idle(self)
            _take_out_of_weights(self, setup.adapters)
        cls.unload_lora_weights(self)
        _forget_adapters(self)

    @functools.wraps(cls.delete_adapters)
    def delete_adapters(self: Any, adapter_names: str | list[str]) -> None:
        if (setup := getattr(self, _SETUP, None)) is not None:
            _check_idle(self)
            names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
            _take_out_of_weights(self, [name for name in names if name in setup.adapters])
        cls.delete_adapters(self, adapter_names)
        _forget_adapters(self)

    return {"__call__": __call__, "unload_lora_weights": unload_lora_weights, "delete_adapters": delete_adapters}


def _check_idle(pipe: Any) -> None:
    if is_running(pipe):
        raise RuntimeError("the pipeline is running: load and unload a LoRA for few steps before or after the call")


def _forget_adapters(pipe: Any) -> None:
    """Give back what the few-step LoRA has set, if its adapters are gone."""
    setup = getattr(pipe, _SETUP, None)
    if setup is None:
        return
    there = {name for denoiser in _loadable(pipe).values() for name in _adapters(denoiser)}
    setup.adapters = [name for name in setup.adapters if name in there]
    if not setup.adapters:
        _give_back(pipe, setup)


def _loadable(pipe: Any) -> dict[str, nn.Module]:
    parts = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: unwrap(part) for name, part in parts.items() if hasattr(part, "load_lora_adapter")}


def _adapters(denoiser: nn.Module) -> list[str]:
    return list(getattr(denoiser, "peft_config", None) or ())


def _active_adapters(denoiser: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)), None)
    return [] if layer is None else list(layer.active_adapters)


def _delete(denoiser: nn.Module, adapter_name: str, active: list[str]) -> None:
    """Delete an adapter, if it is there, and make others active; the last one takes the layers of peft with it."""
    if adapter_name not in _adapters(denoiser):
        return
    others = [name for name in _adapters(denoiser) if name != adapter_name]
    if not others:
        denoiser.unload_lora()
        return
    denoiser.set_adapter(active or others[:1])
    denoiser.delete_adapters(adapter_name)


def _fused_adapters(denoiser: nn.Module) -> list[str]:
    return list({name: None for part in denoiser.modules() for name in getattr(part, "merged_adapters", ())})


def _fuse(pipe: Any, component: str, adapter_names: list[str]) -> None:
    denoiser = getattr(pipe, component)
    if unwrap(denoiser) is denoiser:
        pipe.fuse_lora(components=[component], adapter_names=adapter_names)
    else:  # the pipeline passes over a compiled denoiser
        unwrap(denoiser).fuse_lora(adapter_names=adapter_names)


def _take_out_of_weights(
    pipe: Any, adapter_names: list[str], *, only: str | None = None, for_now: bool = False
) -> None:
    """Undo the fusing of some adapters. What else is fused stays, unless the caller fuses again himself (`for_now`)."""
    for component, denoiser in _loadable(pipe).items():
        fused = _fused_adapters(denoiser)
        if only not in (None, component) or not set(fused) & set(adapter_names):
            continue
        if getattr(pipe, component) is denoiser:
            pipe.unfuse_lora(components=[component])
        else:
            denoiser.unfuse_lora()
        others = [name for name in fused if name not in adapter_names]
        if others and not for_now:
            _fuse(pipe, component, others)
