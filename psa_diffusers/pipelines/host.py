"""Subclasses made for one pipeline object: the only way to reach every call of it that diffusers leaves open.

Python looks for `__call__` on the class, so an attribute of the object does not do. The subclass has the name of the
class, so that saving, `isinstance` and messages do not change.
"""

from __future__ import annotations

import sys
from typing import Any


class _Forwarding(type):
    """Class of these subclasses. Who put something into the class below before us takes it back through us.

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
