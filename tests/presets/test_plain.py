"""Values of a text stand for themselves: no variable is looked up, nothing grows, and a range is a range."""

import time

import pytest
from omegaconf import OmegaConf

from psa_diffusers import PSAPreset, load_preset
from psa_diffusers.presets import load_model_entry, load_section, parse_overrides
from psa_diffusers.presets.plain import quote_ranges, read_yaml, refuse_interpolation

SECRET = "a-token"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("A_TOKEN", SECRET)

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


INTERPOLATIONS = ["${oc.env:A_TOKEN}", "a ${oc.env:A_TOKEN} b", "${oc.decode:1}", "${..name}", r"\${x}"]


@pytest.mark.parametrize("text", INTERPOLATIONS)
@pytest.mark.parametrize(
    "key", ["description", "mask_mode", "steps: {0: {description", "steps: {0: {layers: {0: {type"]
)
def test_a_preset_file_reads_no_variable(key, text, write):
    braces = "}" * key.count("{")
    path = write(f"default: {{attention_configs: {{p: {{{key}: '{text}'{braces}}}}}}}\n")
    for load in (lambda: load_preset("default", "p", config=path), lambda: load_section("default", path)):
        with pytest.raises(ValueError, match=r"mine\.yaml: default\.attention_configs\.p\..*itself.*got") as caught:
            load()
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["example_prompt", "negative_prompt", "source", "scheduler: {class_name", "${a}"])
def test_a_file_of_models_reads_no_variable(key, write):
    path = write(
        f"m: {{'{key}': x, fps: 8}}\n"
        if key == "${a}"
        else f"m: {{{key}: '${{oc.env:A_TOKEN}}'{'}' * key.count('{')}}}\n"
    )
    with pytest.raises(ValueError, match=r"mine\.yaml: m.*itself"):
        load_model_entry("m", path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: load_preset("default", description=text),
        lambda text: load_preset("default", **{"block_size.m": text}),
        lambda text: load_preset("default", steps={"0": {"description": text}}),
        lambda text: load_preset("default", sim_thresholds=OmegaConf.create({"x2": text})),
        lambda text: load_preset("default").replace(description=text),
        lambda text: PSAPreset(description=text),
        lambda text: PSAPreset(name=text),
        lambda text: load_model_entry("demo", negative_prompt=text),
        lambda text: load_model_entry("demo").replace(scheduler={"class_name": "X", "kwargs": {"a": [text]}}),
        lambda text: parse_overrides([f"description='{text}'"]),
        lambda text: parse_overrides(["warmup_steps=2", f"steps={{0: {{description: '{text}'}}}}"]),
    ],
)
def test_no_override_reads_a_variable(change, monkeypatch):
    monkeypatch.setenv("A_TOKEN", SECRET)
    with pytest.raises(ValueError, match="itself") as caught:
        change("${oc.env:A_TOKEN}")
    assert SECRET not in str(caught.value)


def test_values_without_an_interpolation_pass():
    refuse_interpolation({"a": ["$5", "{x}", 3, None, {"b": "50 % $"}]}, "here")


def bomb(levels, width, kind):
    left, right = ("[", "]") if kind == "list" else ("{", "}")
    parts = lambda name: ", ".join(name if kind == "list" else f"k{i}: {name}" for i in range(width))  # noqa: E731
    lines = [f"a0: &a0 {left}{parts('x')}{right}"]
    lines += [f"a{i}: &a{i} {left}{parts(f'*a{i - 1}')}{right}" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize("kind", ["list", "mapping"])
@pytest.mark.parametrize(("levels", "width"), [(9, 9), (30, 2)])
def test_aliases_do_not_grow(levels, width, kind, write):
    start = time.monotonic()
    with pytest.raises(ValueError, match="not valid YAML"):
        load_preset("default", config=write(bomb(levels, width, kind)))
    with pytest.raises(ValueError, match="cannot read the override"):
        parse_overrides([f"steps={{{bomb(levels, width, 'mapping')}}}".replace("\n", ", ")])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        f"a: {'[' * 900}{']' * 900}",
        f"a: {'{b: ' * 900}1{'}' * 900}",
        f"a: {'9' * 5000}",
        "{[1]: 2}",
        "~: 3",
    ],
)
def test_what_no_reader_takes_is_a_value_error(text, write):
    with pytest.raises(ValueError, match="not valid YAML"):
        load_preset("default", config=write(text))


def test_a_few_aliases_are_read(write):
    path = write(
        "default: {attention_configs: {p: &p {warmup_steps: 3, mask_ratios: {1: [0, 0.5], 0: [0.5, 1]}}, r: *p}}\n"
    )
    assert load_preset("default", "r", config=path).warmup_steps == 3


def test_a_byte_order_mark_joins_no_name(write):
    path = write("\ufeffmine: {attention_configs: {p: {warmup_steps: 3}}}\n")
    assert load_preset("mine", "p", config=path).warmup_steps == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{10:20: 1}", {"10:20": 1}),
        ("a: 1:5", {"a": "1:5"}),
        ("a: -1:30, 2", {"a": "-1:30, 2"}),
        ("a: [1:2, '3:4', 0:5, 5]", {"a": ["1:2", "3:4", "0:5", 5]}),
        ("é: {1:2: ö}", {"é": {"1:2": "ö"}}),
        ("a: 190:20:30.15", {"a": "190:20:30.15"}),
    ],
)
def test_a_range_is_no_number_of_base_60(text, value):
    assert read_yaml(text) == value


def test_text_that_is_no_yaml_is_left_alone():
    assert quote_ranges("a: [1:2") == "a: [1:2"


def test_ranges_of_a_command_line_are_ranges():
    assert parse_overrides(["dense_layers=1:5", "steps={10:20: {type: dense}}"]) == {
        "dense_layers": "1:5",
        "steps": {"10:20": {"type": "dense"}},
    }
    assert load_preset("default", **parse_overrides(["dense_layers=1:5"])).at(0, 9, 4, 9).type == "dense"
