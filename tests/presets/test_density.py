"""Densities: what our presets may cost in every section, and that a small video keeps it."""

import pytest

from psa_diffusers.presets import PSAPreset, list_presets, load_preset

OWN = ("psa_cover", "psa_fast", "psa_quality")


@pytest.mark.parametrize("section", list_presets())
def test_every_section_has_our_presets_within_their_budgets(section):
    cover, fast, quality = (load_preset(section, name) for name in OWN)
    published = load_preset(section, "psa_balanced") if "psa_balanced" in list_presets(section) else cover
    assert density(cover) <= 0.15
    assert density(fast) <= density(cover) / 2
    assert density(quality) <= 0.2
    if published.mask_mode == "topk" and published is not cover:  # a threshold's density depends on the head
        assert density(cover) <= density(published)
        assert density(fast) <= density(published) / 2
    for preset in (cover, fast, quality):
        assert min(factor for factor, _ in preset.levels) > 0, "nothing is skipped"
        assert preset.warmup_steps == published.warmup_steps
        assert preset.replace(warmup_steps=0, model="default") == load_preset("default", preset.name)


COVERING = {1: [0, 0.1], 4: [0.1, 0.22], 16: [0.22, 0.38], 128: [0.38, 1]}


def density(preset):
    starts = (0.0, *(end for _, end in preset.levels))
    return sum((end - start) / factor for (factor, end), start in zip(preset.levels, starts, strict=False) if factor)


@pytest.mark.parametrize(("tokens", "n"), [(17550, 128), (128 * 99 + 1, 128), (128 * 99, 64), (3059, 32), (40, 32)])
def test_a_small_video_gets_smaller_blocks_at_the_same_density(tokens, n):
    preset = PSAPreset(block_size={"m": 128, "n": 128}, mask_ratios=COVERING, min_blocks=100)
    fitted = preset.for_video(tokens)
    assert (fitted.block_m, fitted.block_n) == (n, n)
    assert max(fitted.factors) == n
    assert density(fitted) == pytest.approx(density(preset))
    assert [factor for factor, _ in fitted.levels] == [1, 4, 16, n]
    assert PSAPreset(mask_ratios=COVERING).for_video(tokens).block_n == 128, "off unless asked for"


def test_smaller_blocks_keep_what_is_skipped_and_what_a_threshold_says():
    skipping = {1: [0, 0.1], 128: [0.1, 0.5], 0: [0.5, 1]}
    fitted = PSAPreset(mask_ratios=skipping, min_blocks=1000).for_video(1000)
    assert fitted.levels[-1] == (0, 1.0)
    assert fitted.levels[-2] == (32, pytest.approx(0.5))
    assert density(fitted) == pytest.approx(0.1 + 0.4 / 128)
    bound = PSAPreset(mask_ratios=skipping, mask_mode="thresholdbound", min_blocks=1000).for_video(1000)
    assert bound.levels == ((1, 0.1), (32, 0.5), (0, 1.0))
    coarse = PSAPreset(mask_ratios={64: [0, 0.5], 128: [0.5, 1]}, min_blocks=1000).for_video(1000)
    assert coarse.levels == ((32, 1.0),)
