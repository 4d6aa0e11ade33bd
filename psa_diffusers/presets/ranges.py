"""Ranges of steps and layers as people write them: `0`, `-1`, `0:10`, `25%:`, or several with commas."""

from __future__ import annotations

import math
import re

# no number of steps or layers has seven digits
_PLACE = re.compile(r"(?!-0+%?$)-?[0-9]{1,6}%?")

_FORM = (
    "write a place such as 0 or -1, a range such as 0:10, 25%: or 10%:50% (the end is not included), "
    "or several with commas"
)


def check_ranges(text: object) -> str:
    """Return the text of a range, or raise a ValueError that shows the form."""
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(f"{text!r} is no range: {_FORM}")
    text = str(text).replace(" ", "")
    for part in text.split(","):
        places = part.split(":")
        if len(places) > 2 or places == [""] or not all(_PLACE.fullmatch(place) or not place for place in places):
            raise ValueError(f"{text!r} is no range: {_FORM}")
        for place in places:
            if place.endswith("%") and not 0 <= int(place[:-1]) <= 100:
                raise ValueError(f"{text!r} is no range: a share lies between 0% and 100%")
        if places[0].rstrip("%").lstrip("0") == "100" and places[0].endswith("%"):
            raise ValueError(f"{text!r} is no range: nothing is at 100% or after it, the last place is -1")
        if len(places) == 2 and _is_empty(places[0] or "0", places[1]):
            raise ValueError(
                f"{text!r} is no range: {part!r} ends before it starts, or where it starts, and the end is not "
                "included: write the smaller place first"
            )
    return text


def _is_empty(start: str, stop: str) -> bool:
    """Whether a range holds no place, however many there are. A place and a share compare only with their like."""
    kinds = {(place.endswith("%"), place.startswith("-")) for place in (start, stop)}
    if not stop:
        return False
    first, last = (int(place.removesuffix("%")) for place in (start, stop))
    return last == 0 or (len(kinds) == 1 and first >= last)


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
