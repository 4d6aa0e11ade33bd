"""scripts/generate.py, run as a person runs it: a small saved pipeline in, an .mp4 and its record out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
from tiny import CASES

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "generate.py"
SMALL = ["--num_inference_steps", "2", "--width", "112", "--height", "96", "--num_frames", "9", "--guidance_scale", "1"]
PSA = ["--use_psa", "--set", "warmup_steps=0", "--set", "block_size.m=16", "--set", "block_size.n=16"]


def generate(*arguments, check=True):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    CASES["wan2.1"].build().save_pretrained(path)
    return path


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def test_a_prompt_becomes_a_video_and_a_record_that_repeats_it(folder, tmp_path):
    first = generate("--model", folder, "--prompt", "a cat", "--seed", 7, *SMALL, *PSA, "--output_dir", tmp_path / "a")
    (name, record), *others = records(tmp_path / "a").items()
    assert not others
    assert first.stdout.strip().endswith(f"{name}.mp4")
    video = iio.imread(tmp_path / "a" / record["video"])
    assert list(video.shape) == record["frames"] == [9, 96, 112, 3]
    assert record["seed"] == 7
    assert record["prompt"] == "a cat"
    assert record["preset"]["warmup_steps"] == 0
    assert 0 < record["result"]["density"] < 1
    assert record["environment"]["versions"]["diffusers"]
    again = [sys.executable, *record["command"]]
    again[1] = str(SCRIPT)
    again[again.index("--output_dir") + 1] = str(tmp_path / "b")
    subprocess.run(again, check=True, capture_output=True)
    assert (iio.imread(tmp_path / "b" / record["video"]) == video).all()


def test_compare_puts_dense_beside_psa(folder, tmp_path):
    done = generate("--model", folder, "--prompt", "a cat", *SMALL, *PSA, "--compare", "--output_dir", tmp_path)
    (record,) = records(tmp_path).values()
    assert iio.imread(tmp_path / record["video"]).shape == (9, 96, 224, 3)
    result = record["result"]
    assert 0 < result["psnr"] <= 99
    assert -1 <= result["ssim"] <= 1
    assert result["dense_seconds"] > 0
    assert f"PSNR {result['psnr']:.1f} dB" in done.stdout


def test_a_batch_goes_on_where_it_stopped(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two of them\na cat\n\na dog\n")
    out = tmp_path / "out"
    command = ["--model", folder, "--prompt_file", prompts, *SMALL, "--output_dir", out]
    generate(*command)
    finished = sorted(out.glob("*.json"))
    assert [record["seed"] for record in records(out).values()] == [42, 43]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    finished[1].unlink()  # as if the second prompt had been interrupted
    done = generate(*command)
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert before.keys() == after.keys(), "nothing half-written is left"
    assert "finished already" in done.stdout
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {finished[1].name, finished[1].with_suffix(".mp4").name}


def test_a_lora_is_loaded(folder, tmp_path):
    from test_lora import lora_file

    path = lora_file(tmp_path, "wan2.1")
    generate("--model", folder, "--prompt", "a cat", *SMALL, "--lora_path", path, "--output_dir", tmp_path / "out")
    (record,) = records(tmp_path / "out").values()
    assert record["lora"]["source"] == str(path)
    generate("--model", folder, "--prompt", "a cat", *SMALL, "--output_dir", tmp_path / "plain")
    with_lora, plain = (next((tmp_path / name).glob("*.mp4")) for name in ("out", "plain"))
    assert (iio.imread(with_lora) != iio.imread(plain)).any()


def test_the_demo_model_needs_nothing_and_runs_sparse(tmp_path):
    arguments = [
        "--model",
        "demo",
        "--use_psa",
        "--num_inference_steps",
        "2",
        "--num_frames",
        "9",
        "--output_dir",
        tmp_path,
    ]
    done = generate(*arguments)
    (record,) = records(tmp_path).values()
    assert record["result"]["sparse_density"] < 0.5
    assert "random weights" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "cogvideo_5b_lora"),
        (["--model", "demo", "--use_psa", "--attention_preset", "psa_balancd"], "psa_balanced"),
        (["--model", "demo", "--use_psa", "--set", "warmup=1"], "warmup_steps"),
        (["--model", "demo", "--prompt_file", "missing.txt"], "no prompt file at missing.txt"),
        (["--model", "demo", "--compare"], "--use_psa"),
    ],
)
def test_mistakes_end_with_2_and_say_what_exists(arguments, message, tmp_path):
    done = generate(*arguments, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
