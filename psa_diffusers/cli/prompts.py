"""Prompts out of text: a file with one a line, or what was typed. Bytes that are no text are named, not generated."""

from __future__ import annotations

import unicodedata
from pathlib import Path

__all__ = ["check_text", "read_prompt_file"]

_MARK = "\ufeff"  # the byte order mark, at the start of what some editors save
_SEPARATORS = {"Zl", "Zp"}  # they end a line in some editors and not in others


def read_prompt_file(path: Path) -> list[str]:
    """Return the prompts of a file, one a line. Empty lines and lines that start with # are skipped.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is no UTF-8, holds control characters, or holds no prompt. The message says where.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = _lines(error.object[: error.start].decode("utf-8"))
        kind = "it looks like UTF-16: " if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(
            f"{path}, line {len(before)}, column {len(before[-1]) + 1}: byte 0x{error.object[error.start]:02x} is no "
            f"UTF-8; {kind}save the file as UTF-8"
        ) from error
    lines = [
        # a mark can begin any line: that of a file which was appended to another
        check_text(line.removeprefix(_MARK), f"{path}, line {number}")
        for number, line in enumerate(_lines(text), 1)
    ]
    prompts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


def check_text(text: str, where: str) -> str:
    """Return a text that is text, line ends and tabs included.

    Args:
        text: What was read or typed.
        where: Where it stands, for the message.

    Raises:
        ValueError: If it holds a control character, a byte that is no UTF-8, or a byte order mark.
    """
    for column, letter in enumerate(text, 1):
        category = unicodedata.category(letter)
        if (category in {"Cc", "Cs", *_SEPARATORS} and letter not in "\t\n\r") or letter == _MARK:
            name = "a byte that is no UTF-8" if category == "Cs" else _name(letter)
            raise ValueError(
                f"{where}, column {column}: U+{ord(letter):04X}, {name}, is no part of a prompt; remove it"
            )
    return text


def _lines(text: str) -> list[str]:
    """Lines as an editor counts them; `splitlines` ends some at control characters as well."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _name(letter: str) -> str:
    if letter == "\0":
        return "NUL"
    return unicodedata.name(letter, "a control character").lower()
