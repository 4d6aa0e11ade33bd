"""scripts/compare.py as a person runs it, on a tiny pipeline saved to a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CASES

from psa_diffusers.cli import compare

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
demo:
  attention_configs:
    everything: &small {type: psa, block_size: {m: 16, n: 16, tile_n: 16}, mask_ratios: {1: [0, 1]}}
    half: {<<: *small, mask_ratios: {1: [0, 0.5], 0: [0.5, 1]}}
    little: {<<: *small, mask_ratios: {1: [0, 0.1], 0: [0.1, 1]}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder with a tiny pipeline and, beside it, presets and prompts; the options that all runs share."""
    folder = tmp_path_factory.mktemp("compare")
    CASES["cogvideox"].build().save_pretrained(folder / "pipe")
    (folder / "presets.yaml").write_text(CONFIG)
    (folder / "prompts.txt").write_text("a cat walks\n\nrain\n")
    size = ("--width", 112, "--height", 96, "--num_frames", 9, "--num_inference_steps", 3)
    return folder, ("--model", folder / "pipe", "--prompt_file", folder / "prompts.txt", *size)


def run_script(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compare.py"), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_videos_of_presets_are_held_against_dense(model):
    folder, args = model
    own = ("--config", folder / "presets.yaml", "--presets", "everything", "half", "little", "published@0.4")
    done = run_script(*args, *own, "--warmup_steps", 1, "--json", folder / "out.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a cat walks"] * 4 + ["rain"] * 4
    assert {line["seed"] for line in lines} == {42, 43}
    for first in (0, 4):
        everything, half, little, published = lines[first : first + 4]
        assert everything["density"] == 1
        assert everything["psnr"] > 80, "to rounding: a video has 8 bits, and one of those is 48 dB"
        assert little["density"] < half["density"] < 1
        assert little["psnr"] < half["psnr"] < everything["psnr"]
        assert little["ssim"] < everything["ssim"]
        assert published["preset"] == "published@0.4"
    table = done.stdout.splitlines()
    assert [row.split()[0] for row in table] == ["preset", "everything", "half", "little", "published@0.4"]


def test_a_preset_that_never_runs_sparse_is_an_error_that_says_why(model):
    _, args = model
    done = run_script(*args, "--presets", "published", "--warmup_steps", 3)
    assert done.returncode != 0
    assert "'published' ran dense throughout; pass --warmup_steps" in done.stderr
    assert "warm-up" in done.stderr.split("throughout")[1], "and the report follows"


def test_lpips_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install torchvision, or leave --lpips out"):
        compare.load_lpips()
