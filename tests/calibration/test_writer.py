"""The file of a recording: whole under its name or not there, and what was written is found after any interruption."""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from small_disk import largest_file, small_disk

from psa_diffusers.calibration import recover_recording
from psa_diffusers.calibration.journal import decode_line, encode_line
from psa_diffusers.calibration.writer import HeaderFullError, SafetensorsWriter

ROOM = 2**16
CALL = {"call": 0, "denoiser": "transformer", "grid": [1, 2, 4], "text_tokens": 0, "text_first": True}


def record_of(number):
    return {"key": f"r{number}.", **CALL, "step": number, "forward": 0, "branch": "cond"}


def tensors_of(number, size=8):
    """Another dtype for each record, and values by which they are told apart."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    x = torch.arange(2 * size).reshape(1, 2, size) + 16.0 * number
    return {f"r{number}.{part}": (x + index).to(dtype) for index, part in enumerate("qkv")}


def write(path, count, size=8):
    writer = SafetensorsWriter(path)
    for number in range(count):
        writer.add(record_of(number), tensors_of(number, size))
    return writer


def fill(writer, size):
    """Add records until that fails."""
    for number in itertools.count():
        writer.add(record_of(number), tensors_of(number, size))


def assert_holds(path, count, size=8):
    """The first records, to the bit, and nothing else."""
    expected = {key: x for number in range(count) for key, x in tensors_of(number, size).items()}
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], x) and found[key].dtype == x.dtype for key, x in expected.items())


def records_in(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["records"])


@pytest.mark.parametrize(("count", "size"), [(1, 8), (7, 40_000), (400, 8), (1000, 2)])
def test_what_was_added_is_read_back_by_safetensors(count, size, tmp_path):
    path = tmp_path / "x.safetensors"
    writer = write(path, count, size)
    before = writer.part.stat()
    assert writer.records == [record_of(number) for number in range(count)]
    assert not path.exists()
    writer.finish({"kind": "test"})
    assert_holds(path, count, size)
    assert path.stat().st_ino == before.st_ino, "the data are written once: no copy, no second space"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    data = sum(x.nbytes for number in range(count) for x in tensors_of(number, size).values())
    assert path.stat().st_size <= ROOM + data + 2200 * count


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, 2).finish({})
    writer = write(path, 5)
    assert_holds(path, 2)
    writer.drop()
    assert_holds(path, 2)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    write(path, 5).finish({})
    assert_holds(path, 5)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    link = tmp_path / "x.safetensors"
    link.symlink_to(tmp_path / "big" / "real.safetensors")
    write(link, 2).finish({})
    assert link.is_symlink()
    assert_holds(tmp_path / "big" / "real.safetensors", 2)


@pytest.mark.parametrize("limit", [ROOM + room for room in (0, 50, 100, 1000, 12_345)])
def test_a_full_disk_keeps_what_was_there_before(limit, tmp_path):
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path)
    with largest_file(limit), pytest.raises(OSError, match="too large"):
        fill(writer, 100)
    number = len(writer.records)
    writer.add(record_of(number), tensors_of(number, 100))  # somebody has made room
    writer.finish({})
    assert_holds(path, number + 1, 100)


def test_on_a_small_file_system_it_is_filled_and_finished_without_further_space(tmp_path):
    with small_disk(tmp_path / "disk", 512) as folder:
        path = folder / "x.safetensors"
        writer = SafetensorsWriter(path)
        with pytest.raises(OSError, match="No space left"):
            fill(writer, 1000)
        number = len(writer.records)
        assert number * 24_000 > 256 * 1024, "more than half of the disk is data"
        writer.finish({})
        assert_holds(path, number, 1000)
    with small_disk(tmp_path / "full", 32) as folder:
        with pytest.raises(OSError, match=r"x\.safetensors.*No space left.*make room"):
            SafetensorsWriter(folder / "x.safetensors")
        assert list(folder.iterdir()) == []


def test_two_writers_of_one_file_are_refused(tmp_path):
    first = write(tmp_path / "x.safetensors", 1)
    with pytest.raises(BlockingIOError, match="another process, or another call"):
        SafetensorsWriter(tmp_path / "x.safetensors")
    with pytest.raises(BlockingIOError, match="another process, or another call"):
        recover_recording(tmp_path / "x.safetensors")
    first.finish({})
    assert_holds(tmp_path / "x.safetensors", 1)
    write(tmp_path / "x.safetensors", 2).finish({})
    assert_holds(tmp_path / "x.safetensors", 2)


class Interrupt(BaseException):
    pass


def test_an_interruption_at_any_moment_leaves_whole_records(tmp_path):
    """At every n-th line that the writer runs, as Ctrl-C comes."""
    path = tmp_path / "x.safetensors"

    def interrupt_after(lines):
        left = lines

        def trace(frame, event, argument):
            nonlocal left
            if "calibration/writer" in frame.f_code.co_filename:
                left -= 1
                if left == 0:
                    raise Interrupt
            return trace

        return trace

    outcomes = set()
    for lines in range(1, 120, 2):
        writer = write(path, 1)
        before = sys.gettrace()
        sys.settrace(interrupt_after(lines))
        try:
            writer.add(record_of(1), tensors_of(1))
        except Interrupt:
            pass
        finally:
            sys.settrace(before)
        count = len(writer.records)
        writer.add(record_of(count), tensors_of(count))
        writer.finish({})
        assert_holds(path, count + 1)
        outcomes.add(count)
    assert outcomes == {1, 2}, "before the record, and after it"


def test_a_header_that_safetensors_would_not_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("psa_diffusers.calibration.writer._LARGEST_HEADER", 100_000)
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path)
    with pytest.raises(HeaderFullError):
        fill(writer, 8)
    count = len(writer.records)
    assert count > 30
    writer.finish({})
    assert_holds(path, count)


def test_other_dtypes_are_refused_by_name(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match=r"r0\.q is torch\.int64; a recording holds torch\.float64"):
        writer.add(record_of(0), {"r0.q": torch.zeros(1, 1, 8, dtype=torch.int64)})
    writer.drop()


def kill_a_writer(path, after):
    """Fork a writer of records without end, and kill it."""
    child = os.fork()
    if child == 0:
        fill(SafetensorsWriter(path), 3000)
    try:
        time.sleep(after)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_a_killed_process_has_recorded_is_recovered(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, 2).finish({})
    moments, counts = random.Random(0), []
    for _ in range(8):
        kill_a_writer(path, moments.uniform(0.02, 0.15))
        assert_holds(path, 2)
        lines = path.with_name("x.safetensors.part.jsonl").read_bytes().count(b"\n")
        if not lines:
            continue
        found = recover_recording(path)
        records = records_in(found)
        assert_holds(found, len(records), 3000)
        assert [record["step"] for record in records] == list(range(len(records)))
        counts.append(len(records))
        assert lines - 12 <= len(records) <= lines, "every line but those of tensors that moved"
        found.unlink()
    assert len(counts) > 4
    assert max(counts) > 3
    assert not path.with_name("x.safetensors.part").exists()


def test_recovered_files_take_names_that_are_free(tmp_path):
    path = tmp_path / "x.safetensors"
    for name in ("x.interrupted.safetensors", "x.interrupted2.safetensors"):
        write(path, 3).close()
        assert recover_recording(path) == tmp_path / name
        assert_holds(tmp_path / name, 3)
    with pytest.raises(FileNotFoundError, match=r"no interrupted recording of .*x\.safetensors"):
        recover_recording(path)


@pytest.mark.fuzz
@cases(suite=25, fuzz=5_000)
@given(data=st.data())
def test_whatever_is_left_of_an_interrupted_recording_only_whole_records_are_recovered(data):
    """Bytes lost, changed, doubled or foreign in either file: the first records, to the bit, or a ValueError."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        count = data.draw(st.integers(1, 9) | st.integers(80, 90))  # the header outgrows its room after 70
        write(path, count).close()
        for name in data.draw(st.sets(st.sampled_from(["x.safetensors.part", "x.safetensors.part.jsonl"]), min_size=1)):
            left = path.with_name(name)
            content = bytearray(left.read_bytes())
            for _ in range(data.draw(st.integers(1, 3))):
                start = data.draw(st.integers(ROOM if name.endswith(".part") else 0, max(len(content), 1)))
                size = data.draw(st.sampled_from([0, 1, 7, 300, len(content)]))
                match data.draw(st.sampled_from(["cut", "flip", "remove", "insert", "double"])):
                    case "cut":
                        del content[start:]
                    case "flip" if start < len(content):
                        content[start] ^= data.draw(st.integers(1, 255))
                    case "remove":
                        del content[start : start + size]
                    case "insert":
                        content[start:start] = data.draw(st.binary(max_size=300))
                    case "double":
                        content[start:start] = content[start : start + size]
            left.write_bytes(content)
        try:
            found = recover_recording(path)
        except ValueError:
            return
        records = records_in(found)
        assert records == [record_of(number) for number in range(len(records))]
        assert_holds(found, len(records))


def test_a_line_is_read_as_it_was_written(tmp_path):
    writer = write(tmp_path / "x.safetensors", 3)
    lines = (tmp_path / "x.safetensors.part.jsonl").read_bytes().splitlines()
    assert [encode_line(decode_line(line)) for line in lines] == [line + b"\n" for line in lines]
    for wrong in (b"", b"zz", lines[0][:-1], lines[0][:8], b"00000000 {}", lines[0].replace(b"r0", b"r1", 1)):
        with pytest.raises(ValueError, match=r"checksum|no line|invalid literal"):
            decode_line(wrong)
    writer.drop()
