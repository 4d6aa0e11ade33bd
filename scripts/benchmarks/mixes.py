"""The choices of levels that are timed and drawn: what a query block reads at which factor."""

import math

from psa_diffusers import PSAPreset, load_preset

TERMS = {"key_variance": True, "value_tilt": True}
COVER = {1: [0, 0.06], 2: [0.06, 0.1], 4: [0.1, 0.2], 8: [0.2, 0.3], 16: [0.3, 0.4], 32: [0.4, 1]}
PUBLISHED = {1: [0, 0.1], 2: [0.1, 0.15], 8: [0.15, 0.35], 0: [0.35, 1]}
MIXES = {
    "cover": PSAPreset(mask_ratios=COVER, **TERMS),
    "top and mean": PSAPreset(mask_ratios={1: [0, 0.13], 128: [0.13, 1]}, **TERMS),
    "published": PSAPreset(mask_ratios=PUBLISHED, **TERMS),
    "published, plain": PSAPreset(mask_ratios=PUBLISHED),
    "cover, plain": PSAPreset(mask_ratios=COVER),
    "psa_cover": load_preset("default", "psa_cover"),
    "psa_fast": load_preset("default", "psa_fast"),
    "all": PSAPreset(mask_ratios={1: [0, 1]}),
}
CPU_MIXES = ("published, plain", "cover, plain", "psa_cover")
GPU_MIXES = ("cover", "top and mean", "published", "psa_cover", "psa_fast", "all")


def fitted(preset, shape, density):
    """The preset with all shares but the coarsest lowered alike, until the density with text is at most ``density``."""
    preset = preset.for_video(math.prod(shape.grid))

    def executed(levels):
        m, n = preset.block_m, preset.block_n
        video = math.prod(shape.grid)
        rows, columns = (-(-video // block) / (-(-video // block) + -(-shape.text_tokens // block)) for block in (m, n))
        number = -(-video // n)
        cost, reached = 0.0, 0
        for factor, end in levels:
            blocks = number if end >= 1 else round(end * number)
            cost += (blocks - reached) / factor if factor else 0
            reached = blocks
        return 1 - rows * columns * (1 - cost / number)

    def scaled(share):
        return tuple((factor, end * share if end < 1 else 1.0) for factor, end in preset.levels)

    if density is None or executed(preset.levels) <= density or len(preset.levels) == 1:
        return preset
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if executed(scaled(middle)) <= density else (low, middle)
    return preset.replace(mask_ratios=scaled(low))
