"""Sections: the published values, what a file may say, and what every mistake in one is answered with."""

import pytest

from psa_diffusers.presets import (
    BlockSize,
    PSAPreset,
    SimThresholds,
    list_presets,
    load_preset,
    load_section,
    parse_overrides,
)

BALANCED = (0.10, 0.15, 0.15, 0.35)
FOUR_STEPS = (0.05, 0.15, 0.25, 0.50)


# section, preset, (m, n, tile_n), mode, where factors 1, 2, 4 and 8 end, cosine cap, order, warm-up
PUBLISHED = [
    ("CogVideo_2b", "psa_balanced", (128, 128, 32), "topk", BALANCED, False, "raster", 15),
    ("CogVideo_5b", "psa_balanced", (128, 128, 32), "topk", BALANCED, False, "raster", 15),
    ("CogVideo_5b", "psa_4steps", (128, 128, 32), "topk", FOUR_STEPS, False, "gilbert", 0),
    ("CogVideo_5b", "psa_4steps_released", (128, 128, 32), "topk", FOUR_STEPS, False, "raster", 0),
    ("CogVideo1.5_5b", "psa_balanced", (128, 32, 32), "topk", BALANCED, False, "gilbert", 15),
    ("Wan2.1_1.3b", "psa_balanced", (128, 128, 32), "thresholdbound", (0.5, 0.6, 0.7, 0.8), True, "gilbert", 15),
    ("Wan2.1_1.3b", "psa_topk", (128, 32, 32), "topk", (0.05, 0.10, 0.15, 0.25), False, "gilbert", 15),
    ("Wan2.1_1.3b", "psa_4steps", (128, 128, 32), "topk", (0.05, 0.10, 0.10, 0.30), False, "gilbert", 0),
    ("Wan2.1_14b", "psa_balanced", (128, 128, 32), "thresholdbound", (0.4, 0.5, 0.6, 0.8), False, "gilbert", 15),
    ("Wan2.2_5B", "psa_balanced", (128, 32, 32), "thresholdbound", (0.6, 0.7, 0.7, 0.8), False, "gilbert", 15),
    ("Wan2.2_A14B", "psa_balanced", (128, 32, 32), "thresholdbound", (0.5, 0.6, 0.6, 0.8), False, "gilbert", 12),
]


# section, divisors of width, height and frames, text tokens
MODELS = [
    ("CogVideo_2b", (16, 16, 4), 226),
    ("CogVideo_5b", (16, 16, 4), 226),
    ("CogVideo1.5_5b", (16, 16, 8), 226),
    ("Wan2.1_1.3b", (16, 16, 4), 0),
    ("Wan2.1_14b", (16, 16, 4), 0),
    ("Wan2.2_5B", (32, 32, 4), 0),
    ("Wan2.2_A14B", (16, 16, 4), 0),
]


