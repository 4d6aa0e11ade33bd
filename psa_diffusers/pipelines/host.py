"""Every trick that is played on diffusers and torch, each with its reason and its undoing. It knows nothing of ours.

- `push_subclass` gives one pipeline object a class of its own; `pop_subclass` takes it back.
- `is_running`, `running_module` and `running_pipeline` look for a call on the Python stacks; they change nothing.
- `add_hooks` and `wrap_checkpointing` put functions of ours into a module and return what takes them out. Copies of the
  module and pickles have none.
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
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import nn

# module of diffusers: pipeline class in it
_PIPELINE_CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


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
    cls: Any = type(pipe)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = _Forwarding if type(cls) in (type, _Forwarding) else type(cls)
    methods = {**methods, "__reduce_ex__": _reduce}
    subclass: type = metaclass(cls.__name__, (cls,), {**names, **methods, "_psa_methods": methods})
    pipe.__class__ = subclass
    setattr(pipe, _NEEDED, [*getattr(pipe, _NEEDED, ()), subclass])
    return subclass


def _reduce(pipe: Any, protocol: Any) -> tuple[Any, ...]:
    """Let a copy or a pickle of a pipeline be of its own class; what sat on it is asked to come back there."""
    cls = next(cls for cls in type(pipe).__mro__ if "_psa_methods" not in vars(cls))
    return _rebuild, (cls, {name: value for name, value in vars(pipe).items() if name != _NEEDED})


def _rebuild(cls: Any, attributes: dict[str, Any]) -> Any:
    pipe = cls.__new__(cls)
    vars(pipe).update(attributes)
    for value in attributes.values():
        if isinstance(value, Sleeping):
            value.wake(pipe)
    return pipe


class Sleeping:
    """What sat on a pipeline, in a copy of it that is being made."""

    def wake(self, pipe: Any) -> None:
        """Sit down on the copy."""
        raise NotImplementedError


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
    for top in sys._current_frames().values():
        frame: FrameType | None = top
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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            module = unwrap(frame.f_locals["self"])
            if is_wanted(module):
                return module, frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return None


def running_pipeline(denoiser: nn.Module) -> Any:
    """Find the innermost pipeline on this thread's stack whose call is running and that owns a denoiser.

    Why: pipelines share denoisers (`from_pipe`), and one that PSA was not enabled on announces nothing. It only looks.

    Returns:
        The pipeline, None if there is none.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            if _is_pipeline(pipe) and any(unwrap(part) is denoiser for part in modules_of(pipe).values()):
                return pipe
        frame = frame.f_back
    return None


def _is_pipeline(x: Any) -> bool:
    return any(cls.__name__ in _PIPELINE_CLASSES.values() for cls in type(x).__mro__)


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules among the components of a pipeline, by name, as they are now."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


_INNER = (
    "_orig_mod",
    "base_model",
    "model",
    "module",
    "_fsdp_wrapped_module",
)  # what wrappers call the module that they wrap


def unwrap(module: Any) -> Any:
    """Return the module inside of wrappers: compiled, peft's, for several devices, or any that holds nothing else."""
    while (inner := _inner_of(module)) is not None:
        module = inner
    return module


def _inner_of(module: Any) -> nn.Module | None:
    if not isinstance(module, nn.Module):
        return None
    parts = module._modules
    name = next((name for name in _INNER if parts.get(name) is not None), None)
    holds_nothing_else = len(parts) == 1 and not module._parameters
    is_known = name == "_orig_mod" or type(module).__module__.startswith("peft.")
    return parts[name] if name is not None and (holds_nothing_else or is_known) else None


class Handle:
    """Undoes one thing, once."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undo it."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


class _Hook:
    """A forward hook of ours. A copy of a module, or a pickled one, has none: what it would tell is of the original."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what it reads is new each time; the forward that follows is compiled as before
    def __call__(self, module: nn.Module, *args: Any) -> None:
        self.function(module, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    """Stands where a copied module had a hook of ours."""


def add_hooks(module: nn.Module, before: Callable[..., None], after: Callable[..., None] | None = None) -> list[Handle]:
    """Call a function before each forward of a module, and one after it, also after an exception.

    Args:
        module: The module.
        before: Called with the module, positional and keyword arguments.
        after: Called with the module, the same and the output.

    Returns:
        What takes the hooks off again.
    """
    handles = [module.register_forward_pre_hook(_Hook(before), with_kwargs=True)]
    if after is not None:
        handles.append(module.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True))
    return [Handle(handle.remove) for handle in handles]


class _Checkpointing:
    """The function by which a denoiser runs its blocks under gradient checkpointing, in a context that runs again."""

    def __init__(self, below: Callable[..., Any], context: Callable[[], AbstractContextManager[None]]) -> None:
        self.below = below
        self.context = context

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = self.context

        def again(*args: Any, **kwargs: Any) -> Any:
            with context():
                return function(*args, **kwargs)

        return self.below(again, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return same, (self.below,)


def same(x: Any) -> Any:
    """Stands in a pickle for something of ours: what it is called with comes out in its place."""
    return x


def in_backward() -> bool:
    """Whether this thread runs a backward pass, as it does when gradient checkpointing runs a block again."""
    return torch._C._current_graph_task_id() != -1


def wrap_checkpointing(module: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Handle | None:
    """Let gradient checkpointing run the blocks of a forward, and run them again in the backward, inside a context.

    Why: the second time, no forward of the denoiser is running that could tell what the first one knew.

    Args:
        module: A denoiser of diffusers.
        context: Makes the context of the forward that begins.

    Returns:
        What undoes it; None where nothing had to be wrapped.
    """
    below = getattr(module, "_gradient_checkpointing_func", None)
    if below is None or not getattr(module, "gradient_checkpointing", False):
        return None
    if isinstance(below, _Checkpointing):
        below.context = context
        return None
    wrapped: Any = _Checkpointing(below, context)
    module._gradient_checkpointing_func = wrapped

    home = weakref.ref(module)

    def undo() -> None:
        module = home()
        if module is not None and getattr(module, "_gradient_checkpointing_func", None) is wrapped:
            module._gradient_checkpointing_func = below

    return Handle(undo)


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

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
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
