"""A throw-away source tree and environment for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.packaging.envs import LEFT_OUT, ROOT, Venv


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree without build products."""
    return Path(shutil.copytree(ROOT, tmp_path / "vidtok-src", ignore=LEFT_OUT))


@pytest.fixture
def venv(tmp_path: Path) -> Venv:
    return Venv(tmp_path / "venv")
