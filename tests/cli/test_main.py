"""Help, version, and how errors end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

import vidtok
from tests.cli.conftest import Said, spawn

Call = Callable[..., Said]


def test_version_and_help(call: Call) -> None:
    assert call("--version") == (0, f"vidtok {vidtok.__version__}\n", "")
    for arguments in ([], ["--help"], ["-h"]):
        said = call(*arguments)
        assert said.code == 0 and all(word in said.out for word in ("run", "demo", "doctor", "fewer visual tokens"))
    said = call("run", "--help")
    for option in ("--model", "--video", "--question", "--visual", "--max-frames", "--fps", "--dtype", "--device"):
        assert option in said.out
    for option in ("--compare", "--seed", "--report", "--max-new-tokens", "--attn"):
        assert option in said.out
    assert call("demo", "--help").code == 0 and call("doctor", "--help").code == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom vidtok.cli.main import main\nmain(['run', '--help'])\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'decord') if m in sys.modules], file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stderr.strip() == "[]"


def test_python_dash_m() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = spawn("--version", env=env)
    assert (done.returncode, done.stdout) == (0, f"vidtok {vidtok.__version__}\n")
    done = spawn("frobnicate", env=env)
    assert done.returncode == 2 and done.stderr == "vidtok: No such command 'frobnicate'.\n"


@pytest.mark.parametrize(
    "error,code,words",
    [
        (ValueError("expected a,\n got b"), 2, "vidtok: expected a, got b"),
        (FileNotFoundError(2, "No such file", "x"), 2, "vidtok: [Errno 2] No such file: 'x'"),
        (ImportError("No module named 'decord'"), 1, "`vidtok doctor` says more"),
        (RuntimeError("out of luck"), 1, "vidtok: RuntimeError: out of luck (--debug shows where)"),
    ],
)
def test_errors_end_in_one_line(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("vidtok.cli.demo.run", fail)
    said = call("demo")
    assert said.code == code and words in said.err and said.err.count("\n") == 1


def test_interrupt(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vidtok.cli.demo.run", stop)
    said = call("demo")
    assert said.code == 130 and "Traceback" not in said.err
