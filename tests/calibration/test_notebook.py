"""The measurements of a calibration: gone on with if every line fits, and else named, set aside and never used."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from small_disk import largest_file

from psa_diffusers.calibration.ladder import DENSITIES
from psa_diffusers.calibration.notebook import Notebook

KEY = "0123456789abcdef"


def entry_of(prompt=0, step=1, layer=0, **changes):
    rungs = [[0.5 - density / 2, density] for density in DENSITIES]
    place = {"prompt": prompt, "denoiser": "transformer", "step": step, "layer": layer, "forward": 0}
    return {**place, "num_steps": 4, "rungs": rungs, **changes}


def open_at(path, key=KEY):
    return Notebook(path, key, 3, lambda step, num_steps: 1 <= step < num_steps)


def write(path):
    """One prompt that is finished, one that is begun."""
    with open_at(path) as notebook:
        for layer in range(2):
            notebook.add(entry_of(layer=layer))
        notebook.finish(0)
        notebook.add(entry_of(prompt=1))
    return [*notebook.entries]


def test_a_later_call_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    entries = write(path)
    content = path.read_bytes()
    with open_at(path) as notebook:
        assert notebook.entries == entries
        assert notebook.finished == {0}
        assert notebook.has(entry_of(prompt=1))
        assert not notebook.has(entry_of(prompt=1, layer=1))
        notebook.add(entry_of(prompt=1, layer=1))
    assert path.read_bytes() == content + path.read_bytes().splitlines(keepends=True)[-1]
    assert [each.name for each in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("torn", [b"{", b'{"prompt": 1, "st', b"\0\0\0\0", b'{"finished": 1'])
def test_a_last_line_that_was_cut_off_is_left_out(torn, tmp_path):
    path = tmp_path / "m.jsonl"
    entries = write(path)
    content = path.read_bytes()
    path.write_bytes(content + torn)
    with open_at(path) as notebook:
        assert notebook.entries == entries
    assert path.read_bytes() == content


def line(**changes):
    return json.dumps(entry_of(**{"prompt": 2, **changes}))


RUNGS = entry_of()["rungs"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("[1, 2]", "expected an object, got list"),
        ("no json", "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ('{"key": "other"}', "expected denoiser, forward"),
        ('{"finished": 7, "calls": 0}', "finished: expected a prompt"),
        ('{"finished": 0, "calls": 2}', "finished: expected a prompt"),
        ('{"finished": 1, "calls": 5}', "calls of prompt 1 are missing"),
        ('{"finished": 1}', "calls of prompt 1 are missing"),
        (line(prompt=9), "prompt: expected one that was not finished, got 9"),
        (line(prompt=0, layer=3), "prompt: expected one that was not finished, got 0"),
        (line(prompt=1), "measured before"),
        (line(layer="1"), "layer: expected a number"),
        (line(layer=True), "layer: expected a number"),
        (line(forward=-1), "forward: expected a number"),
        (line(denoiser=3), "denoiser: expected a name"),
        (line(num_steps=9), "num_steps: expected 4, got 9"),
        (line(step=0), "step: 0 of 4 is none that is measured"),
        (line(extra=1), "got denoiser, extra"),
        (line(rungs=[]), "rungs: expected 10 pairs"),
        (line(rungs="0123456789"), "rungs: expected 10 pairs"),
        (line(rungs=[[0.1, 2.0], *RUNGS[1:]]), "rungs: expected 10 pairs"),
        (line(rungs=[[0.1], *RUNGS[1:]]), "rungs: expected 10 pairs"),
        (line(rungs=[[10**400, 0.1], *RUNGS[1:]]), "rungs: expected 10 pairs"),
        (line(rungs=[[float("nan"), 0.1], *RUNGS[1:]]), "NaN is no finite number"),
        (line(rungs=[[1e999, 0.1], *RUNGS[1:]]), "Infinity is no finite number"),
    ],
)
def test_a_line_that_does_not_fit_sets_the_file_aside(wrong, says, tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    write(path)
    lines = path.read_text().splitlines()
    content = "\n".join([*lines, wrong, line(prompt=2, layer=5)]) + "\n"
    path.write_text(content)
    with open_at(path) as notebook:
        assert (notebook.entries, notebook.finished) == ([], set())
        assert not notebook.has(entry_of())
    assert (tmp_path / "m.old.jsonl").read_text() == content
    assert path.read_text() == json.dumps({"key": KEY}) + "\n"
    [told] = caplog.messages
    assert f"line {len(lines) + 1}: " in told
    assert says in told
    assert "m.old.jsonl" in told


@pytest.mark.parametrize("first", ['{"key": "other"}', '{"key": 3}', "{}", "[]", line(), "a: yaml", "\ufeff{}", "\0"])
def test_a_file_of_something_else_is_set_aside(first, tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    for number, name in enumerate(["m.old.jsonl", "m.old2.jsonl"], 1):
        path.write_text(first + "\n", encoding="utf-8")
        with open_at(path) as notebook:
            assert notebook.entries == []
        assert (tmp_path / name).read_text(encoding="utf-8") == first + "\n"
        assert len(caplog.messages) == number
    assert "does not fit, line 1" in caplog.messages[0]


def test_a_file_that_is_no_text_is_set_aside(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n" * 3)
    with open_at(path) as notebook:
        assert notebook.entries == []
    assert (tmp_path / "m.old.jsonl").read_bytes() == b"\xff\xfe\x00\n" * 3


def test_two_calls_do_not_write_one_file(tmp_path):
    path = tmp_path / "m.jsonl"
    with open_at(path), pytest.raises(BlockingIOError, match="another process, or another call"):
        open_at(path)
    with open_at(path):
        pass


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    entries = write(path)
    content = path.read_bytes()
    with open_at(path) as notebook:
        with largest_file(len(content) + 100), pytest.raises(OSError, match="too large"):
            notebook.add(entry_of(prompt=1, layer=1))
        assert notebook.entries == entries
        assert path.read_bytes() == content
        notebook.add(entry_of(prompt=1, layer=1))
    with open_at(path) as notebook:
        assert notebook.entries == [*entries, entry_of(prompt=1, layer=1)]


@pytest.mark.fuzz
@cases(suite=60, fuzz=20_000)
@given(data=st.data())
def test_whatever_stands_in_the_file_all_of_it_fits_or_nothing_is_used(data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        entries = write(path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(content)))
            match data.draw(st.sampled_from(["cut", "digit", "flip", "insert", "lines"])):
                case "cut":
                    del content[start:]
                case "digit":
                    content[start : start + 1] = data.draw(st.sampled_from([b"9", b"-", b".", b"e", b'"', b"0"]))
                case "flip" if start < len(content):
                    content[start] ^= data.draw(st.integers(1, 255))
                case "insert":
                    content[start:start] = data.draw(st.binary(max_size=30) | st.sampled_from([b"\n", b"NaN", b"null"]))
                case "lines":
                    lines = bytes(content).splitlines(keepends=True)
                    content = bytearray(b"".join(data.draw(st.lists(st.sampled_from(lines or [b""]), max_size=6))))
        path.write_bytes(content)
        aside = path.with_name("m.old.jsonl")
        with open_at(path) as notebook:
            if aside.exists():
                assert (notebook.entries, notebook.finished) == ([], set())
                assert aside.read_bytes() == content
                return
            # what is taken over is well-formed whatever it says, and the places are those that were written
            places = [(e["prompt"], e["denoiser"], e["step"], e["layer"], e["forward"]) for e in notebook.entries]
            assert len(set(places)) == len(places) <= len(entries)
            assert all(0 <= e <= 1e9 and 0 < d <= 1 for entry in notebook.entries for e, d in entry["rungs"])
            for prompt in notebook.finished:
                assert 0 <= prompt < 3
