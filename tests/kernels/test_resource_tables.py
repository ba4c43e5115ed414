"""What kernels use, as the compilers say: reading it, and comparing it with the checked-in tables."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vidtok.kernels.select import OPERATORS

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"_{name}", str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


cuda_compile = script("cuda_compile")
triton_compile = script("triton_compile")
table = sys.modules["resource_table"]
Row = table.Row

NVCC = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 29 registers, used 0 barriers, 448 bytes cmem[0]
ptxas info    : Compile time = 17.959 ms
ptxas info    : Compiling entry function '_Z3twoPi' for 'sm_80'
ptxas info    : Function properties for _Z6helperv
    0 bytes stack frame, 2 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z3twoPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
"""
NVRTC = """\
nvrtc: warning: Architectures prior to '<compute/sm>_75' are deprecated and may be removed in a future release
ptxas info    : Compiling entry function '_Z3onev' for 'sm_70'
ptxas info    : Function properties for _Z3onev
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers, 448 bytes cmem[0]
"""


def row(
    kernel: str = "one", sm: int = 80, registers: int = 40, spills: int = 0, stack: int = 0, shared: int = 0
) -> Row:
    warps = table.warps_by_registers(sm, registers)
    return Row("op", kernel, sm, registers, spills, stack, shared, warps, "nvcc 13.0.88")


def differences(now: list, before: list) -> list[str]:
    return table.differences(now, before, ["op"], "scripts/cuda_compile")


def test_what_ptxas_says() -> None:
    assert table.parse_ptxas(NVCC) == [("_Z3onev", 29, 16, 8, 0), ("_Z3twoPi", 255, 2, 0, 1024)]
    assert table.parse_ptxas(NVRTC) == [("_Z3onev", 38, 0, 0, 0)]
    assert table.parse_ptxas("") == []


def test_complaints_are_what_is_left() -> None:
    assert cuda_compile.complaints(NVCC) == cuda_compile.complaints(NVRTC) == ""
    said = "a.cu(3): warning #177-D: variable x was declared but never referenced"
    assert cuda_compile.complaints(f"{NVCC}\n{said}\n") == said
    assert "error" in cuda_compile.complaints("a.cu(3): error: expected a ;")


@pytest.mark.parametrize(
    ("demangled", "expected"),
    [
        ("vidtok::cuda::scan_kernel(int*, long)", "vidtok::cuda::scan_kernel"),
        (
            "void vidtok::cuda::f<vidtok::cuda::f16, 8>(vidtok::cuda::f16 const*)",
            "vidtok::cuda::f<vidtok::cuda::f16, 8>",
        ),
        ("void a::f<(a::Mode)1, true>(int (*)(int), float)", "a::f<(a::Mode)1, true>"),
        ("void a::f<float>()", "a::f<float>"),
    ],
)
def test_names_to_ask_nvrtc_for(demangled: str, expected: str) -> None:
    assert cuda_compile.name_expression(demangled) == expected
    assert "vidtok::cuda::" not in cuda_compile.short(demangled)


def test_warps_that_fit() -> None:
    assert [table.warps_by_registers(80, r) for r in (1, 32, 33, 64, 65, 128, 255)] == [64, 64, 48, 32, 28, 16, 8]
    assert table.warps_by_registers(86, 40) == 48 == table.warps_by_registers(89, 32)
    assert table.warps_of_blocks(80, 32, 0, 4) == 64
    assert table.warps_of_blocks(80, 32, 80 * 1024, 4) == 8
    assert table.warps_of_blocks(80, 32, 163 * 1024, 4) == 4
    assert table.warps_of_blocks(86, 32, 163 * 1024, 4) == 0
    assert table.warps_of_blocks(90, 200, 0, 8) == 8
    assert table.warps_of_blocks(86, 16, 0, 1) == 16


def test_an_equal_table_passes(tmp_path: Path) -> None:
    rows = [row(), row("two, three", 90, 255)]
    table.write(tmp_path / "t.csv", rows)
    assert table.read(tmp_path / "t.csv") == sorted(rows)
    assert differences(rows, rows) == []
    assert table.settle(rows, tmp_path / "t.csv", ["op"], ["op"], "scripts/cuda_compile", False) == 0
    assert table.read(tmp_path / "missing.csv") == []


def test_a_regression_fails_with_a_sentence() -> None:
    assert differences([row(registers=48)], [row()]) == []
    (said,) = differences([row(registers=49)], [row()])
    assert said.startswith("op: one on sm_80 needs 49 registers (nvcc 13.0.88), the table has 40 (nvcc 13.0.88);")
    assert said.endswith("run scripts/cuda_compile --write")
    assert "8 bytes of stack memory" in differences([row(stack=8)], [row()])[0]
    assert "16 bytes of shared memory" in differences([row(shared=16)], [row()])[0]
    assert differences([row(), row("new"), row("new", 90)], [row()]) == [
        "op: new on sm_80, sm_90 has no row in the table; run scripts/cuda_compile --write"
    ]
    assert differences([], [row()]) == ["op: one on sm_80 is in the table only; run scripts/cuda_compile --write"]


def test_spills_fail_whatever_the_table_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spilling = [row(spills=4)]
    assert "spills 4 bytes" in differences(spilling, spilling)[0]
    assert table.settle(spilling, tmp_path / "t.csv", ["op"], ["op"], "scripts/cuda_compile", True) == 1
    assert "kernels may not spill" in capsys.readouterr().out


def test_part_of_the_operators_leaves_the_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table.write(path, [row(), row()._replace(op="other"), row()._replace(op="gone")])
    assert table.settle([row(registers=99)], path, ["op"], ["op", "other"], "s", True) == 0
    assert [(r.op, r.registers) for r in table.read(path)] == [("op", 99), ("other", 40)]


@pytest.mark.parametrize(
    ("path", "sms"),
    [(cuda_compile.TABLE, {70, 80, 86, 89, 90}), (triton_compile.TABLE, {80, 86, 89, 90})],
    ids=["cuda", "triton"],
)
def test_the_checked_in_tables(path: Path, sms: set[int]) -> None:
    rows = table.read(path)
    files = {"bipartite" if op.startswith("bipartite") else op for op in OPERATORS}
    assert {r.op for r in rows} == files
    assert all({r.sm for r in rows if r.op == op} == sms for op in files)
    assert [r for r in rows if r.spills or not r.warps or r.registers > 255] == []
    assert len({r.key for r in rows}) == len(rows)


def test_pointers_inside_tuples_are_found() -> None:
    assert triton_compile.pointers(("*fp32", "i32", ("*i32",)), (3,)) == [(3, 0), (3, 2, 0)]
    assert triton_compile.pointers("constexpr", (0,)) == []
