"""A file a family, under the name that it has in `psa_diffusers/models`: builders of small pipelines, and its rows.

A family's file may define three dictionaries of `Case` by name:

- `BASIC`: all the tests run on these that are not about families (CogVideoX and Wan).
- `MORE`: tests/models/test_families.py runs its battery on these too, at least one of every family.
- `OTHER`: the other pipelines of the family, whose denoisers the battery knows already.

Nothing else has to be told of a new file. Classes that an older diffusers lacks are looked up when a row is built.
"""

from __future__ import annotations

import importlib
import pkgutil

import diffusers
from packaging.version import Version

from .case import Case

_FILES = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]


def _rows(kind: str) -> dict[str, Case]:
    rows: dict[str, Case] = {}
    for file in _FILES:
        own = vars(file).get(kind, {})
        if taken := rows.keys() & own.keys():
            raise ValueError(f"{file.__name__}: another file has rows of these names: {', '.join(sorted(taken))}")
        rows |= own
    return rows


def _available(cases: dict[str, Case]) -> dict[str, Case]:
    version = Version(diffusers.__version__)
    return {
        name: case
        for name, case in cases.items()
        if hasattr(diffusers, case.pipeline) and version >= Version(case.since)
    }


_BATTERY = _rows("BASIC") | _rows("MORE")

CASES = _available(_rows("BASIC"))
"""CogVideoX and Wan, on which all the tests run that are not about families."""
ALL_CASES = _available(_BATTERY)
"""At least one of every family that this version of diffusers has: tests/models/test_families.py runs on all."""
OTHER_CASES = _available(_rows("OTHER"))
"""The other pipelines of these families, whose denoisers the battery knows already."""
MISSING = {name: case for name, case in _BATTERY.items() if name not in ALL_CASES}
"""What this version of diffusers does not have."""
