"""Classes of diffusers by name, and the scheduler that an entry asks for: nothing is dropped without a word."""

from __future__ import annotations

import inspect
from typing import Any

from psa_diffusers.presets.model_entries import SchedulerChoice
from psa_diffusers.presets.values import suggest

__all__ = ["diffusers_class", "scheduler_class", "shifted"]


def diffusers_class(name: str, ending: str, base: type) -> Any:
    """Return a class of diffusers.

    Args:
        name: Of the class.
        ending: With which the names of such classes end, for suggestions.
        base: Class that it must inherit from.

    Raises:
        ValueError: If diffusers has no such class, or it is something else.
        ImportError: If the class needs a package that is not installed.
    """
    import diffusers

    what = ending.lower()
    names = [known for known in dir(diffusers) if known.endswith(ending)]
    kind: Any = getattr(diffusers, name, None) if name in dir(diffusers) else None
    if hasattr(kind, "_backends"):  # what diffusers puts in the place of a class that cannot be imported
        kind.from_config()
    if not (isinstance(kind, type) and issubclass(kind, base) and hasattr(kind, "from_config")):  # no bare base
        why = "is not in this diffusers" if kind is None else f"is no {what}"
        raise ValueError(
            f"{what} {name!r} {why} ({diffusers.__version__}): expected the name of a {what} class."
            f"{suggest(name, [known for known in names if known != name])}"
        )
    return kind


def scheduler_class(choice: SchedulerChoice) -> Any:
    """Return the class of the scheduler that an entry asks for.

    Raises:
        ValueError: If diffusers has no such scheduler, or it would not read a setting.
        ImportError: If the class needs a package that is not installed.
    """
    from diffusers import SchedulerMixin

    kind = diffusers_class(choice.class_name, "Scheduler", SchedulerMixin)
    known = _settings(kind)
    for key in choice.kwargs:
        if key not in known:
            raise ValueError(
                f"scheduler.kwargs: {kind.__name__} has no argument {key!r}.{suggest(key, known)} Known arguments: "
                f"{', '.join(known)}"
            )
    return kind


def shifted(scheduler: Any, flow_shift: float) -> Any:
    """Return a scheduler with another shift of its flow-matching schedule.

    Raises:
        ValueError: If the scheduler would not read the shift.
    """
    kind = type(scheduler)
    key = next((key for key in ("flow_shift", "shift") if key in _settings(kind)), None)
    if key is None:
        raise ValueError(
            f"flow_shift: {kind.__name__} does not shift its schedule. Leave flow_shift out, or choose a scheduler of "
            "flow matching"
        )
    if scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            f"flow_shift: {kind.__name__} computes its shift from the size of the video (use_dynamic_shifting). Leave "
            "flow_shift out, or set use_dynamic_shifting: false in scheduler.kwargs"
        )
    return kind.from_config(scheduler.config, **{key: flow_shift})


def _settings(kind: type) -> list[str]:
    """Names of the arguments that a class takes."""
    parameters = list(inspect.signature(kind).parameters.values())
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
