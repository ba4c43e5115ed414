"""Throw-away copies of the source tree and environments that borrow the big dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    "build",
    "dist",
    ".git",
    ".venv*",
    ".cache",
    ".ci-work",
    "*.so",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)


def call(*command: str | Path, cwd: Path | None = None, ok: bool = True, **env: str) -> str:
    """Output of a command in an environment without this run's Python settings, and without CUDA unless asked for."""
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV", "VIDTOK_BACKEND"}}
    clean["VIDTOK_NO_CUDA"] = "1"  # minutes of nvcc are spent by one test
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**clean, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode == 0) == ok, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


class Venv:
    """An environment that sees this one's torch and transformers, but not its vidtok."""

    def __init__(self, folder: Path, borrow: bool = True, python: str | Path = sys.executable) -> None:
        call(python, "-m", "venv", folder)
        self.python = folder / "bin" / "python"
        if borrow:
            site = Path(call(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
            for old in site.glob("setuptools*"):
                shutil.rmtree(old)
            # A folder named in a .pth file is searched last, and .pth files inside it are not read.
            (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: str | Path, ok: bool = True, **env: str) -> str:
        return call(self.python, "-m", "pip", "-q", *arguments, ok=ok, **env)

    def run(self, code: str, **env: str) -> str:
        return call(self.python, "-c", code, cwd=self.python.parent, **env)
