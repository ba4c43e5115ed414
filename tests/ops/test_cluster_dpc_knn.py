"""cluster_dpc_knn: the compiled kernels against the reference, exactly where inputs are exact, else within the bound.

The bound: a dot product of C channels is summed in blocks of 256, so a squared distance errs by at most
(260 + C/256)·2⁻²⁴ of (‖xᵢ‖ + ‖xⱼ‖)², which is at most 2²² units.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import DTYPES, Make
from tests.guard import guarded, poisoned_allocation
from vidtok import ops
from vidtok.kernels.native import cluster_dpc_knn as native
from vidtok.kernels.reference import cluster_dpc_knn as reference
from vidtok.kernels.select import use_backend

ROOT = Path(__file__).parents[2]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Distances kept whole, and computed again block by block with blocks of 64.
WORKSPACES = {"kept": 64 << 20, "swept": 1 << 16}


@pytest.fixture(params=WORKSPACES)
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "WORKSPACE", WORKSPACES[request.param])
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def agree(x: Tensor, num_clusters, k: int, cu_seqlens: Tensor | None = None):
    got = ops.cluster_dpc_knn(x, num_clusters, k=k, cu_seqlens=cu_seqlens)
    with use_backend("reference"):
        expected = ops.cluster_dpc_knn(x, num_clusters, k=k, cu_seqlens=cu_seqlens)
    assert torch.equal(got.center, expected.center)
    assert torch.equal(got.assignment, expected.assignment)
    return got


def check_within_bound(x: Tensor, k: int, assignment: Tensor, center: Tensor) -> None:
    """Every decision on one segment is one that distances within the bound can give."""
    n, c = x.shape
    units, q = reference.squared_distance_units(x.double())
    error = 2.0**22 * (260 + c / 256) * 2.0**-24 + 1
    k = min(k, n)
    density = torch.exp(-units.sort(1).values[:, :k].mean(1) * q)
    slack = density * math.expm1(error * q) + 2.0**-20
    low, high = density - slack, density + slack
    surely = low[None, :] > high[:, None]
    maybe = high[None, :] >= low[:, None]
    maybe.fill_diagonal_(False)
    top = units.max() + error
    farthest = torch.where(surely, units + error, torch.inf).amin(1).clamp(max=float(top))
    nearest = torch.where(maybe, units - error, torch.inf).amin(1).clamp(0, float(top))
    best, worst = high * torch.sqrt(farthest * q), low.clamp(min=0) * torch.sqrt(nearest * q)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[center] = True
    assert int(chosen.sum()) == center.numel()
    assert (best[center[:-1]] >= worst[center[1:]]).all()
    if center.numel() < n:
        assert worst[~chosen].max() <= best[center].min()
    assert torch.equal(assignment[center], torch.arange(center.numel()))
    taken = units[torch.arange(n), center[assignment]]
    others = ~chosen
    assert (taken[others] <= units[others][:, center].amin(1) + 2 * error).all()


@by_dtype
@pytest.mark.parametrize(
    "n,c,k,clusters",
    [
        (1, 3, 7, 1),
        (2, 1, 1, 2),
        (15, 8, 7, 4),
        (16, 16, 8, 16),
        (17, 40, 9, 5),
        (63, 257, 3, 31),
        (196, 300, 7, 98),
        (260, 64, 33, 17),
        (333, 530, 7, 333),
        (130, 4, 1000, 60),
        (70, 5, 7, 0),
    ],
)
def test_same_decisions_on_exact_inputs(n, c, k, clusters, dtype, isa, workspace):
    x = Make(dtype, n).exact(n, c)
    if n > 10:
        x[5], x[n - 1], x[n // 2] = x[9], x[0], 0
    agree(x, clusters, k)


@by_dtype
def test_many_segments_of_different_sizes(dtype, isa, workspace):
    sizes = [0, 5, 200, 1, 33, 0, 64, 100, 16, 7, 300, 2, 0]
    x = Make(dtype, 1).exact(sum(sizes), 70)
    wanted = [n if n < 8 else n // 2 for n in sizes]
    wanted[4] = 0
    got = agree(x, torch.tensor(wanted), 7, Make(dtype).offsets(*sizes))
    start = sum(sizes[:4])
    assert (got.assignment[start : start + 33] == -1).all()


@by_dtype
def test_duplicate_frames_tie_and_the_index_decides(dtype, isa, workspace):
    frame = Make(dtype, 3).normal(40, 123)
    x = frame.repeat(6, 1)
    got = agree(frame.repeat(6, 1)[:40], 20, 7)
    got = ops.cluster_dpc_knn(x, 40, k=6)
    # Six copies of every token lie at distance 0: each density is 1, so the first copies win and gather the others.
    assert torch.equal(got.center.sort().values, torch.arange(40))
    place = torch.empty(40, dtype=torch.int64)
    place[got.center] = torch.arange(40)
    assert torch.equal(got.assignment, place.repeat(6))


def test_equal_tokens_give_equal_distances_anywhere_in_a_tile(isa, workspace):
    x = torch.randn(1, 391, generator=torch.Generator().manual_seed(0)).repeat(203, 1)
    got = ops.cluster_dpc_knn(x, 50, k=7)
    assert torch.equal(got.center, torch.arange(50))
    expected = torch.zeros(203, dtype=torch.int64)
    expected[:50] = torch.arange(50)
    assert torch.equal(got.assignment, expected)


@by_dtype
def test_rows_that_are_not_finite_count_as_farthest(dtype, isa, workspace):
    x = Make(dtype, 4).exact(90, 33)
    x[3], x[7, 0], x[8, 32], x[80, 5], x[81] = 0, torch.nan, torch.inf, -torch.inf, torch.nan
    agree(x, 45, 7)
    x[:] = torch.nan
    got = agree(x, 3, 7)
    assert got.center.tolist() == [0, 1, 2]


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 3e-5, 1e10, 1e19, 3e38])
def test_extreme_magnitudes(scale, isa, workspace):
    x = Make(torch.float32, 5).exact(50, 20) * 256 * 2.0 ** round(math.log2(scale) - 3)
    with use_backend("reference"):
        expected = ops.cluster_dpc_knn(x, 20, k=3)
    got = ops.cluster_dpc_knn(x, 20, k=3)
    assert torch.equal(got.center, expected.center) and torch.equal(got.assignment, expected.assignment)


@by_dtype
@pytest.mark.parametrize("n,c,k", [(50, 64, 7), (196, 1024, 7), (300, 777, 20), (210, 3584, 7)])
def test_random_decisions_lie_within_the_bound(n, c, k, dtype, isa, workspace):
    base = Make(dtype, n).normal(n // 3, c)
    x = torch.cat([base, base + 0.3 * Make(dtype, 1).normal(n // 3, c), Make(dtype, 2).normal(n - n // 3 * 2, c)])
    got = ops.cluster_dpc_knn(x, n // 2, k=k)
    check_within_bound(x, k, *got)


def test_the_bound_catches_wrong_decisions():
    x = Make(torch.float32).normal(60, 64)
    assignment, center = ops.cluster_dpc_knn(x, 30, k=7)
    check_within_bound(x, 7, assignment, center)
    swapped = center.clone()
    swapped[0], swapped[29] = center[29], center[0]
    with pytest.raises(AssertionError):
        check_within_bound(x, 7, assignment, swapped)
    moved = assignment.clone()
    token = next(i for i in range(60) if i not in center.tolist())
    far = (x[center] - x[token]).norm(dim=1).argmax()
    moved[token] = far
    with pytest.raises(AssertionError):
        check_within_bound(x, 7, moved, center)


@by_dtype
def test_bits_do_not_depend_on_threads_or_companions(dtype, isa, workspace, threads):
    sizes = [110, 37, 250, 64, 1]
    x = Make(dtype, 6).normal(sum(sizes), 520)
    cu = Make(dtype).offsets(*sizes)
    wanted = [max(1, n // 2) for n in sizes]
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(ops.cluster_dpc_knn(x, wanted, k=7, cu_seqlens=cu))
    for other in results[1:]:
        assert torch.equal(results[0].assignment, other.assignment) and torch.equal(results[0].center, other.center)
    start, first = 0, 0
    for n, w in zip(sizes, wanted):
        alone = ops.cluster_dpc_knn(x[start : start + n], w, k=7)
        assert torch.equal(alone.assignment, results[0].assignment[start : start + n])
        assert torch.equal(alone.center + start, results[0].center[first : first + w])
        start, first = start + n, first + w


def test_kept_and_swept_distances_are_the_same(isa, monkeypatch):
    x = Make(torch.float32, 7).normal(700, 600)
    kept = ops.cluster_dpc_knn(x, 350, k=7)
    for size in (1 << 16, 1 << 19, 1 << 20):
        monkeypatch.setattr(native, "WORKSPACE", size)
        swept = ops.cluster_dpc_knn(x, 350, k=7)
        assert torch.equal(kept.center, swept.center) and torch.equal(kept.assignment, swept.assignment)


@pytest.mark.parametrize("at", ["end", "begin"])
@by_dtype
def test_stays_inside_its_buffers(at, dtype, isa, workspace):
    make = Make(dtype, 8)
    for n, c in ((1, 1), (17, 31), (100, 273)):
        x = guarded(make.exact(n, c), at)
        cu = guarded(make.offsets(n // 3, n - n // 3), at)
        before = x.clone()
        with poisoned_allocation(at):
            agree(x, [min(1, n // 3), (n - n // 3) // 2 + 1], 7, cu)
        assert torch.equal(x, before)


@by_dtype
def test_rows_apart(dtype, isa, workspace):
    wide = Make(dtype, 9).exact(60, 200)
    agree(wide[:, 20:90], 30, 5)
    agree(wide[::2], 11, 5)
    agree(wide[:, ::2], 30, 5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arguments(data, isa, workspace):
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    wanted = [data.draw(st.integers(0, n)) for n in sizes]
    c, k, seed = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 50)), data.draw(st.integers(0, 9))
    make = Make(data.draw(st.sampled_from(DTYPES)), seed)
    agree(make.exact(sum(sizes), c, levels=data.draw(st.integers(0, 5))), wanted, k, make.offsets(*sizes))


@pytest.mark.parametrize("wanted", [-1, 6, [2, 2], [6]])
def test_refuses_counts_outside_a_segment(wanted, isa):
    with pytest.raises(ValueError, match="expected num_clusters"):
        ops.cluster_dpc_knn(torch.zeros(5, 4), wanted, k=3)


MEASURE = """
import sys, torch
from vidtok import ops


# Not ru_maxrss, which begins with what the parent held when it forked.
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


torch.set_num_threads(2)
segments, size, channels, clusters = map(int, sys.argv[1:])
x = torch.empty(segments * size, channels).uniform_(generator=torch.Generator().manual_seed(0))
cu = torch.arange(segments + 1, dtype=torch.int32) * size
ops.cluster_dpc_knn(x[:64], 32, k=7)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
out = ops.cluster_dpc_knn(x, clusters, k=7, cu_seqlens=cu)
grown = peak() - before
assert out.center.shape[0] == segments * clusters and int(out.assignment.max()) == clusters - 1
print(grown * 1024)
"""


def peak_bytes(*arguments: int) -> int:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("segments,size,channels", [(32, 729, 3584), (1, 23328, 64)])
def test_peak_memory_has_a_fixed_bound(segments, size, channels):
    """64 MB of workspace, and some 120 bytes per token; all distances of the second would take 2.2 GB."""
    assert peak_bytes(segments, size, channels, 100) < (64 << 20) + 200 * segments * size
