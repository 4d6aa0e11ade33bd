"""Prompts out of text: what editors save is read, and what is no text is named with its place."""

import pytest

from psa_diffusers.cli.prompts import check_text, read_prompt_file


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        pytest.param("\ufeffa fox\n# not this\n\n  a café  \n".encode(), ["a fox", "a café"], id="mark"),
        pytest.param("\ufeff# mine\r\na fox\r\n".encode(), ["a fox"], id="mark-before-a-comment"),
        pytest.param("a fox\n\ufeffa cat\n\ufeff\n".encode(), ["a fox", "a cat"], id="files-put-together"),
        pytest.param(b"a fox\ra cat", ["a fox", "a cat"], id="old-line-ends"),
        pytest.param("a fox\tin snow\n👩‍🚀 floats\n".encode(), ["a fox\tin snow", "👩‍🚀 floats"], id="tab-and-joiner"),
    ],
)
def test_what_editors_save_is_read(content, prompts, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompt_file(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"a fox\na c\0t\n", r"line 2, column 4: U\+0000, NUL", id="nul"),
        pytest.param(b"\xef\xbb\xbfa fox\r\n\r\nred \x1b[1m\n", r"line 3, column 5: U\+001B", id="escape"),
        pytest.param(b"a\x0cb", r"line 1, column 2: U\+000C", id="form-feed"),
        pytest.param("a\x85b".encode(), r"line 1, column 2: U\+0085", id="next-line"),
        pytest.param("a fox\u2028a cat".encode(), r"line 1, column 6: U\+2028, line separator", id="separator"),
        pytest.param("a fox\nthe \ufeffcat".encode(), r"line 2, column 5: U\+FEFF", id="mark-inside"),
        pytest.param("ä fox\nün caf".encode() + b"\xe9", r"line 2, column 7: byte 0xe9 is no UTF-8", id="latin-1"),
        pytest.param(b"\xef\xbb\xbfab\xff", r"line 1, column 3: byte 0xff", id="after-a-mark"),
        pytest.param("a fox".encode("utf-16"), r"line 1, column 1: byte 0xff.*UTF-16", id="utf-16"),
        pytest.param(b"\xef\xbb\xbf# nothing\n", "holds no prompt", id="empty"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(content, told, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompts\.txt.*{told}"):
        read_prompt_file(tmp_path / "prompts.txt")


def test_what_is_typed_may_have_lines_but_no_stray_bytes():
    assert check_text("two\nlines", "the prompt") == "two\nlines"
    with pytest.raises(ValueError, match=r"the prompt, column 4: U\+DCE9, a byte that is no UTF-8"):
        check_text(b"caf\xe9".decode("utf-8", "surrogateescape"), "the prompt")
