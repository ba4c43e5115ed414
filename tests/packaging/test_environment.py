"""docs/environment.md names exactly the VIDTOK_* names that the code uses."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BINARY = {".so", ".pyc", ".csv", ".png", ".svg"}
NAME = re.compile(r"\bVIDTOK_[A-Z0-9_]*[A-Z0-9]\b")
# Include guards and macros of the C++ sources are not settings.
CPP_LOCAL = re.compile(r"#\s*(?:define|undef)\s+(VIDTOK_\w+)|#\s*ifndef\s+(VIDTOK_\w+_H_?)\b")


def used() -> set[str]:
    names: set[str] = set()
    local: set[str] = set()
    files = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "Makefile", ROOT / ".ci/run"]
    for folder in ("python", "csrc", "scripts", "bench", "examples"):
        files += [
            p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in {".so", ".pyc", ".csv", ".png"}
        ]
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        names |= set(NAME.findall(text))
        if file.suffix in {".h", ".cpp", ".inl"}:
            local |= {a or b for a, b in CPP_LOCAL.findall(text)}
    return names - local


def documented() -> set[str]:
    text = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    return {name for line in text.splitlines() if line.startswith("| `") for name in NAME.findall(line.split("|")[1])}


def test_table_is_complete() -> None:
    assert used() - documented() == set()


def test_table_has_nothing_else() -> None:
    # The instruction set is read by the extension, which may spell it as one string.
    assert documented() - used() == set()
