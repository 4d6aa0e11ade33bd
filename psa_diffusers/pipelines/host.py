"""Every trick that is played on diffusers and torch, each with its reason and its undoing. It knows nothing of ours.

- `push_subclass` gives one pipeline object a class of its own; `pop_subclass` takes it back.
- `is_running` and `running_module` look for a call on the Python stacks; they change nothing.
- `add_to_pipelines` gives diffusers' pipeline classes a method, as soon as they are loaded; `_AfterImport`, which waits
  for that, removes itself. The method stays.
- `register_for_guiders` names classes of processors to diffusers' guiders. The entries stay: a class is named once.
- `refuse_impossible` is a forward hook that speaks where diffusers would fail without a remedy. Its handle removes it.

The order of torch's dense kernels is set in `processors/dense.py`, for the time of a call.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn


class _Forwarding(type):
    """Class of the subclasses that `push_subclass` makes.

    Who put something into the class below before us takes it back through us.

    cache-dit does that: it writes to `type(pipe)`, whichever class that is by then.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        below = cls.__base__
        is_taken_back = name in vars(below) and any(
            value is saved for key, saved in vars(below).items() if key not in (name, "__wrapped__")
        )
        if is_taken_back:
            setattr(below, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if name in vars(cls):
            super().__delattr__(name)
        else:
            delattr(cls.__base__, name)


_NEEDED = "_psa_subclasses"  # attribute of a pipeline: those that are in use; a copy of the pipeline has its own


def push_subclass(pipe: Any, methods: dict[str, Any]) -> type:
    """Make a pipeline an instance of a new subclass of its class, and return that.

    Args:
        pipe: The pipeline.
        methods: What the subclass adds. They must pass calls through where their feature is off: another pipeline may
            have the class without the feature (`type(pipe).from_pipe`), and `pop_subclass` may leave it in place.
    """
    cls = type(pipe)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass = _Forwarding if type(cls) in (type, _Forwarding) else type(cls)
    subclass = metaclass(cls.__name__, (cls,), {**names, **methods, "_psa_methods": methods})
    pipe.__class__ = subclass
    setattr(pipe, _NEEDED, [*getattr(pipe, _NEEDED, ()), subclass])
    return subclass


def pop_subclass(pipe: Any, subclass: type) -> None:
    """Take a subclass back, and those below it that had to wait for that.

    One that a later subclass covers waits. One in which somebody else has replaced a method since (cache-dit does that)
    stays, because their method would go with it.
    """
    needed = [each for each in getattr(pipe, _NEEDED, ()) if each is not subclass]
    setattr(pipe, _NEEDED, needed)
    if not needed:
        delattr(pipe, _NEEDED)
    while type(pipe) not in needed and "_psa_methods" in vars(type(pipe)):
        top = vars(type(pipe))
        if any(top.get(name) is not method for name, method in top["_psa_methods"].items()):
            return
        pipe.__class__ = type(pipe).__base__


def is_running(pipe: Any) -> bool:
    """Return whether a call of the pipeline is under way, in any thread."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
                return True
            frame = frame.f_back
    return False


def running_module(
    is_wanted: Callable[[nn.Module], bool],
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """Find the innermost module on this thread's stack whose forward is running and that is wanted.

    Why: diffusers hands a processor its attention and not the denoiser, whose inputs tell the grid. Changes nothing.

    Args:
        is_wanted: Module, unwrapped, to whether it is the one.

    Returns:
        The module and the arguments of its call; None if there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            module = frame.f_locals["self"]
            module = getattr(module, "_orig_mod", module)
            if is_wanted(module):
                return module, frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return None


def refuse_impossible(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Say what to do where diffusers would fail in a way that names neither the cause nor the remedy."""
    hooks = getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", None) or {}
    latents = kwargs.get("hidden_states", args[0] if args else None)
    for hook in hooks.values():
        if getattr(hook, "is_guidance_distilled", None) is False and latents is not None and len(latents) % 2:
            raise RuntimeError(
                "FasterCache expects both branches of guidance in one batch, and this pipeline runs a batch of "
                f"{len(latents)}. Pass FasterCacheConfig(..., is_guidance_distilled=True), or use another cache"
            )


def register_for_guiders(kinds: Iterable[type]) -> None:
    """Let guiders that skip attention (perturbed attention, skipped layers) know classes of processors.

    Why: they look the class up and fail for one that they do not know. Nothing to undo: it is said once a class.
    """
    try:
        from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
    except ImportError:
        return
    for kind in set(kinds):
        AttentionProcessorRegistry.register(kind, AttentionProcessorMetadata(_skip_attention))


def _skip_attention(
    attn: nn.Module, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Return what goes in, in the form of what comes out."""
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


# module of diffusers: pipeline class in it
_PIPELINE_CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


def _add_method(module: Any, method: Callable[..., Any]) -> None:
    pipeline_class = getattr(module, _PIPELINE_CLASSES[module.__name__])
    if not hasattr(pipeline_class, method.__name__):
        setattr(pipeline_class, method.__name__, method)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Adds our method when diffusers loads its pipelines. Loading them now would cost every import a second."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.waiting = set(_PIPELINE_CLASSES)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _add_method(module, self.method)

        spec.loader.exec_module = exec_module
        return spec


def add_to_pipelines(method: Callable[..., Any]) -> None:
    """Give diffusers' pipeline classes a method that they lack, now or as soon as diffusers loads them.

    Why not load them: that would cost every import a second.
    """
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    finder = _AfterImport(method)
    for name, pipeline_class in _PIPELINE_CLASSES.items():
        loaded = sys.modules.get(name)
        if loaded is not None and hasattr(loaded, pipeline_class):
            _add_method(loaded, method)
            finder.waiting.remove(name)
    if finder.waiting:
        sys.meta_path.insert(0, finder)
