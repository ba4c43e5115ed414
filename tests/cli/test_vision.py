"""``vidtok run --vision``: patches that merge inside the vision tower."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Said

from vidtok.cli.page import number


def arguments(checkpoint: Path, clip: Path, *more: object) -> list[object]:
    fixed = ["run", "--model", checkpoint, "--video", clip, "--question", "What is seen?", "--dtype", "float32"]
    return [*fixed, "--max-frames", 8, "--max-new-tokens", 4, "--visual", "uniform:ratio=0.5", *more]


def test_rows_of_the_tower(call: Callable[..., Said], checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    said = call(*arguments(checkpoint, clip, "--vision", "tome:r=1", "--compare", "--report", page))
    assert said.code == 0, said.err
    assert "vision=tome:r=1 visual=uniform:ratio=0.5" in said.out
    before, after = map(int, re.search(r"Patches in the tower's last MLP +(\d+) +(\d+)", said.out).groups())
    # 8 frames of 64 x 96 are 4 x 4 x 6 patches.
    assert before == 96 and 0 < after < before
    assert re.search(r"Operations in the tower +\S+ GFLOPs +\S+ GFLOPs", said.out)
    assert re.search(r"Visual tokens +24 +12", said.out)
    html = page.read_text()
    assert "vision=tome:r=1" in html and "Operations in the tower" in html


def test_without_it_nothing_is_said(call: Callable[..., Said], checkpoint: Path, clip: Path) -> None:
    said = call(*arguments(checkpoint, clip))
    assert said.code == 0, said.err
    assert "vision=" not in said.out and "in the tower" not in said.out


def test_bad_specs_are_one_sentence(call: Callable[..., Said], checkpoint: Path, clip: Path) -> None:
    for spec, words in (("tome:r=-1", "-1"), ("tome:q=2", "'q'|q=2"), ("nothing:r=2", "nothing"), ("tome", "r, ratio")):
        said = call(*arguments(checkpoint, clip, "--vision", spec))
        assert said.code == 2 and re.search(words, said.err), said.err
        assert said.err.count("\n") == 1 and "Traceback" not in said.err


def test_operations_as_people_read_them() -> None:
    assert number(1.234e9, "FLOPs") == "1.23 GFLOPs"
    assert number(2.5e12, "FLOPs") == "2.50 TFLOPs"
