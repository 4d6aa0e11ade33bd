"""Settings that differ in some denoising steps or layers: `steps` and `layers` of a preset, as hashable values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from psa_diffusers.presets.ignored import drop_ignored
from psa_diffusers.presets.ranges import check_ranges
from psa_diffusers.presets.values import Keys, is_list

# keys of a whole run: they cannot differ between steps or layers
_ONCE = frozenset({"steps", "layers", "dense_layers", "warmup_steps", "dense_last_steps", "refresh_every"})
_IN_STEPS = frozenset({"layers", "dense_layers"})


@dataclass(frozen=True)
class LayerChanges:
    """Changed keys as JSON, and the layers they are for."""

    layers: str
    values: str


def parse_changes(key: str, given: Any, keys: Keys) -> tuple[tuple[str, str], ...]:
    """Check the changes by range and bring them into a hashable form.

    Args:
        key: `steps` or `layers`.
        given: Range to changed keys; a result of this function; or None.
        keys: Keys of a preset.

    Returns:
        Pairs of range and changed keys as JSON, in the order of the file. A range that changes nothing has no pair.

    Raises:
        ValueError: If this is no mapping of ranges to mappings, or a range or a key does not exist. Values are left to
            the preset that they make.
    """
    if given is None:
        return ()
    allowed = keys.without(*(_ONCE - _IN_STEPS if key == "steps" else _ONCE))
    stored = []
    for where, shown in _pairs(key, given):
        values = _from_json(shown)
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{key}: range {where!r} must map to the keys that differ there, for example {{type: dense}}, "
                f"got {shown!r}"
            )
        try:
            allowed.check(values, f"range {where!r}")
            values = drop_ignored(values)
            if values.get("dense_layers") is not None:
                check_ranges(values["dense_layers"])
            within = parse_changes("layers", values.pop("layers", None), keys)
            if within:
                values["layers"] = {layers: json.loads(changes) for layers, changes in within}
            where = check_ranges(where)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        if values:
            stored.append((where, json.dumps(values)))
    return tuple(stored)


def _pairs(key: str, given: Any) -> Iterable[tuple[Any, Any]]:
    """The ranges and what they map to; a result of `parse_changes` may have been through JSON since."""
    if isinstance(given, Mapping):
        return given.items()
    if is_list(given) and all(is_list(pair) and [type(part) for part in pair] == [str, str] for pair in given):
        return [(where, values) for where, values in given]
    raise ValueError(
        f"{key} must be a mapping of ranges to the keys that differ there, for example "
        f"{key}: {{'0:5': {{type: dense}}}}, got {given!r}"
    )


def _from_json(values: Any) -> Any:
    """What a text says, and the text itself if it is no JSON."""
    if not isinstance(values, str):
        return values
    try:
        return json.loads(values)
    except (ValueError, RecursionError):
        return values


@lru_cache(maxsize=4096)
def split(values: str) -> tuple[LayerChanges, ...]:
    """Split the changes of a range of steps by the layers they are for: all layers first, then some, then the dense."""
    plain = json.loads(values)
    within, dense = plain.pop("layers", None) or {}, plain.pop("dense_layers", None)
    parts = [LayerChanges(":", json.dumps(plain))] if plain else []
    parts += [LayerChanges(layers, json.dumps(changes)) for layers, changes in within.items()]
    if dense is not None:
        parts.append(LayerChanges(check_ranges(dense), '{"type": "dense"}'))
    return tuple(parts)
