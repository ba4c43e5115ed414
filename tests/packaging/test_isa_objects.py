"""Code compiled for an instruction set cannot leak into the baseline.

An inline function or template that two translation units share is kept once by the linker, and the kept copy may be
the one that uses AVX-512; a namespace-scope object may run such code before dispatch. So the objects under
csrc/cpu/simd share no weak symbol with any other object and have no start-up code.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}-release-dev"

pytestmark = pytest.mark.skipif(
    not BUILD.is_dir() or not shutil.which("nm") or platform.machine() != "x86_64",
    reason="needs the objects of an in-place x86-64 build, and nm",
)


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type, name) of every defined symbol of an object."""
    out = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return [(line.split()[1], line.split()[2]) for line in out.splitlines() if len(line.split()) == 3]


def objects() -> tuple[list[Path], list[Path]]:
    every = sorted(BUILD.rglob("*.o"))
    simd = [p for p in every if p.parent.name == "simd" and not p.name.startswith("scalar")]
    return simd, [p for p in every if p not in simd]


def test_no_shared_weak_symbols() -> None:
    simd, baseline = objects()
    assert simd and baseline
    owner: dict[str, str] = {}
    shared = []
    for path in [*baseline, *simd]:
        isa = path.name.split(".")[0].split("_")[0] if path in simd else "baseline"
        for kind, name in symbols(path):
            if kind in "WVu" and owner.setdefault(name, isa) != isa:
                shared.append(f"{name} in {path.name} and in {owner[name]}")
    assert shared == []


def test_no_start_up_code() -> None:
    for path in objects()[0]:
        out = subprocess.run(["readelf", "-SW", str(path)], capture_output=True, text=True, check=True).stdout
        assert ".init_array" not in out and ".ctors" not in out, path.name


def test_baseline_uses_no_vector_extension() -> None:
    for path in objects()[1]:
        out = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True).stdout
        wide = [line for line in out.splitlines() if "%ymm" in line or "%zmm" in line]
        assert wide == [], f"{path.name}: {wide[:3]}"
