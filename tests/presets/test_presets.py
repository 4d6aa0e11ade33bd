"""Presets: the published values, what a file may say, and what every mistake is answered with."""

import logging
import pickle

import pytest

from psa_diffusers.presets import schema as preset_module
from psa_diffusers.presets.schema import (
    BlockSize,
    PSAPreset,
    SimThresholds,
    list_presets,
    load_preset,
    load_section,
    parse_mask_ratios,
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param({"warm_up_steps": 3}, "unknown key 'warm_up_steps'. Did you mean 'warmup_steps'", id="key"),
        pytest.param(
            {"block_size": {"tilen": 32}}, "block_size: unknown key 'tilen'. Did you mean 'tile_n'", id="part"
        ),
        pytest.param({"block_size": 64}, "block_size must be a mapping of m, n, tile_n, got 64", id="no-part"),
        pytest.param({"block_size.k": 32}, "block_size: unknown key 'k'.*Known keys: m, n, tile_n", id="dotted"),
        pytest.param({"sim_thresholds": {"x16": 0.5}}, "sim_thresholds: unknown key 'x16'", id="threshold-key"),
        pytest.param({"mask_mode": "top_k"}, "mask_mode must be one of thresholdbound, topk.*mean 'topk'", id="mode"),
        pytest.param({"type": "sparse"}, "type must be one of dense, psa", id="type"),
        pytest.param({"rearrange_method": "gilbert"}, "rearrange_method.*Did you mean 'Gilbert'", id="order"),
        pytest.param(
            {"importance": "mass"},
            "importance must be one of pooled_mass, pooled_moments, sampled_max",
            id="importance",
        ),
        pytest.param({"tilt_gain": "half"}, "tilt_gain must be one of full, sampled, got 'half'", id="gain"),
        pytest.param({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1", id="negative"),
        pytest.param({"warmup_steps": 1.5}, "warmup_steps.*Integer", id="fraction"),
        pytest.param({"warmup_steps": True}, "warmup_steps.*Integer", id="bool-as-int"),
        pytest.param({"dense_last_steps": -2}, "dense_last_steps must be", id="last-steps"),
        pytest.param({"refresh_every": 0}, "refresh_every must be an integer of at least 1", id="refresh"),
        pytest.param({"refresh_every": True}, "refresh_every.*Integer", id="refresh-bool"),
        pytest.param({"refresh_every": 1.5}, "refresh_every.*Integer", id="refresh-fraction"),
        pytest.param({"steps": {"0": {"refresh_every": 2}}}, "steps: .*refresh_every", id="refresh-in-steps"),
        pytest.param({"text_length": -1}, "text_length must be", id="text"),
        pytest.param({"use_rearrange": "maybe"}, "use_rearrange.*bool", id="bool"),
        pytest.param({"min_full_ratio": 1.5}, r"min_full_ratio.*\[0, 1\], got 1\.5", id="share"),
        pytest.param({"sim_thresholds.x4": 1.5}, r"sim_thresholds\.x4.*cosine", id="cosine"),
        pytest.param({"tile_size": [2, 8]}, "tile_size must be three positive integers", id="two-edges"),
        pytest.param({"tile_size": [2, 0, 8]}, "tile_size must be three positive integers", id="flat-tile"),
        pytest.param({"block_size.m": 48}, r"block_size\.m must be a power of two from 16 to 256, got 48", id="m-48"),
        pytest.param({"block_size.n": 512}, r"block_size\.n must be a power of two from 16 to 256", id="n-512"),
        pytest.param({"block_size.tile_n": 256}, r"block_size\.tile_n .* from 16 to 128", id="tile-256"),
        pytest.param(
            {"mask_ratios": {64: [0, 1]}, "block_size.n": 32}, r"factor 64.*block_size\.n=32", id="factor-above-block"
        ),
    ],
)
def test_a_mistake_in_an_override_names_the_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_preset("default", **overrides)
    with pytest.raises(ValueError, match=message):
        load_preset("default").replace(**overrides)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"use_rearrange": "false"}, "use_rearrange must be true or false", id="bool"),
        pytest.param({"warmup_steps": "3"}, "warmup_steps must be an integer", id="int"),
        pytest.param({"block_size": 128}, "block_size must be a mapping of m, n, tile_n", id="part"),
        pytest.param({"block_size": {"k": 1}}, "block_size: unknown key 'k'", id="part-key"),
        pytest.param({"tile_size": 8}, "tile_size must be three positive integers", id="tile"),
        pytest.param({"mask_ratios": "topk"}, "must map a factor", id="ratios"),
    ],
)
def test_a_preset_made_by_hand_is_checked_too(fields, message):
    with pytest.raises(ValueError, match=message):
        PSAPreset(**fields)


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


def test_factors_are_those_a_level_map_can_hold():
    assert PSAPreset(mask_ratios={8: [0, 0.5], 0: [0.5, 1]}).factors == (1, 8)
    assert PSAPreset(mask_ratios={1: [0, 0.5], 32: [0.5, 1]}).factors == (1, 32)
    capped = PSAPreset(mask_ratios={1: [0, 0.5], 32: [0.5, 1]}, use_sim_mask=True)
    assert capped.factors == (1, 2, 4, 8, 16, 32)
    assert load_preset("default", "baseline").factors == (1,)


