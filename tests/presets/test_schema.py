"""A preset: what every mistake is answered with, and that the object is plain, frozen and the whole of its key."""

import pickle

import pytest

from psa_diffusers.presets import PSAPreset, load_preset, load_section, preset_of_key


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
    preset_of_key.cache_clear()
    assert preset_of_key(preset.key) == preset
    assert preset_of_key(preset.key).key == preset.key
