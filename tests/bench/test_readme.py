"""The README's table says what the committed CSV says."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import plots, readme
from bench.row import ROOT, Row, write

TIME = Row("time", "µs", "op", "8×4", "cold", "vidtok", "op", 1.0, 2.0, 3.0, 9, 1.5, "bytes", 1.33, 1.0, 8.0, 0.0)
SHARED = {
    "threads": 2,
    "isa": "avx2",
    "machine": "a machine",
    "versions": "vidtok 1",
    "commit": "abc",
    "timestamp": "2030",
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV of one missed target, in a tree of its own."""
    path = tmp_path / "bench" / "results" / "cpu-x.csv"
    rows = [
        Row("rate", "GB/s", "limit", "copy", "", "limit", "copy", 40.0, 40.0, 40.0, 5),
        replace(TIME, target="≤ 1.2", reached="no: 1.33 against ≤ 1.2"),
        replace(TIME, role="eager", label="plain", p50=20.0, speedup=10.0),
        replace(TIME, role="careful", label="good", p50=4.0, speedup=2.0),
        replace(TIME, role="faiss", label="faiss", p50=3.0, speedup=1.5),
        Row(
            "overhead", "µs", "call", "one output", "", "vidtok", "op", 4.0, 4.1, 4.2, 9, target="≤ 5 µs", reached="yes"
        ),
        Row("memory", "MiB", "op", "9×9", "", "vidtok", "extra", 7.0, 7.0, 7.0, 1, reached="yes"),
    ]
    write([replace(r, **SHARED) for r in rows], path)
    (tmp_path / "notes.json").write_text(json.dumps({"op": "too general", "op 8×": "Memory latency."}))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "NOTES", tmp_path / "notes.json")
    return path


def test_table_of_one_case(table: Path) -> None:
    block = readme.render(table)
    line = next(text for text in block.splitlines() if "8×4" in text)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    reached = "no: 1.33 against ≤ 1.2. Memory latency."
    assert cells == ["`op`", "8×4", "2 µs", "1.33", "10×", "", "1.5× faiss", "≤ 1.2", reached]
    assert "| one output (`op`) | 4.00 µs | ≤ 5 µs | yes |" in block
    assert "| `op` | 7 MiB | yes |" in block
    assert "40 GB/s (copy)" in block


def test_only_the_block_is_replaced() -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.filled(text, "new\n") == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter\n"
    with pytest.raises(ValueError, match="expected one"):
        readme.filled("no markers", "new\n")


def test_readme_is_up_to_date() -> None:
    path = readme.latest()
    text = (ROOT / "README.md").read_text()
    if path is None:
        assert readme.filled(text, "") == text
    else:
        assert readme.filled(text, readme.render(path)) == text


def test_pictures_read_only_the_csv(table: Path) -> None:
    made = plots.draw(table)
    assert [p.name for p in made] == ["cpu-x-limit.png", "cpu-x-speedup.png"]
    assert all(p.stat().st_size > 5000 for p in made)


@pytest.mark.parametrize("part", ["accuracy.results", "retrieval"])
def test_readme_says_what_was_measured_here(part: str) -> None:
    module = importlib.import_module(f"bench.{part}")
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text, module.block(), module.MARKS) == text
