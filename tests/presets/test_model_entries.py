"""Runs: every entry of models.yaml is complete and fits its preset, and mistakes are named."""

import diffusers
import pytest

from psa_diffusers.presets import list_model_entries, load_model_entry, load_preset

PUBLISHED = [
    # name, width, height, frames, steps, guidance
    ("cogvideo_5b", 720, 480, 49, 50, 6.0),
    ("cogvideo1.5_5b", 1360, 768, 81, 50, 6.0),
    ("cogvideo_5b_lora", 720, 480, 49, 4, 1.0),
    ("wan21_1.3b", 1280, 720, 69, 50, 5.0),
    ("wan21_14b", 1280, 720, 69, 50, 5.0),
    ("wan22_5b", 1280, 704, 121, 50, 5.0),
    ("wan22_a14b", 1280, 768, 69, 40, 4.0),
]
SECTIONS = {
    "cogvideo_5b": "CogVideo_5b",
    "cogvideo1.5_5b": "CogVideo1.5_5b",
    "cogvideo_5b_lora": "CogVideo_5b",
    "wan21_1.3b": "Wan2.1_1.3b",
    "wan21_1.3b_lora": "Wan2.1_1.3b",
    "wan21_14b": "Wan2.1_14b",
    "wan22_5b": "Wan2.2_5B",
    "wan22_a14b": "Wan2.2_A14B",
    "hunyuan_video": "HunyuanVideo",
    "ltx_video": "LTX-Video",
    "mochi": "Mochi",
    "demo": "demo",
    "demo_lora": "demo",
    "demo_wan": "demo",
}


@pytest.mark.parametrize(
    ("name", "width", "height", "frames", "steps", "guidance"), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_run_is_the_published_one(name, width, height, frames, steps, guidance):
    run = load_model_entry(name)
    assert (run.width, run.height, run.num_frames) == (width, height, frames)
    assert (run.num_inference_steps, run.guidance_scale) == (steps, guidance)
    assert run.guidance_scale_2 == (3.0 if name == "wan22_a14b" else None)


@pytest.mark.parametrize("name", list_model_entries())
def test_run_names_things_that_exist(name):
    run = load_model_entry(name)
    assert hasattr(diffusers, run.pipeline)
    assert run.scheduler is None or hasattr(diffusers, run.scheduler.class_name)
    preset = load_preset(SECTIONS[name], run.attention_preset)
    assert preset.warmup_steps < run.num_inference_steps
    assert run.attention_model in (None, SECTIONS[name])
    assert run.example_prompt
    assert (run.source is None) == name.startswith("demo")


def test_few_step_lora_runs_with_its_own_attention():
    run = load_model_entry("cogvideo_5b_lora")
    assert run.lora.source == "GYP666/BLADE"
    assert run.lora.weight_name == "cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors"
    assert run.scheduler.kwargs == {"timestep_spacing": "trailing"}
    assert run.attention_preset == "psa_4steps"


def test_users_file_and_overrides_are_laid_over(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("demo: {width: 128}\nmine: {source: ./weights, lora: {source: ./lora}}\n", encoding="utf-8")
    assert load_model_entry("demo", path).width == 128
    assert load_model_entry("DEMO", path, **{"height": 64}).height == 64
    mine = load_model_entry("mine", path)
    assert (mine.source, mine.lora.source, mine.lora.scale) == ("./weights", "./lora", 1.0)
    assert mine.replace(lora=None).lora is None
    assert mine.replace(**mine.to_dict()) == mine
    assert list_model_entries(path) == [*list_model_entries(), "mine"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param({"widht": 3}, "unknown key 'widht'. Did you mean 'width'", id="key"),
        pytest.param({"width": 0}, "width must be at least 1, got 0", id="size"),
        pytest.param({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0", id="text"),
        pytest.param({"dtype": "bf16"}, "dtype must be one of bfloat16, float16, float32, got 'bf16'", id="dtype"),
        pytest.param({"offload": "cpu"}, "offload must be one of none, model, sequential, got 'cpu'", id="offload"),
        pytest.param({"lora": {"path": "x"}}, "lora: unknown key 'path'", id="lora-key"),
        pytest.param({"lora": {"scale": 1.0}}, "lora needs source", id="lora-source"),
        pytest.param({"scheduler": {"kwargs": {}}}, "scheduler needs class_name", id="scheduler"),
        pytest.param({"fps": "fast"}, "fps.*Integer", id="type"),
    ],
)
def test_a_mistake_names_the_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_model_entry("demo", **overrides)


def test_unknown_run_lists_what_exists():
    with pytest.raises(ValueError, match=r"unknown model 'wan21_14'.*mean 'wan21_14b'.*cogvideo_5b_lora"):
        load_model_entry("wan21_14")
