"""A tiny checkpoint on disk, a clip, and a set of clips with captions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.data.conftest import write_video
from tests.data.retrieval.make import msrvtt, tiny_checkpoint

TINY: dict[str, Any] = {
    "layers": 2,
    "width": 64,
    "heads": 2,
    "kv_heads": 1,
    "vision_layers": 2,
    "vision_width": 32,
    "vision_heads": 2,
    "seed": 0,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


class Said(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 frames of 64 x 96."""
    return write_video(tmp_path_factory.mktemp("clip") / "a clip.mp4", frames=12)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``save_pretrained`` writes it, with a tokenizer and processor settings."""
    from vidtok.cli import load

    folder = tmp_path_factory.mktemp("model") / "tiny"
    loaded = load.random_model(**TINY)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 12544}')
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Places of a retrieval set, of its tokenizer and of a model for it."""
    files = msrvtt(tmp_path_factory.mktemp("set"))
    return {**files, "clip": tiny_checkpoint(files["root"] / "clip", files["tokenizer"])}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run the command line in this process."""
    from vidtok.cli.main import main

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def spawn(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m vidtok`` in a process of its own."""
    command = [sys.executable, "-m", "vidtok", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
