"""Changes by step and by layer."""

import pytest

from psa_diffusers.presets import PSAPreset


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


@pytest.mark.parametrize("key", ["steps", "layers"])
@pytest.mark.parametrize(
    "given", ["dense", 3, 2.5, True, [0, 1], [["0", {}]], [("0", "a", "b")], {"0"}, b"0", [("0", 1)], ("0:5", "dense")]
)
def test_changes_that_are_no_mapping_are_told_so(key, given):
    with pytest.raises(ValueError, match=rf"{key} must be a mapping of ranges.*for example {key}:.*got "):
        PSAPreset(**{key: given})


@pytest.mark.parametrize("values", ["dense", "[1", "3", '"dense"', "[]", 3, None, True, [1], ["type"]])
def test_a_range_that_maps_to_no_mapping_is_told_so(values):
    for wrong in ({"steps": {"0:5": values}}, {"layers": {"1": values}}, {"steps": {"0": {"layers": {"1": values}}}}):
        with pytest.raises(ValueError, match=r"range '.*' must map to the keys that differ there.*got ") as caught:
            PSAPreset(**wrong)
        assert repr(values) in str(caught.value)


def test_a_preset_takes_its_own_changes_back():
    preset = PSAPreset(steps={"0:5": {"type": "dense"}}, layers={"-1": {"key_variance": True}})
    assert PSAPreset(steps=preset.steps, layers=[list(pair) for pair in preset.layers]) == preset
