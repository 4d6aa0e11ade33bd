"""The command that calibrates: mistakes are one line, told before a model is loaded."""

import pytest

from psa_diffusers.cli import calibrate as command

GOOD = {"--model": "demo", "--target_error": "0.1", "--path": "made.yaml"}


@pytest.fixture
def loaded(monkeypatch):
    """Models that were loaded; loading one fails, so that nothing runs."""
    names = []

    def open_model(name, args):
        names.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "open_model", open_model)
    return names


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--target_error": "2"}, "target_error must lie in (0, 1], got 2.0"),
        ({"--target_error": "nan"}, "target_error must lie in (0, 1], got nan"),
        ({"--parts": "0"}, "parts must be a whole number from 1, got 0"),
        ({"--max_heads": "-2"}, "max_heads must be a whole number from 1, got -2"),
        ({"--name": ""}, "name must be the name of a preset, got ''"),
        ({"--path": "."}, ". is a folder: give the path of a file in it"),
        ({"--path": "file/made.yaml"}, "no file can be at file/made.yaml"),
        ({"--json": "."}, ". is a folder"),
        ({"--prompt_file": "none.txt"}, "no prompt file at none.txt"),
        ({"--prompt_file": "file"}, "file holds no prompt: write one a line"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_loads(change, says, loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert command.main([word for pair in {**GOOD, **change}.items() for word in pair]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert told.err.startswith("error: ")
    assert told.out == ""
    assert loaded == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interruption_is_one_line(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([word for pair in GOOD.items() for word in pair]) == 130
    assert loaded == ["demo"]
    assert capsys.readouterr().err == "interrupted: the same command goes on with what was measured\n"
    assert list(tmp_path.iterdir()) == []