MINE = """
CogVideo_5b:
  attention_configs:
    mine:
      type: psa
      description: "My own."
      use_rearrange: true
      block_size: {m: 128, n: 64, tile_n: 32}
      mask_ratios:
        1: [0.0, 0.5]
        2: [0.5, 0.7]
        4: [0.7, 0.9]
        0: [0.9, 1.0]
      mask_mode: thresholdbound
      warmup_steps: 10
    psa_balanced:
      warmup_steps: 3
      mask_ratios: {1: [0, 0.2], 0: [0.2, 1]}
MyModel:
  text_length: 77
  attention_configs:
    sparse:
      type: psa
      mask_ratios: {1: [0, 0.25], 16: [0.25, 1]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("section", "name", "sizes", "mode", "ends", "cap", "order", "warmup"),
    PUBLISHED,
    ids=[f"{row[0]}-{row[1]}" for row in PUBLISHED],
)
def test_file_holds_the_published_values(section, name, sizes, mode, ends, cap, order, warmup):
    preset = load_preset(section, name)
    starts = (0.0, *ends[:-1])
    filled = [(factor, end) for factor, start, end in zip((1, 2, 4, 8), starts, ends, strict=True) if end > start]
    assert preset.levels == (*filled, (0, 1.0))
    assert preset.block_size == BlockSize(*sizes)
    assert (preset.type, preset.mask_mode, preset.use_sim_mask) == ("psa", mode, cap)
    assert (preset.order, preset.warmup_steps) == (order, warmup)
    assert preset.importance == "sampled_max"
    assert (preset.min_full_ratio, preset.key_variance, preset.value_tilt) == (0.06, False, False)


def test_cosine_thresholds_are_the_published_ones():
    assert load_preset("Wan2.1_1.3b").sim_thresholds == SimThresholds(0.7, 0.65, 0.6)
    assert load_preset("Wan2.1_1.3b", "psa_topk").sim_thresholds == SimThresholds(0.7, 0.65, 0.65)


@pytest.mark.parametrize(("section", "divisors", "text"), MODELS, ids=[row[0] for row in MODELS])
def test_section_describes_its_model(section, divisors, text):
    values = load_section(section)
    scale = values.video_scale
    assert (scale.width_divisor, scale.height_divisor, scale.depth_divisor) == divisors
    assert values.text_length == text
    assert values.default_attention == "psa_cover"
    assert list(values.presets) == list_presets(section)


@pytest.mark.parametrize("section", list_presets())
def test_every_preset_loads_and_baseline_is_dense(section):
    names = list_presets(section)
    assert load_preset(section, "baseline").type == "dense"
    for name in names:
        preset = load_preset(section, name)
        assert (preset.name, preset.model) == (name, section)
        assert preset.description
    assert load_preset(section) == load_preset(section, load_section(section).default_attention)


def test_default_and_demo_presets_fit_any_model():
    shared = load_preset("default", "psa_balanced")
    assert shared.levels == ((1, 0.1), (2, 0.15), (8, 0.35), (0, 1.0))
    assert (shared.block_m, shared.block_n, shared.order, shared.warmup_steps) == (128, 128, "gilbert", 0)
    demo = load_preset("demo", "psa_balanced")
    assert (demo.block_m, demo.block_n, demo.order, demo.warmup_steps) == (128, 64, "gilbert", 3)
    assert PSAPreset().levels == shared.levels


def test_section_name_ignores_case():
    assert load_preset("cogvideo_5B") == load_preset("CogVideo_5b")


def test_unknown_section_and_preset_list_what_exists():
    with pytest.raises(ValueError, match=r"unknown model section 'CogVideoX_5b'.*mean 'CogVideo_5b'.*Wan2.2_A14B"):
        load_preset("CogVideoX_5b")
    with pytest.raises(ValueError, match=r"no preset 'psa_4step'. Did you mean 'psa_4steps'.*baseline, psa_4steps"):
        load_preset("CogVideo_5b", "psa_4step")
    with pytest.raises(ValueError, match=r"'psa_4steps'. It exists in demo, CogVideo_5b, Wan2.1_1.3b"):
        load_preset("default", "psa_4steps")


def test_overrides_merge_into_mappings_and_replace_ratios():
    preset = load_preset("CogVideo_5b", block_size={"m": 64}, warmup_steps=0, mask_ratios={1: [0, 0.1], 0: [0.1, 1]})
    assert preset.block_size == BlockSize(64, 128, 32)
    assert preset.levels == ((1, 0.1), (0, 1.0))
    assert preset == load_preset("CogVideo_5b").replace(
        block_size=BlockSize(64, 128, 32), warmup_steps=0, mask_ratios=((1, 0.1), (0, 1.0))
    )
    assert load_preset("CogVideo_5b", **{"sim_thresholds.x2": 0.5}).sim_thresholds == SimThresholds(0.5, 0.65, 0.6)


def test_command_line_overrides_reach_the_preset():
    overrides = parse_overrides(["block_size.m=64", "mask_ratios={1: [0, .1], 0: [.1, 1]}", "use_rearrange=false"])
    preset = load_preset("default", **overrides)
    assert (preset.block_m, preset.levels, preset.order) == (64, ((1, 0.1), (0, 1.0)), "raster")
    assert load_preset("default", **parse_overrides(["mask_ratios.0=[.5,1]", "mask_ratios.1=[0,.5]"])).factors == (1,)
    assert parse_overrides([]) == {}
    with pytest.raises(ValueError, match="key=value, got 'warmup_steps'"):
        parse_overrides(["warmup_steps"])


def test_loading_never_changes_what_is_loaded_next():
    before = load_preset("CogVideo_5b")
    load_preset("CogVideo_5b", block_size={"m": 64}, sim_thresholds={"x2": 0.1})
    load_section("CogVideo_5b").presets.clear()
    assert load_preset("CogVideo_5b") == before
    assert load_section("CogVideo_5b").presets


def test_users_file_is_laid_over_the_builtin_one(write):
    path = write(MINE)
    mine = load_preset("CogVideo_5b", "mine", config=path)
    assert (mine.block_size, mine.mask_mode, mine.warmup_steps) == (BlockSize(128, 64, 32), "thresholdbound", 10)
    assert mine.levels == ((1, 0.5), (2, 0.7), (4, 0.9), (0, 1.0))

    changed = load_preset("CogVideo_5b", "psa_balanced", config=str(path))
    assert (changed.warmup_steps, changed.levels) == (3, ((1, 0.2), (0, 1.0)))
    assert changed.block_n == 128
    assert load_preset("CogVideo_5b", "psa_4steps", config=path) == load_preset("CogVideo_5b", "psa_4steps")

    assert load_preset("mymodel", config=path).levels == ((1, 0.25), (16, 1.0))
    assert list_presets("MyModel", config=path) == ["baseline", "sparse"]
    section = load_section("MyModel", path)
    assert (section.default_attention, section.text_length) == ("sparse", 77)
    with pytest.raises(ValueError, match="unknown model section 'MyModel'"):
        load_preset("MyModel")


def test_a_changed_file_is_read_again(write, tmp_path):
    path = write("mine: {attention_configs: {a: {warmup_steps: 1}}}")
    assert load_preset("mine", config=path).warmup_steps == 1
    other = tmp_path / "other.yaml"
    other.write_text("mine: {attention_configs: {a: {warmup_steps: 22}}}", encoding="utf-8")
    other.replace(path)
    assert load_preset("mine", config=path).warmup_steps == 22


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("A: {default_atention: x}", "section 'A': unknown key 'default_atention'.*mean", id="section-key"),
        pytest.param(
            "A: {video_scale: {widht_divisor: 8}}", "video_scale: unknown key 'widht_divisor'", id="scale-key"
        ),
        pytest.param(
            "A: {attention_configs: {p: {mask_ratio: 1}}}", "preset 'p': unknown key 'mask_ratio'", id="preset"
        ),
        pytest.param("A: {attention_configs: {p: {name: q}}}", "unknown key 'name'", id="name-is-the-place"),
        pytest.param("A: {attention_configs: {p: 3}}", "preset 'p' must be a mapping", id="preset-number"),
        pytest.param("A: {attention_configs: [p]}", "attention_configs must be a mapping", id="preset-list"),
        pytest.param("A: 3", "section 'A' must be a name with a mapping", id="section-number"),
        pytest.param("- A", "must hold a mapping", id="list"),
        pytest.param("A: {default_attention: p}", "default_attention is 'p'.*Available: baseline", id="default"),
        pytest.param("A: {text_length: many}", "text_length.*Integer", id="type"),
        pytest.param("A: [", "is not valid YAML", id="syntax"),
        pytest.param("A: {}\na: {}", "differ only in upper and lower case: A, a", id="case"),
    ],
)
def test_a_mistake_in_a_file_names_the_place(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_section("A", write(text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config file at .*nowhere\.yaml"):
        load_preset("default", config=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(("section", "name"), [row[:2] for row in PUBLISHED])
def test_published_presets_use_the_estimator_of_the_paper(section, name):
    assert load_preset(section, name).importance == "sampled_max"


@pytest.mark.parametrize("section", ["default", "demo"])
def test_a_preset_that_names_no_estimator_uses_ours(section):
    assert PSAPreset().importance == load_preset(section, "psa_balanced").importance == "pooled_mass"
