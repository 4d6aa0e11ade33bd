"""Batches that fail: full disks, limits, encoders and processes that are killed. A file with its name is whole."""

import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from functools import partial

import fuzz
import imageio_ffmpeg
import pytest
from quick_batch import PROMPTS, Noise, Run, finished
from small_disk import largest_file, small_disk

pytestmark = [
    pytest.mark.usefixtures("short_waits"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # imageio-ffmpeg leaves its pipe to the garbage collector
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def final_names(folder):
    return [name for name in names(folder) if name.endswith((".mp4", ".json")) and not name.startswith(".")]


def assert_goes_on(folder, before):
    """Without what was in the way, the batch ends well; what was finished stays as it was."""
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    run = Run(folder)
    calls = len(run.calls)
    status, told = run.end()
    assert status == 0, told
    assert finished(folder) == set(PROMPTS)
    assert len(run.calls) - calls == len(PROMPTS) - len(before), "each of the others once"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(names(folder)) == 2 * len(PROMPTS), "no claims, no parts"


def test_a_batch_under_a_limit_of_file_size(folder):
    status, told = Run(folder, within=partial(largest_file, 9_000)).end()
    assert status == 1
    error = told.splitlines()[-1]
    assert error.startswith("error: no room for ")
    assert "bytes are missing of about" in error
    assert "File too large" in error
    assert final_names(folder) == []
    assert_goes_on(folder, finished(folder))


def test_a_batch_on_a_disk_that_gets_full(tmp_path):
    with small_disk(tmp_path / "disk", 44) as folder:
        status, told = Run(folder).end()
        done = finished(folder)
        assert status == 1
        assert 0 < len(done) < len(PROMPTS), "it must get full in the middle"
        assert "No space left on device" in told
        assert len(final_names(folder)) == 2 * len(done)
        assert not [name for name in names(folder) if ".part" in name], "nothing takes room in vain"
        again, _ = Run(folder).end()
        assert again == 1
        assert finished(folder) == done


def test_the_room_that_is_said_to_be_missing_is_enough(tmp_path):
    with small_disk(tmp_path / "disk", 16) as folder:
        _, told = Run(folder).end()
        error = told.splitlines()[-1]
        missing = int(error.split(" bytes are missing")[0].split()[-1].replace(",", ""))
    with small_disk(tmp_path / "larger", 16 + missing // 1024 + 8) as folder:
        Run(folder).end()
        assert len(finished(folder)) == 1


@contextmanager
def encoders_are_killed(script, seconds):
    """Every encoder that this process starts is killed some time after its start; what reads videos is not."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    killed = f'timeout --foreground -s KILL {seconds} "{ffmpeg}"'
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *"-y -f rawvideo"*) exec {killed} "$@";; *) exec "{ffmpeg}" "$@";; esac\n'
    )
    script.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
        yield


@pytest.mark.fuzz
@pytest.mark.parametrize("case", range(20 if fuzz.LONG else 2))
def test_a_batch_whose_encoder_is_killed(folder, case):
    # the first one in any case, the others before, after, or while the encoder works
    seconds = 0.004 if case == 0 else random.Random(None if fuzz.LONG else case).uniform(0.01, 0.2)
    within = partial(encoders_are_killed, folder.with_name("ffmpeg"), seconds)
    status, told = Run(folder, within=within).end()
    done = finished(folder)
    assert status == (0 if done == set(PROMPTS) else 1), (seconds, told)
    assert status == 1 or case > 0
    assert len(final_names(folder)) == 2 * len(done)
    if status:
        assert "the encoder failed or was killed" in told.splitlines()[-1]
        assert_goes_on(folder, done)


@pytest.mark.fuzz
def test_two_processes_killed_at_random(tmp_path):
    """At every moment names promise whole files; what is finished is not done again; the status tells."""
    rng, kills, batches = random.Random(None if fuzz.LONG else 1), 0, 0
    while kills < (50 if fuzz.LONG else 3):
        batches += 1
        folder = tmp_path / f"batch{batches}" / "out"
        folder.mkdir(parents=True)
        began, killed_here = [], 0
        while finished(folder) != set(PROMPTS):
            done = finished(folder)
            runs = [Run(folder), Run(folder)]
            time.sleep(rng.uniform(0.02, 0.8))
            doomed = rng.sample(runs, rng.choice([1, 1, 2])) if killed_here < 4 else []
            for run in doomed:
                os.kill(run.process.pid, signal.SIGKILL)
                run.process.join()  # until then it is a zombie, which still has its number
            ends = [run.end()[0] for run in runs]
            for run, end in zip(runs, ends, strict=True):
                # it may have been done before it was killed
                assert end == 0 or (run in doomed and end is None)
            hit = ends.count(None)
            kills, killed_here = kills + hit, killed_here + hit
            began = runs[0].calls
            assert done <= finished(folder)
            assert 0 not in ends or finished(folder) == set(PROMPTS), "status 0 says that all is finished"
            assert max(map(began.count, began), default=0) <= 1 + killed_here
            assert len(began) <= len(PROMPTS) + killed_here, "only what was cut off is done again"
        assert set(began) == set(PROMPTS)
        if all(end == 0 for end in ends):
            assert len(names(folder)) == 2 * len(PROMPTS), "no claims, no parts"


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "out"
    folder.mkdir()
    assert Run(folder).end()[0] == 0
    return folder


def cut(video, record):
    video.write_bytes(video.read_bytes()[:-1000])


def zeros(video, record):
    good = video.read_bytes()
    video.write_bytes(good[: len(good) // 3] + bytes(2000) + good[len(good) // 3 + 2000 :])


def gone(video, record):
    video.unlink()


def no_record(video, record):
    record.write_text("{")


def record_of_another_kind(video, record):
    record.write_text('["frames"]')


@pytest.mark.parametrize("damages", [(cut, zeros, gone), (no_record, record_of_another_kind)])
def test_a_finished_video_that_is_damaged_is_made_again(whole_batch, folder, damages):
    shutil.copytree(whole_batch, folder, dirs_exist_ok=True)
    videos = sorted(folder.glob("*.mp4"))[-len(damages) :]
    for damage, video in zip(damages, videos, strict=True):
        damage(video, video.with_suffix(".json"))
    run = Run(folder)
    status, told = run.end()
    assert status == 0
    assert run.calls == PROMPTS[-len(damages) :]
    assert all(f"{video}: missing, cut off or damaged" in told for video in videos)
    assert told.count("finished already") == len(PROMPTS) - len(damages)
    assert finished(folder) == set(PROMPTS)
    assert all(video.read_bytes() == (whole_batch / video.name).read_bytes() for video in videos)


def test_a_record_from_before_the_digest_and_a_video_of_the_users_own_cut_count_as_finished(whole_batch, folder):
    """The frames are counted then."""
    shutil.copytree(whole_batch, folder, dirs_exist_ok=True)
    first, second, *_ = sorted(folder.glob("*.json"))
    first.write_text(first.read_text().replace("video_sha256", "another_key"))
    with second.with_suffix(".mp4").open("ab") as file:
        file.write(b"\0\0\0\x08free")  # a box that players skip
    run = Run(folder)
    assert run.end()[0] == 0
    assert run.calls == []


class Broken(Noise):
    """A pipeline whose second frame is not finite."""

    def __call__(self, prompt, generator, output_type="np"):
        made = super().__call__(prompt, generator)
        made.frames[0, 1, 0, 0, 0] = float("inf")
        return made


def test_what_is_not_finite_is_not_written(folder):
    status, told = Run(folder, pipe=Broken).end()
    assert status == 1
    error = told.splitlines()[-1]
    assert error.startswith("error: 1 of 5 frames hold NaN or inf")
    assert all(cause in error for cause in ("dtype, float32", "LoRA", "preset"))
    assert final_names(folder) == []
