"""Mask ratios: intervals in the order of importance, and what every mistake is answered with."""

import pytest

from psa_diffusers.presets import PSAPreset, load_preset, parse_mask_ratios


def test_order_of_the_ratio_keys_means_nothing_and_a_missing_factor_is_empty():
    expected = ((1, 0.1), (8, 0.35), (0, 1.0))
    assert parse_mask_ratios({1: [0, 0.1], 8: [0.1, 0.35], 0: [0.35, 1]}) == expected
    assert parse_mask_ratios({0: [0.35, 1], 8: [0.1, 0.35], 4: [0.1, 0.1], 1: [0, 0.1]}) == expected
    assert parse_mask_ratios({"8": (0.1, 0.35), "0": (0.35, 1), "1": (0, 0.1)}) == expected
    assert parse_mask_ratios(expected) == expected


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        pytest.param({1: [0, 0.5], 3: [0.5, 1]}, r"unknown factor 3\..*Available: 0, 1, 2, 4, 8, 16", id="factor-3"),
        pytest.param({1: [0, 0.5], 256: [0.5, 1]}, "unknown factor 256", id="factor-256"),
        pytest.param({True: [0, 1]}, "unknown factor True", id="factor-true"),
        pytest.param({1: [0.1, 1]}, r"must start at 0.*gap before factor 1", id="starts-late"),
        pytest.param({1: [0, 0.5]}, r"must end at 1.*end at 0\.5; add 0: \[0\.5, 1\.0\]", id="ends-early"),
        pytest.param({1: [0, 0.5], 2: [0.6, 1]}, "gap before factor 2", id="gap"),
        pytest.param({1: [0, 0.5], 2: [0.4, 1]}, "overlap at factor 2", id="overlap"),
        pytest.param({2: [0, 0.5], 1: [0.5, 1]}, "coarser as importance falls", id="finer-later"),
        pytest.param({0: [0, 0.5], 1: [0.5, 1]}, "coarser as importance falls", id="skip-first"),
        pytest.param({1: [0.5, 0]}, "0 <= start <= end <= 1", id="backwards"),
        pytest.param({1: [0, 1.5]}, "0 <= start <= end <= 1", id="above-one"),
        pytest.param({1: 1.0}, r"needs \[start, end\]", id="no-pair"),
        pytest.param({1: [0, float("nan")]}, r"needs \[start, end\]", id="nan"),
        pytest.param({}, "must end at 1", id="empty"),
        pytest.param(0.5, r"must map a factor to \[start, end\]", id="number"),
        pytest.param([(1, 0.5), (1, 1.0)], "names a factor twice", id="twice"),
    ],
)
def test_ratios_that_do_not_cover_the_blocks_are_refused(ratios, message):
    with pytest.raises(ValueError, match=message):
        parse_mask_ratios(ratios)
    with pytest.raises(ValueError, match=message):
        load_preset("default", mask_ratios=ratios)


def test_factors_are_those_a_level_map_can_hold():
    assert PSAPreset(mask_ratios={8: [0, 0.5], 0: [0.5, 1]}).factors == (1, 8)
    assert PSAPreset(mask_ratios={1: [0, 0.5], 32: [0.5, 1]}).factors == (1, 32)
    capped = PSAPreset(mask_ratios={1: [0, 0.5], 32: [0.5, 1]}, use_sim_mask=True)
    assert capped.factors == (1, 2, 4, 8, 16, 32)
    assert load_preset("default", "baseline").factors == (1,)
