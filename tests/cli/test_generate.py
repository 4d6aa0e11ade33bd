"""scripts/generate.py and the demo model: the program as a person runs it, on real pipelines of tiny size."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest
import tiny
import torch
from command_options import SIZE, SMALL
from lora_files import lora_file

from psa_diffusers import PSAPreset, load_preset
from psa_diffusers.cli import generate, generation
from psa_diffusers.cli.batch import call_arguments
from psa_diffusers.cli.demo import WEIGHTS, build_demo_pipeline, unknown_words
from psa_diffusers.presets import load_model_entry
from scripts.miniature import measure, world
from scripts.miniature.small_cogvideox import make_small_cogvideox

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
PROMPTS = ["a red ball rolls", "two foxes in the snow"]

# imageio-ffmpeg reads the size of a file from ffmpeg's output and leaves the pipe to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def run_script(*args):
    """Run the program in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *args], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def main():
    """The program's main function, for the calls that need no process of their own."""
    return lambda *args: generate.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline as a user has it on disk."""
    where = tmp_path_factory.mktemp("pipeline")
    tiny.cogvideox().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def batch(folder, tmp_path_factory):
    """A finished batch of two prompts, dense beside PSA: its folder, its arguments, and what the program printed."""
    where = tmp_path_factory.mktemp("batch")
    prompts = where / "prompts.txt"
    prompts.write_text(f"# nature\n{PROMPTS[0]}\n\n  {PROMPTS[1]}\n")
    args = ["--model", folder, "--prompt_file", prompts, *SIZE, *SMALL, "--use_psa", "--compare", "--seed", "7"]
    args += ["--device", "cpu", "--output_dir", where / "out"]
    done = run_script(*args)
    assert done.returncode == 0, done.stderr
    return where / "out", args, done.stdout


def records(where):
    return [(path, json.loads(path.read_text())) for path in sorted(where.glob("*.json"))]


def read_video(path):
    """Frames ``[frames, height, width, 3]`` uint8 as a player sees them."""
    with imageio.get_reader(path) as reader:
        return np.stack(list(reader.iter_data()))


def run_one(main, folder, where, *args):
    """Frames and record of one prompt without comparison."""
    assert main("--model", folder, "--prompt", "a cat", *SIZE, "--device", "cpu", "--output_dir", where, *args) == 0
    ((path, record),) = records(where)
    return read_video(path.with_suffix(".mp4")), record


def test_help_shows_examples():
    done = run_script("--help")
    assert done.returncode == 0
    assert "python scripts/generate.py --model demo --use_psa --compare" in done.stdout
    assert all(
        f"--{name}" in done.stdout for name in ("prompt_file", "attention_preset", "set", "no_warmup", "lora_path")
    )


def test_every_prompt_gives_a_video_and_its_record(batch):
    where, _, printed = batch
    assert len(list(where.iterdir())) == 4
    for index, (path, record) in enumerate(records(where)):
        assert record["prompt"] == PROMPTS[index]
        assert record["seed"] == 7 + index
        assert record["video"] == path.with_suffix(".mp4").name
        assert record["frames"] == [9, 64, 64, 3]
        assert record["call"]["num_inference_steps"] == 3
        assert record["environment"]["versions"]["diffusers"]
        assert record["result"]["seconds"] > 0
        assert record["video"] in printed


def test_compare_shows_dense_beside_psa(batch):
    for path, record in records(batch[0]):
        assert read_video(path.with_suffix(".mp4")).shape == (9, 64, 128, 3)
        result = record["result"]
        assert 0 < result["sparse_density"] < result["density"] < 1
        assert 5 < result["psnr"] < 99
        assert 0 < result["ssim"] < 1
        assert result["speedup"] == pytest.approx(result["dense_seconds"] / result["seconds"])
        assert "warm-up" in record["report"]


def test_a_batch_goes_on_where_it_stopped(main, batch, capsys):
    where, args, _ = batch
    (first, _), (second, record) = records(where)
    before = [path.stat().st_mtime_ns for path in (first, first.with_suffix(".mp4"))]
    frames = read_video(second.with_suffix(".mp4"))
    # what a kill leaves: a video without a record, halves of files under other names
    second.unlink()
    second.with_suffix(".mp4").write_bytes(b"cut off")
    (where / f".{second.name}.part").write_text('{"prompt": ')
    capsys.readouterr()
    assert main(*args) == 0
    assert "finished already" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in (first, first.with_suffix(".mp4"))] == before
    assert np.array_equal(read_video(second.with_suffix(".mp4")), frames)
    assert json.loads(second.read_text())["preset"] == record["preset"]
    assert len(list(where.glob("*.mp4"))) == len(list(where.glob("*.json"))) == 2


def test_a_record_is_enough_to_repeat_the_run(main, folder, tmp_path):
    frames, record = run_one(main, folder, tmp_path, "--use_psa", *SMALL, "--seed", "3")
    pipe = generation.load_pipeline(generation.resolve_model(record["source"]), device="cpu")
    preset = PSAPreset(**record["preset"])
    call = {**record["call"], "prompt": record["prompt"]}
    run = generation.generate(pipe, call, seed=record["seed"], use_psa=True, preset=preset)
    generation.write_video(tmp_path / "again.mp4", run.frames, record["fps"])
    assert np.array_equal(read_video(tmp_path / "again.mp4"), frames)


def test_the_seed_decides_the_frames(main, folder, tmp_path):
    frames, record = run_one(main, folder, tmp_path / "a")
    assert record["preset"] is None
    assert np.array_equal(frames, run_one(main, folder, tmp_path / "b", "--no_warmup")[0])
    assert not np.array_equal(frames, run_one(main, folder, tmp_path / "c", "--seed", "43")[0])


def test_other_settings_do_not_overwrite(main, folder, tmp_path):
    run_one(main, folder, tmp_path)
    base = ["--model", folder, "--prompt", "a cat", *SIZE, "--device", "cpu", "--output_dir", tmp_path, "--use_psa"]
    assert main(*base, *SMALL) == 0
    assert main(*base, *SMALL, "--set", "warmup_steps=2") == 0
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.mp4"))) == 3


def test_a_lora_is_used_and_recorded(main, folder, tmp_path):
    rng = torch.Generator().manual_seed(0)
    layers = {}
    for block in range(2):
        for target in ("to_q", "to_v", "to_out.0"):
            path = f"transformer_blocks.{block}.attn1.{target}"
            layers[f"{path}.lora_A.weight"] = torch.randn(4, 32, generator=rng)
            layers[f"{path}.lora_B.weight"] = torch.randn(32, 4, generator=rng)
    tiny.cogvideox().save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    plain, _ = run_one(main, folder, tmp_path / "plain", "--use_psa", *SMALL)
    styled, record = run_one(main, folder, tmp_path / "styled", "--use_psa", *SMALL, "--lora_path", tmp_path / "lora")
    assert not np.array_equal(plain, styled)
    assert record["lora"]["source"] == str(tmp_path / "lora")


@pytest.fixture
def four_steps(folder, tmp_path):
    """The entry of the LoRA for four steps with weights of tiny size in place of the published ones."""
    own = tmp_path / "own.yaml"
    size = "width: 64, height: 64, num_frames: 9"
    own.write_text(
        f"cogvideo_5b_lora: {{source: {folder}, dtype: float32, {size}, "
        f"lora: {{source: {tmp_path}, weight_name: null}}}}"
    )
    lora_file(tmp_path, "cogvideox", rank=64)
    return ["--models_config", own, "--prompt", "a panda", "--use_psa", "--device", "cpu"]


def test_the_lora_for_four_steps_in_one_line(main, four_steps, tmp_path):
    assert main("--model", "cogvideo_5b_lora", *four_steps, "--output_dir", tmp_path / "out") == 0
    ((_, record),) = records(tmp_path / "out")
    assert (record["call"]["num_inference_steps"], record["call"]["guidance_scale"]) == (4, 1.0)
    assert record["scheduler"]["class_name"] == "CogVideoXDPMScheduler"
    assert record["scheduler"]["timestep_spacing"] == "trailing"
    assert (record["preset"]["model"], record["preset"]["name"]) == ("CogVideo_5b", "psa_4steps")
    assert record["lora"]["source"] == str(tmp_path)
    assert "8 calls in 4 steps and 2 layers: 8 sparse" in record["report"]
    # another file in its place
    (tmp_path / "other").mkdir()
    lora_file(tmp_path / "other", "cogvideox", rank=64, seed=2)
    other = ["--lora_path", tmp_path / "other"]
    assert main("--model", "cogvideo_5b_lora", *four_steps, *other, "--output_dir", tmp_path / "out2") == 0
    ((_, second),) = records(tmp_path / "out2")
    assert second["lora"]["source"] == str(tmp_path / "other")
    videos = [next((tmp_path / where).glob("*.mp4")) for where in ("out", "out2")]
    assert not np.array_equal(*map(read_video, videos))


def test_the_lora_for_four_steps_brings_its_settings_to_another_entry(main, folder, four_steps, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"cogvideo_5b: {{source: {folder}, dtype: float32, width: 64, height: 64, num_frames: 9}}")
    args = ["--model", "cogvideo_5b", *four_steps, "--lora_path", tmp_path]
    assert main(*args, "--output_dir", tmp_path / "out") == 0
    assert (
        main(*args, "--output_dir", tmp_path / "own", "--num_inference_steps", "3", "--attention_preset", "psa_fast")
        == 0
    )
    ((_, record),), ((_, chosen),) = records(tmp_path / "out"), records(tmp_path / "own")
    assert (record["call"]["num_inference_steps"], record["preset"]["name"]) == (4, "psa_4steps")
    assert (chosen["call"]["num_inference_steps"], chosen["preset"]["name"]) == (3, "psa_fast")


def test_presets_of_the_users_own_file(main, folder, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "demo:\n  attention_configs:\n    mine:\n      type: psa\n      block_size: {m: 16, n: 32, tile_n: 16}\n"
        "      mask_ratios: {1: [0, 0.5], 16: [0.5, 1]}\n"
    )
    args = ["--use_psa", "--config", own, "--attention_preset", "mine"]
    _, record = run_one(main, folder, tmp_path / "out", *args)
    assert record["preset"]["name"] == "mine"
    assert record["preset"]["block_size"]["n"] == 32


@pytest.mark.parametrize(
    ("args", "told"),
    [
        pytest.param(["--model", "cogvideo_6b"], ["cogvideo_5b", "wan21_1.3b", "demo"], id="model"),
        pytest.param(["--model", "no/such/folder"], ["cogvideo_5b"], id="folder"),
        pytest.param(["--model", "demo", "--use_psa", "--attention_preset", "fast"], ["psa_balanced"], id="preset"),
        pytest.param(["--model", "demo", "--use_psa", "--set", "warmup_step=1"], ["'warmup_steps'"], id="preset-key"),
        pytest.param(["--model", "demo", "--use_psa", "--config", "no.yaml"], ["no.yaml"], id="config"),
        pytest.param(["--model", "demo", "--prompt_file", "no.txt"], ["no.txt"], id="prompt-file"),
        pytest.param(["--model", "demo", "--lora_path", "no.safetensors"], ["no.safetensors"], id="lora"),
    ],
)
def test_what_does_not_exist_is_told_before_anything_runs(main, args, told, tmp_path, capsys):
    assert main(*args, "--device", "cpu", "--output_dir", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    complaint = printed.splitlines()[-1]  # after the bars of loading
    assert complaint.startswith("error: ")
    assert all(name in complaint for name in told)
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["--compare"], id="compare-without-psa"),
        pytest.param(["--set", "warmup_steps=0"], id="set-without-psa"),
        pytest.param(["--prompt", "a", "--prompt_file", "b"], id="two-prompts"),
    ],
)
def test_options_that_contradict_each_other_are_refused(main, args):
    with pytest.raises(SystemExit) as stop:
        main("--model", "demo", *args)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("entry", "args", "told"),
    [
        pytest.param("scheduler: {class_name: DDIMSchedule}", [], "'DDIMScheduler'", id="scheduler"),
        pytest.param(
            "scheduler: {class_name: DDIMScheduler, kwargs: {steps_ofset: 1}}", [], "'steps_offset'", id="scheduler-key"
        ),
        pytest.param("flow_shift: 3.0", [], "flow_shift", id="nothing-reads-it"),
        pytest.param("pipeline: CogVideoPipeline", [], "'CogVideoXPipeline'", id="pipeline"),
        pytest.param("guidance_scale: .nan", [], "guidance_scale", id="nan-in-a-file"),
        pytest.param("guidance_scale: 1", ["--image", "a.png"], "takes no image", id="image"),
        pytest.param("guidance_scale: 1", ["--negative_prompt", "a\x07b"], "column 2", id="bell"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_told_before_anything_runs(main, folder, entry, args, told, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(f"mine: {{source: {folder}, dtype: float32, {entry}}}")
    mine = ["--model", "mine", "--models_config", tmp_path / "own.yaml", "--prompt", "a fox", "--device", "cpu"]
    assert main(*mine, *args, "--output_dir", tmp_path / "out") == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("error: ")
    assert told in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_guidance_is_a_finite_number(main, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main("--model", "demo", f"--guidance_scale={value}")
    assert stop.value.code == 2
    assert "must be a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "told"), [("transformer", "the latents after the last step"), ("vae", "it is the VAE")]
)
def test_a_run_that_is_not_finite_is_an_error_with_its_likely_causes(part, told):
    pipe = tiny.cogvideox()
    with torch.no_grad():
        list(getattr(pipe, part).parameters())[-1].fill_(float("nan"))  # the last layer: its bias
    call = {"prompt": "a fox", "width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 2}
    with pytest.raises(ValueError, match=told) as error:
        generation.generate(pipe, call, seed=0)
    assert all(cause in str(error.value) for cause in ("float32", "LoRA", "preset"))


def test_the_demo_needs_no_network(tmp_path):
    done = run_script("--model", "demo", *SIZE, "--use_psa", *SMALL, "--device", "cpu", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    ((path, record),) = records(tmp_path)
    frames = read_video(path.with_suffix(".mp4"))
    assert frames.shape == (9, 64, 64, 3)
    assert frames.std() > 10
    assert record["preset"]["model"] == "demo"
    assert record["prompt"] == load_model_entry("demo").example_prompt
    assert str(path.with_suffix(".mp4")) in done.stdout.splitlines()[-1]


def test_words_that_the_demo_was_not_trained_with_are_named(main, tmp_path, capsys):
    args = ["--model", "demo", "--prompt", "A red fox moves left, over a red fox's den.", "--device", "cpu"]
    assert main(*args, "--output_dir", tmp_path / "out") == 2
    complaint = capsys.readouterr().err
    assert "does not know fox, ', s, den, ., in 'A red fox" in complaint.replace('"', "'")
    assert load_model_entry("demo").example_prompt in complaint
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def demo():
    pipe = build_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_demo_shows_what_the_prompt_says(demo):
    prompt = "a blue square moves up over a checkered teal background"
    call = {"prompt": prompt, "width": 64, "height": 64, "num_frames": 25, "num_inference_steps": 12}
    frames = generation.generate(demo, {**call, "guidance_scale": 4.0}, seed=0).frames
    right = measure.compare(world.parse_prompt(prompt), measure.describe(frames))
    assert set(right) == {"things", "color", "shape", "count", "motion", "ground", "texture"}
    assert all(right.values()), right


def test_the_demo_knows_every_word_of_its_world_and_no_other(demo):
    assert set(world.WORDS) == set(demo.tokenizer.get_vocab()) - {"<pad>", "</s>", "<unk>"}
    assert not unknown_words(demo.tokenizer, " ".join(world.WORDS).upper())
    assert unknown_words(demo.tokenizer, "a cat, a dog, a red cat") == ["cat", "dog"]


def test_damaged_weights_are_refused(tmp_path):
    damaged = shutil.copytree(WEIGHTS / "cogvideox", tmp_path / "damaged")
    weights = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model\.safetensors.*SHA-256"):
        build_demo_pipeline(damaged)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        build_demo_pipeline(damaged)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        build_demo_pipeline(tmp_path / "nothing")


def test_every_supported_transformers_knows_the_tokenizer_of_the_demo():
    # transformers 5 writes TokenizersBackend, which 4 does not have; both know the older name
    index = json.loads((WEIGHTS / "cogvideox" / "model_index.json").read_text())
    config = json.loads((WEIGHTS / "cogvideox" / "tokenizer" / "tokenizer_config.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("folder", [path.parent for path in sorted(WEIGHTS.rglob("hashes.json"))], ids=lambda x: x.name)
def test_the_hashes_of_the_weights_name_every_file(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert set(json.loads((folder / "hashes.json").read_text())) == files - {"hashes.json"}


def test_every_folder_of_weights_has_hashes():
    weights = {path.parent for path in WEIGHTS.rglob("*.safetensors")}
    checked = [path.parent for path in WEIGHTS.rglob("hashes.json")]
    assert weights
    assert all(any(folder.is_relative_to(place) for place in checked) for folder in weights)


def test_with_its_lora_the_demo_shows_in_four_sparse_steps_what_the_prompt_says():
    config = load_model_entry("demo_lora")
    pipe = generation.load_pipeline(config, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompt = "a blue square moves up over a checkered teal background"
    names = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale")
    call = {"prompt": prompt, **{name: getattr(config, name) for name in names}}
    run = generation.generate(pipe, call, seed=0, use_psa=True, preset=config.attention_preset)
    assert type(pipe.scheduler).__name__ == "CogVideoXDDIMScheduler"
    assert run.sparse_density <= 0.15
    right = measure.compare(world.parse_prompt(prompt), measure.describe(run.frames))
    assert all(right.values()), right


def test_the_demo_of_wan_is_given_text_of_the_length_that_it_learned(demo):
    names = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt")
    args = argparse.Namespace(**dict.fromkeys(names))
    assert call_arguments(args, load_model_entry("demo_wan"), demo, None)["max_sequence_length"] == 32
    assert "max_sequence_length" not in call_arguments(args, load_model_entry("wan21_1.3b"), demo, None)


def test_the_demo_of_wan_shows_what_its_prompt_says():
    config = load_model_entry("demo_wan")
    pipe = generation.load_pipeline(config, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    names = ("width", "height", "num_frames", "guidance_scale", "max_sequence_length")
    call = {"prompt": config.example_prompt, **{name: getattr(config, name) for name in names}}
    psa = {"use_psa": True, "preset": config.attention_preset, "overrides": {"warmup_steps": 1}}
    run = generation.generate(pipe, {**call, "num_inference_steps": 4}, seed=0, **psa)
    assert run.sparse_density <= 0.15
    right = measure.compare(world.parse_prompt(config.example_prompt), measure.describe(run.frames))
    assert all(right.values()), right


def test_the_small_pipeline_of_random_weights_is_the_same_every_time_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    first, second = make_small_cogvideox(), make_small_cogvideox()
    assert torch.equal(before, torch.random.get_rng_state())
    for part in ("transformer", "vae", "text_encoder"):
        states = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # written down once: another process must give the same
    assert first.tokenizer("A red fox, 12.").input_ids == [3, 4, 3, 21, 155, 3, 9, 435, 41, 3, 31, 32, 40, 1]


def test_the_demo_is_long_enough_to_mean_something():
    config = load_model_entry("demo")
    tokens = ((config.num_frames - 1) // 4 + 1) * (config.height // 8) * (config.width // 8)
    assert tokens >= 3000
    preset = load_preset("demo")
    assert preset.warmup_steps <= config.num_inference_steps // 4
    shares = np.diff([0, *(end for _, end in preset.levels)])
    assert sum(share / factor for share, (factor, _) in zip(shares, preset.levels, strict=True) if factor) <= 0.25
