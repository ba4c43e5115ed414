"""cluster_dpc_knn where distances do not fit the workspace: segments take turns, or are swept."""

from __future__ import annotations

import pytest
import torch

from tests.cases import Make
from vidtok.kernels import cuda
from vidtok.kernels.cuda import cluster_dpc_knn as kernel
from vidtok.kernels.reference.cluster_dpc_knn import cluster_dpc_knn as reference

SM = cuda.extension().build_info()["sms"][0]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if SM >= 80 else [])
LENGTHS = (40, 0, 70, 1, 33, 66, 40)
COUNTS = (5, 0, 20, 1, 0, 66, 3)
# Bytes: all at once, turns of one or two segments with the longest swept, every segment swept.
ROOMS = (64 << 20, 4 * 70 * 72, 4 * 40 * 40, 0)


@pytest.fixture(autouse=True)
def forward_again():
    yield
    cuda.extension().set_order(0)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_workspace_gives_the_same(dtype, k, room, known, monkeypatch):
    make = Make(dtype)
    x, counts = make.exact(sum(LENGTHS), 24), torch.tensor(COUNTS)
    x[3], x[60] = float("nan"), float("inf")
    offsets = make.offsets(*LENGTHS)
    assignment, center = reference(x, counts, k, offsets, -1)
    monkeypatch.setattr(kernel, "WORKSPACE", room)
    if not known:
        monkeypatch.setattr(kernel, "_known", lambda _: None)
    for order in (0, 3):
        cuda.extension().set_order(order)
        found = kernel.cluster_dpc_knn(x, counts, k, offsets, sum(COUNTS))
        assert torch.equal(found[0], assignment)
        assert torch.equal(found[1], center)


def test_bad_lists_cluster_nothing(monkeypatch):
    """Offsets and counts that only the kernel sees are reported; the results are zeros."""
    monkeypatch.setattr(kernel, "_known", lambda _: None)
    x = torch.zeros(10, 4)
    for offsets, counts, name in (
        ((0, 12), (1,), r"cu_seqlens in \[0, 11\), got 12"),
        ((0, 6, 4, 10), (1, 1, 1), r"cu_seqlens in"),
        ((0, 4, 10), (5, 1), r"num_clusters in \[0, 5\), got 5"),
    ):
        cu, num = torch.tensor(offsets, dtype=torch.int32), torch.tensor(counts)
        with pytest.raises((IndexError, ValueError), match=f"cluster_dpc_knn: expected {name}"):
            kernel.cluster_dpc_knn(x, num, 3, cu, sum(counts))
