"""The GPU benchmark's program, without a GPU: its sides agree, its rows are whole, its clock is not trusted."""

from __future__ import annotations

import pytest
import torch

from bench import gate
from bench.gpu import __main__ as program
from bench.gpu.limits import GpuLimits
from bench.gpu.suites import SUITES
from bench.gpu.timing import HostTimer
from bench.row import read

CPU = torch.device("cpu")
CASES = [
    pytest.param(case, id=f"{case}, {dtype}")
    for build in SUITES.values()
    for dtype in (torch.bfloat16, torch.float16)
    for case in build(CPU, dtype, True)
]


@pytest.mark.parametrize("case", CASES)
def test_sides_agree_with_the_reference(case):
    inputs = case.make(0)
    wanted = gate.expected(case, inputs)
    for provider in (case.ours, *case.others):
        gate.check(case, provider, inputs, wanted)
    assert all(b > 0 and f >= 0 for b, f in case.passes())


def test_the_program_writes_whole_rows(tmp_path):
    out = tmp_path / "gpu.csv"
    lines: list[str] = []
    assert program.main(["--tiny", "--no-compile", "--out", str(out), "bipartite_merge", "moves"], lines.append) == 0
    rows = read(out)
    times = [r for r in rows if r.metric == "time"]
    assert {r.cache for r in times} == {"graph", "call"} and {r.role for r in times} == {"vidtok", "eager"}
    assert {r.label for r in rows if r.metric == "count"} == {"kernels launched", "waits for the GPU"}
    assert all(r.limit and r.over_limit and r.speedup for r in times)
    assert "wrote" in lines[-2]


def test_a_real_run_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        return
    assert program.main([]) == 2
    assert "expected a GPU, got none" in capsys.readouterr().err
    assert program.main(["nothing", "--tiny"]) == 2


def test_the_limit_is_the_largest_of_three():
    limits = GpuLimits(HostTimer(), CPU, tiny=True)
    limits.copy_rate, limits.launch = 1e9, 1e-6
    limits.flop_rates = {torch.float16: 1e12}
    assert limits.seconds(((1e6, 1e6),), torch.float16, 1) == pytest.approx(1e-3)
    assert limits.kind(((1e6, 1e6),), torch.float16, 1) == "bytes"
    assert limits.seconds(((1e6, 4e9),), torch.float16, 1) == pytest.approx(4e-3)
    assert limits.kind(((1e6, 4e9),), torch.float16, 1) == "flops"
    assert limits.seconds(((1e3, 1e3),), torch.float16, 7) == pytest.approx(7e-6)
    assert limits.kind(((1e3, 1e3),), torch.float16, 7) == "launches"
