"""What goes wrong on the command line: one sentence, exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, in a sentence that says what was expected and what came."""


def one_line(text: object, limit: int = 400) -> str:
    """``text`` in one printable line."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def printable(text: str) -> str:
    """Text from a model or a file without control characters, so that it cannot drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
