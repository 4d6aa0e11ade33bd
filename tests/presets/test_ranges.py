"""Ranges of steps and layers: what they mean, and which never match."""

import pytest

from psa_diffusers import PSAPreset
from psa_diffusers.presets import check_ranges, in_ranges


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("0", [0]),
        ("-1", [9]),
        ("03:5", [3, 4]),
        (":2,-2:", [0, 1, 8, 9]),
        ("25%:50%", [2, 3, 4]),
        ("0%:-8", [0, 1]),
        ("-9:2", [1]),
        (":", list(range(10))),
    ],
)
def test_a_range_matches(text, places):
    text = check_ranges(text)
    assert [place for place in range(10) if in_ranges(text, place, 10)] == places


@pytest.mark.parametrize("text", ["5:2", "7:7", "0:0", ":0", "-1:-3", "-2:-2", "60%:10%", "50%:50%", "0,9:4", ":0%"])
def test_a_range_that_never_matches_is_refused(text):
    with pytest.raises(ValueError, match="ends before it starts"):
        check_ranges(text)
    for key in ("steps", "layers"):
        with pytest.raises(ValueError, match=f"{key}: '{text}' is no range"):
            PSAPreset(**{key: {text: {"type": "dense"}}})
    with pytest.raises(ValueError, match="is no range"):
        PSAPreset(dense_layers=text)


@pytest.mark.parametrize(
    "text",
    ["", "a", "1:2:3", "1.5", "-0", "-0:", "-5%", "101%", "100%", "100%:", "5\n", "9" * 5000, 1.0, True, [0, 1], None],
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="no range"):
        check_ranges(text)
