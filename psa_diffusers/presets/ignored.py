"""Keys of the original project that may stand in a preset and decide nothing here.

A file written for the original project stays readable. Each key is checked, named once in the log, and dropped. No
preset holds one, so two presets that differ in nothing else are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from psa_diffusers.presets.values import is_int

logger = logging.getLogger("psa_diffusers")


class _Ignored(NamedTuple):
    fits: Callable[[Any], bool]
    form: str
    reason: str


IGNORED: Mapping[str, _Ignored] = {
    "text_length": _Ignored(
        lambda value: is_int(value) and value >= 0,
        "null or an integer of at least 0",
        "text tokens are counted in what runs",
    ),
    "verbose": _Ignored(
        lambda value: isinstance(value, bool),
        "true or false",
        "the level of the logger 'psa_diffusers' says what is logged",
    ),
    "attn_impl": _Ignored(lambda value: isinstance(value, str), "null or a name", "psa_diffusers has one kernel"),
    "block_size.tile_n": _Ignored(
        lambda value: is_int(value) and 16 <= value <= 128 and not value & (value - 1),
        "a power of two from 16 to 128",
        "the kernels choose their tiles themselves",
    ),
}
"""The keys, the ones inside another with a dot."""

_HOLDERS = frozenset(key.partition(".")[0] for key in IGNORED if "." in key)


def ignore(key: str, value: Any) -> None:
    """Check the value of an ignored key, and say once a process that the key is ignored. None says nothing.

    Raises:
        ValueError: If the value has not the form that the key has in the original project.
    """
    if value is None:
        return
    if not IGNORED[key].fits(value):
        raise ValueError(f"{key} must be {IGNORED[key].form}, got {value!r}")
    _say_once(key)


def drop_ignored(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Return the values of a preset without the ignored keys; a mapping that held nothing else goes as well.

    Args:
        values: Key to value, by the names of the YAML.
        within: Path of the mapping, with a dot at the end.

    Raises:
        ValueError: As `ignore`.
    """
    kept: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{within}{key}"
        if path in IGNORED:
            ignore(path, value)
        elif path in _HOLDERS and value and isinstance(value, Mapping):
            rest = drop_ignored(value, f"{path}.")
            if rest:
                kept[key] = rest
        else:
            kept[key] = value
    return kept


@lru_cache(maxsize=len(IGNORED))
def _say_once(key: str) -> None:
    """Warn in the first call with a key: the cache remembers that it was said."""
    logger.warning("%s is ignored: %s; remove the key from your preset", key, IGNORED[key].reason)
