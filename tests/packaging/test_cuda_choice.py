"""Which CUDA images setup.py builds, for every machine it may meet."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
ALL = ["80-real", "86-real", "89-real", "90-real", "90-virtual"]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, on a machine with nvcc 13.0 and no GPU."""
    for name in ("VIDTOK_CUDA_ARCHS", "VIDTOK_NO_CUDA", "VIDTOK_SANITIZE", "VIDTOK_NO_EXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    names = runpy.run_path(str(ROOT / "setup.py"))
    scope = names["cuda_images"].__globals__
    scope["find_nvcc"] = lambda: scope["Nvcc"]("/somewhere/nvcc", (13, 0))
    scope["visible_sms"] = list
    return scope


def images(build: dict[str, Any], dev: bool = False) -> list[str]:
    return build["cuda_images"](dev)[1]


def with_gpu(build: dict[str, Any], *sms: int) -> dict[str, Any]:
    build["visible_sms"] = lambda: list(sms)
    return build


def with_nvcc(build: dict[str, Any], *version: int) -> dict[str, Any]:
    build["find_nvcc"] = lambda: build["Nvcc"]("/somewhere/nvcc", version) if version else None
    return build


def test_without_a_gpu_every_sm_is_built(build: dict[str, Any]) -> None:
    assert images(build) == ALL
    assert images(with_nvcc(build, 12, 8)) == ["70-real", *ALL]


@pytest.mark.parametrize(
    ("sms", "expected"),
    [
        ([80], ["80-real"]),
        ([90], ["90-real"]),
        ([86, 90], ["86-real", "90-real"]),
        ([87], ["86-real"]),
        ([100], ["90-virtual"]),
        ([120, 80], ["80-real", "90-virtual"]),
    ],
)
def test_the_visible_gpu_chooses(build: dict[str, Any], sms: list[int], expected: list[str]) -> None:
    assert images(with_gpu(build, *sms)) == expected
    assert images(build, dev=True) == expected


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("80", ["80-real"]),
        ("80;90", ["80-real", "90-real"]),
        ("90, 80", ["80-real", "90-real"]),
        ("90+ptx", ["90-real", "90-virtual"]),
        ("80-virtual", ["80-virtual"]),
        ("80-real;80;80+ptx", ["80-real", "80-virtual"]),
        ("none", []),
    ],
)
def test_asked_for(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, archs: str, expected: list[str]) -> None:
    monkeypatch.setenv("VIDTOK_CUDA_ARCHS", archs)
    with_gpu(build, 90)
    assert images(build) == images(build, dev=True) == expected


@pytest.mark.parametrize("archs", ["75", "native", "80;", ";", "80;x", "sm_80", "90a", "80+", "8.0", "120"])
def test_what_no_image_is_called(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, archs: str) -> None:
    monkeypatch.setenv("VIDTOK_CUDA_ARCHS", archs)
    if archs == "80;":
        assert images(build) == ["80-real"]
        return
    with pytest.raises(SystemExit, match=r"expected VIDTOK_CUDA_ARCHS of none or of 70, 80, .* got '.*'$"):
        images(build)


def test_sm70_takes_a_cuda_12_toolkit(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert images(with_gpu(build, 70)) == []
    assert "nvcc 13.0 cannot compile for sm_70" in capsys.readouterr().out
    assert images(with_nvcc(build, 12, 9)) == ["70-real"]
    monkeypatch.setenv("VIDTOK_CUDA_ARCHS", "70;80")
    assert images(build) == ["70-real", "80-real"]
    with pytest.raises(SystemExit, match=r"nvcc 13\.1 cannot compile for sm_70: a CUDA 12 toolkit can"):
        images(with_nvcc(build, 13, 1))


def test_what_leaves_the_cpu_part(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert images(build, dev=True) == []
    assert "VIDTOK_CUDA_ARCHS=80 adds CUDA" in capsys.readouterr().out
    assert images(with_gpu(build, 61)) == []
    assert "expected a GPU of sm_70 or sm_80 or newer, got sm_61" in capsys.readouterr().out
    assert images(with_gpu(with_nvcc(build, 11, 8), 80)) == []
    assert "expected nvcc 12.0 or newer, got nvcc 11.8" in capsys.readouterr().out
    monkeypatch.setenv("VIDTOK_NO_CUDA", "1")
    assert images(with_nvcc(build, 13, 0)) == []


def test_without_nvcc(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert images(with_nvcc(build)) == []
    assert capsys.readouterr().out == "vidtok: no nvcc: the CPU part is built\n"
    monkeypatch.setenv("VIDTOK_CUDA_ARCHS", "80")
    with pytest.raises(SystemExit, match="expected nvcc for VIDTOK_CUDA_ARCHS=80"):
        images(build)


def test_compilers_fit_into_memory(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert build["jobs"](1e-6) >= build["jobs"](2.0) >= 1
    assert build["jobs"](1e6) == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build["jobs"](1e6) == 7


def test_nvcc_must_run(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    find = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]
    nvcc = tmp_path / "nvcc"
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert find() is None
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    assert find() is None
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    assert find() == (str(nvcc), (12, 4))
