"""Folders that change as a whole, whenever the process that changes them ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vidtok.training import folders
from vidtok.training.folders import recover, whole


def content(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def fill(folder: Path, what: str, names: tuple[str, ...] = ("weights", "config")) -> None:
    with whole(folder) as new:
        for name in names:
            (new / name).write_text(what)


def test_what_was_there_leaves(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    fill(place, "one", ("weights", "only here"))
    fill(place, "two")
    assert content(place) == {"weights": "two", "config": "two"} and os.listdir(tmp_path / "deep") == ["model"]


def test_an_error_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "model"
    fill(place, "one")
    with pytest.raises(RuntimeError), whole(place) as new:
        (new / "weights").write_text("two")
        raise RuntimeError
    assert content(place) == {"weights": "one", "config": "one"} and os.listdir(tmp_path) == ["model"]
    real, calls = os.replace, []

    def interrupted(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(folders.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(place, "two")
    assert content(place) == {"weights": "one", "config": "one"} and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("at", range(6))
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, at: int) -> None:
    place = tmp_path / "model"
    fill(place, "one")
    # Ends without any cleaning up before or after each step that changes what is on disk.
    code = f"""
import os, sys
from vidtok.training import folders
left = {at}
def step(real):
    def call(*arguments, **options):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return real(*arguments, **options)
    return call
os.replace, folders.shutil.rmtree = step(os.replace), step(folders.shutil.rmtree)
with folders.whole({str(place)!r}) as new:
    (new / "weights").write_text("two")
    step(int)()
    (new / "config").write_text("two")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(folders.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment)
    assert done.returncode == 9
    recover(place)
    # The calls: two that clear what earlier kills left, the writing, two renames, and one that clears the old folder.
    assert content(place) == dict.fromkeys(("weights", "config"), "two" if at == 5 else "one")
    fill(place, "three")
    assert content(place) == {"weights": "three", "config": "three"} and os.listdir(tmp_path) == ["model"]


def test_links_stay_links(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "one")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    fill(tmp_path / "model", "two")
    assert (tmp_path / "model").is_symlink() and content(tmp_path / "elsewhere")["weights"] == "two"
