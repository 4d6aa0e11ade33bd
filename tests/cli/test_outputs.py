"""Files with their final name are whole: videos are read back, JSON is strict, nothing else is left."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_disk import largest_file, small_disk

from psa_diffusers.cli.outputs import count_frames, strict_json, write_json, write_text, write_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio-ffmpeg leaves its pipe


def noise(*shape):
    return np.random.default_rng(0).random((*shape, 3), dtype=np.float32)


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(("shape", "fps"), [((1, 16, 16), 8), ((2, 32, 48), 1), ((40, 16, 16), 23)])
def test_every_frame_is_counted(shape, fps, tmp_path):
    write_video(tmp_path / "a.mp4", noise(*shape), fps)
    assert count_frames(tmp_path / "a.mp4") == shape[0]
    assert names(tmp_path) == ["a.mp4"]


def test_a_folder_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:a").mkdir()
    write_video((tmp_path / "http:a" / "b.mp4").relative_to(tmp_path), noise(2, 16, 16), 8)
    assert count_frames(tmp_path / "http:a" / "b.mp4") == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_frames_that_are_not_finite_are_refused(value, tmp_path):
    frames = noise(3, 16, 16)
    frames[2, 5, 5, 1] = value
    with pytest.raises(ValueError, match="1 of 3 frames"):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert names(tmp_path) == []


def test_an_encoder_that_says_nothing_is_found_out(tmp_path, monkeypatch):
    """It takes all frames, ends well, and has lost the last."""
    import diffusers.utils

    whole = diffusers.utils.export_to_video
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, *a, **k: whole(frames[:-1], *a, **k))
    write_text(tmp_path / "a.mp4", "as it was")
    with pytest.raises(OSError, match="3 of 4 frames"):
        write_video(tmp_path / "a.mp4", noise(4, 16, 16), 8)
    assert (tmp_path / "a.mp4").read_text() == "as it was"
    assert names(tmp_path) == ["a.mp4"]


def test_a_text_without_room_says_how_much_is_missing(tmp_path):
    with small_disk(tmp_path / "disk", 16) as folder:
        write_text(folder / "a.json", "as it was")
        with pytest.raises(OSError, match=r"no room for .*a\.json: .* bytes are missing of 20,000 \(No space left"):
            write_text(folder / "a.json", "x" * 20_000)
        assert (folder / "a.json").read_text() == "as it was"
        assert names(folder) == ["a.json"]


def test_a_text_above_a_limit_says_how_much_is_missing(tmp_path):
    with largest_file(4096), pytest.raises(OSError, match=r"904 bytes are missing of 5,000 \(File too large\)"):
        write_text(tmp_path / "a.json", "x" * 5000)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"call": {"guidance_scale": float("nan")}}, "call.guidance_scale is nan"),
        ({"rows": [1.0, (2.0, -float("inf"))]}, r"rows\[1\]\[1\] is -inf"),
        ({"a": np.float64("inf")}, "a is inf"),
        (float("nan"), "the value is nan"),
    ],
)
def test_numbers_that_json_does_not_know_are_refused(record, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        strict_json(record)
    with pytest.raises(ValueError, match=told):
        write_json(tmp_path / "a.json", record)
    assert names(tmp_path) == []


def test_a_record_that_is_being_written_is_found_by_nobody_who_looks_for_records(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Path, "replace", lambda part, path: seen.append((part.exists(), list(tmp_path.glob("*.json")))))
    write_json(tmp_path / "a.json", {})
    assert seen == [(True, [])]


def test_a_folder_that_is_no_utf8_can_be_written_down(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "a.json", {"command": [name, "näher"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"command": [name, "näher"]}
