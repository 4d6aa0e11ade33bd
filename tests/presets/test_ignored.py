"""Keys of the original project that decide nothing here: readable everywhere, named once, and no part of a preset."""

import logging

import pytest

from psa_diffusers.presets import (
    BlockSize,
    PSAPreset,
    list_presets,
    load_preset,
    load_section,
    parse_overrides,
    preset_of_key,
)
from psa_diffusers.presets.ignored import IGNORED, _say_once

GIVEN = {"verbose": True, "text_length": 226, "attn_impl": "new_mask_type", "block_size.tile_n": 16}
# verbose and the tile say something by any value, false and the published 32 as well
WRONG = {"verbose": ["maybe", 1], "text_length": [-1, 1.5, True], "attn_impl": [3], "block_size.tile_n": [256, 48, "a"]}

ORIGINAL = """
mine:
  text_length: 226
  attention_configs:
    theirs:
      type: psa
      text_length: 226
      verbose: false
      attn_impl: new_mask_type
      block_size: {m: 64, n: 64, tile_n: 32}
"""


@pytest.fixture(autouse=True)
def said(caplog):
    """Give a function that returns which keys the log has named so far; nothing has been named at the start."""
    caplog.set_level(logging.INFO, logger="psa_diffusers")
    _say_once.cache_clear()
    return lambda: [record.getMessage().split(" is ignored: ")[0] for record in caplog.records]


def nested(key, value):
    return parse_overrides([f"{key}={value}"])


def test_there_are_four():
    assert set(IGNORED) == set(GIVEN) == set(WRONG)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda key, value: PSAPreset(**nested(key, value)), id="made-by-hand"),
        pytest.param(lambda key, value: PSAPreset().replace(**{key: value}), id="replaced"),
        pytest.param(lambda key, value: load_preset("default", **{key: value}).replace(), id="override"),
        pytest.param(lambda key, value: load_preset("default", **nested(key, value)), id="command-line"),
        pytest.param(lambda key, value: PSAPreset(steps={"0": nested(key, value)}), id="in-steps"),
        pytest.param(lambda key, value: PSAPreset(layers={"0": nested(key, value)}), id="in-layers"),
        pytest.param(
            lambda key, value: PSAPreset(steps={"0": {"layers": {"0": nested(key, value)}}}), id="in-layers-of-steps"
        ),
    ],
)
@pytest.mark.parametrize(("key", "value"), GIVEN.items())
def test_a_key_is_said_once_and_leaves_the_preset(key, value, make, said):
    preset = make(key, value)
    assert said() == [key]
    same = load_preset("default") if preset.model else PSAPreset()
    assert preset == same
    assert hash(preset) == hash(same)
    assert preset.key == same.key
    assert preset_of_key(preset.key) == preset
    assert preset.to_dict() == same.to_dict()
    assert key.rpartition(".")[2] not in {*preset.to_dict(), *preset.to_dict()["block_size"]}
    make(key, value)
    assert said() == [key]


@pytest.mark.parametrize("section", ["steps", "layers"])
def test_what_stands_beside_an_ignored_key_stays(section):
    here = {"verbose": True, "block_size": {"m": 64, "tile_n": 16}}
    preset = PSAPreset(**{section: {"0": here}})
    assert preset == PSAPreset(**{section: {"0": {"block_size": {"m": 64}}}})
    assert preset.at(0, 4, 0, 4).block_m == 64


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_an_error_that_names_the_key(key, value, said):
    head, _, rest = key.partition(".")
    for make in (PSAPreset, lambda **values: load_preset("default", **values), PSAPreset().replace):
        with pytest.raises(ValueError, match=rf"{key} must be .*, got {value!r}"):
            make(**{head: {rest: value} if rest else value})
    with pytest.raises(ValueError, match=rf"steps: {key} must be"):
        PSAPreset(steps={"0": {head: {rest: value} if rest else value}})
    assert not said()


def test_null_says_nothing(said):
    assert PSAPreset(text_length=None, verbose=None, attn_impl=None, block_size={"tile_n": None}) == PSAPreset()
    assert not said()


def test_a_third_size_of_a_block_is_the_tile():
    assert BlockSize(64, 32, 16) == BlockSize(64, 32)
    with pytest.raises(ValueError, match=r"block_size\.tile_n must be a power of two from 16 to 128, got 48"):
        BlockSize(64, 32, 48)


def test_a_file_of_the_original_project_is_read(tmp_path, said):
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL, encoding="utf-8")
    preset = load_preset("mine", config=path)
    assert sorted(said()) == sorted(IGNORED)
    assert preset == PSAPreset(name="theirs", model="mine", block_size={"m": 64, "n": 64})
    assert load_section("mine", path).text_length == 226, "of a section it is information about the model"


def test_our_own_file_says_nothing_that_is_ignored(said):
    for section in list_presets():
        load_section(section)
    assert not said()
