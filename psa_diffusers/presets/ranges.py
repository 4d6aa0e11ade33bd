"""Ranges of steps and layers as people write them: `0`, `-1`, `0:10`, `25%:`, or several with commas."""

from __future__ import annotations

import math
import re

_PLACE = re.compile(r"(-?\d+)(%?)$")


def check_ranges(text: object) -> str:
    """Return the text of a range, or raise a ValueError that shows the form."""
    text = str(text).replace(" ", "")
    for part in text.split(","):
        places = part.split(":")
        if len(places) > 2 or places == [""] or not all(_PLACE.match(place) or not place for place in places):
            raise ValueError(
                f"{text!r} is no range: write a place such as 0 or -1, a range such as 0:10, 25%: or 10%:50% "
                "(the end is not included), or several with commas"
            )
        for place in places:
            if place.endswith("%") and not 0 <= int(place[:-1]) <= 100:
                raise ValueError(f"{text!r} is no range: a share lies between 0% and 100%")
    return text


def in_ranges(text: str, place: int, count: int | None) -> bool:
    """Whether a place lies in the ranges.

    Args:
        text: What `check_ranges` returned.
        place: Index from 0.
        count: How many places there are; None if that is not known. Then shares and negative indices match nothing.
    """
    return any(_in_range(part, place, count) for part in text.split(","))


def _in_range(part: str, place: int, count: int | None) -> bool:
    start, colon, stop = part.partition(":")
    first = _resolve(start or "0", count)
    if not colon:
        return place == first
    last = _resolve(stop, count) if stop else math.inf
    return first is not None and last is not None and first <= place < last


def _resolve(place: str, count: int | None) -> int | None:
    number, is_share = int(place.removesuffix("%")), place.endswith("%")
    if count is None:
        return None if is_share or place.startswith("-") else number
    if is_share:
        return round(count * number / 100)
    return number + (count if place.startswith("-") else 0)