@pytest.mark.parametrize(("section", "name"), [row[:2] for row in PUBLISHED])
def test_published_presets_use_the_estimator_of_the_paper(section, name):
    assert load_preset(section, name).importance == "sampled_max"


@pytest.mark.parametrize("section", ["default", "demo"])
def test_a_preset_that_names_no_estimator_uses_ours(section):
    assert PSAPreset().importance == load_preset(section, "psa_balanced").importance == "pooled_mass"


@pytest.mark.parametrize("method", ["Gilbert", "tiles", "boxes"])
def test_order_follows_the_rearrangement(method):
    assert PSAPreset(rearrange_method=method).order == method.lower()
    assert PSAPreset(rearrange_method=method, use_rearrange=False).order == "raster"


def test_preset_is_frozen_hashable_and_survives_pickling():
    preset = load_preset("Wan2.1_1.3b")
    assert pickle.loads(pickle.dumps(preset)) == preset
    assert {preset: 1}[load_preset("Wan2.1_1.3b")] == 1
    assert hash(load_section("Wan2.1_1.3b")) == hash(load_section("Wan2.1_1.3b"))
    with pytest.raises(AttributeError):
        preset.warmup_steps = 3
    assert preset.replace(name="other").name == "other"


def test_plain_values_make_the_same_preset_again():
    preset = load_preset("Wan2.1_1.3b", "psa_balanced")
    assert PSAPreset(**preset.to_dict()) == preset
    assert PSAPreset().replace(**preset.to_dict()) == preset
    assert preset.to_dict()["mask_ratios"] == {
        1: [0.0, 0.5],
        2: [0.5, 0.6],
        4: [0.6, 0.7],
        8: [0.7, 0.8],
        0: [0.8, 1.0],
    }


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(PSAPreset, id="defaults"),
        pytest.param(lambda: load_preset("Wan2.1_1.3b"), id="from-a-file"),
        pytest.param(
            lambda: PSAPreset(
                block_size={"m": 64, "n": 32},
                mask_ratios={1: [0, 0.1], 16: [0.1, 0.7], 0: [0.7, 1]},
                steps={"0:2": {"type": "dense"}, "10%:50%": {"sim_thresholds": {"x2": 0.1}}},
                layers={"-1": {"mask_ratios": {1: [0, 0.3], 0: [0.3, 1]}}},
                dense_layers="0,1",
                use_sim_mask=True,
                sim_thresholds={"x4": 0.5},
                tile_size=[1, 2, 3],
                text_length=5,
                min_full_ratio=1 / 3,
            ),
            id="everything-set",
        ),
        pytest.param(lambda: pickle.loads(pickle.dumps(load_preset("default"))), id="unpickled"),
        pytest.param(lambda: PSAPreset().replace(key_variance=True), id="changed"),
    ],
)
def test_the_key_of_a_preset_is_the_whole_of_it(make):
    preset = make()
    preset_module.preset_of_key.cache_clear()
    assert preset_module.preset_of_key(preset.key) == preset
    assert preset_module.preset_of_key(preset.key).key == preset.key


def test_attn_impl_is_ignored_with_one_warning(caplog):
    preset_module._warn_attn_impl.cache_clear()
    with caplog.at_level(logging.WARNING, logger="psa_diffusers"):
        for choice in ("old_mask_type", "new_mask_type"):
            assert load_preset("default", attn_impl=choice) == load_preset("default")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["attn_impl is ignored"]


def test_builtin_file_needs_no_warning(caplog):
    preset_module._warn_attn_impl.cache_clear()
    for section in list_presets():
        load_section(section)
    assert not caplog.records


def test_steps_may_say_something_of_some_layers():
    def full(share):
        return {"mask_ratios": {1: [0, share], 0: [share, 1]}}

    preset = PSAPreset(
        **full(0.5),
        layers={"0": full(0.4)},
        steps={
            "50%:": {**full(0.3), "layers": {"0,2": full(0.2), "3": {"block_size": {"n": 64}}}},
            "-1": {"dense_layers": "-1"},
        },
    )

    def at(step, layer):
        found = preset.at(step, 10, layer, 4)
        return "dense" if found.type == "dense" else (found.levels[0][1], found.block_n)

    assert [at(0, layer) for layer in range(4)] == [(0.4, 128), (0.5, 128), (0.5, 128), (0.5, 128)]
    assert [at(5, layer) for layer in range(4)] == [(0.2, 128), (0.3, 128), (0.2, 128), (0.3, 64)]
    assert at(9, 3) == "dense"
    assert at(9, 0) == (0.2, 128)
    again = PSAPreset(**{key: value for key, value in preset.to_dict().items() if key != "name"})
    assert again == preset.replace(name="custom")
    for wrong, message in (
        ({"0": {"layers": {"0": {"block_size": {"n": 48}}}}}, "power of two"),
        ({"0": {"layers": {"first": {}}}}, "no range"),
        ({"0": {"layers": {"0": {"layers": {}}}}}, "unknown key 'layers'"),
        ({"0": {"dense_layers": "x"}}, "no range"),
    ):
        with pytest.raises(ValueError, match=message):
            PSAPreset(steps=wrong)


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
