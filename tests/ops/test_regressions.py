"""One test for each defect that was once found by reading the kernels."""

from __future__ import annotations

import importlib
import os
import time

import pytest
import torch

from vidtok import Plan, ops
from vidtok.kernels import select

X = torch.arange(24.0).view(6, 4).sin()


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_after_threads_of_torch() -> None:
    """torch and the kernels share one libgomp: a child may not enter a pool that only torch has started."""
    x = torch.randn(4000, 512)
    plan = Plan.identity([4000])
    torch.randn(4_000_000).add(1)
    child = os.fork()
    if child == 0:
        # Only the kernel may use threads here: torch's own would hang.
        os._exit(0 if ops.plan_apply(plan, x).numpy().tobytes() == x.numpy().tobytes() else 3)
    limit = time.monotonic() + 30
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < limit:
        time.sleep(0.05)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and os.waitstatus_to_exitcode(status) == 0


def test_largest_query_position_sees_every_key() -> None:
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 300, 4)
    everything = ops.attention_topk(query, key, 3, span=[(0, 0, 300)])
    for position in (299, 2**63 - 1):
        limited = ops.attention_topk(query, key, 3, span=[(0, 0, 300)], query_position=torch.tensor([[position]]))
        assert torch.equal(limited.index, everything.index) and torch.equal(limited.score, everything.score)
    none = ops.attention_topk(query, key, 3, span=[(0, 0, 300)], query_position=torch.tensor([[-(2**63)]]))
    assert not none.score.any()


def test_span_whose_length_overflows() -> None:
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 8, 4)
    span = torch.tensor([[0, 1, -(2**63)], [0, 1, -(2**63)], [0, 0, 3]])
    with pytest.raises(IndexError, match="inside"):
        torch.ops.vidtok.attention_topk(query, key, [0], span, None, 1.0, None, None, False, 0, 1)


def test_queries_without_channels() -> None:
    empty = ops.attention_topk(torch.zeros(1, 2, 1, 0), torch.zeros(1, 2, 5, 0), 2, span=[(0, 0, 5)])
    assert empty.index.tolist() == [0, 1]


def test_negative_r_of_traced_code_merges_nothing() -> None:
    lists = torch.ops.vidtok.bipartite_match(X[None], -1000, None, 0, None, None)
    assert lists[2].tolist() == [0, 2, 4, 1, 3, 5]


def test_more_tokens_than_int32_counts() -> None:
    if not select.holds("bipartite_match"):
        return
    metric = torch.zeros(1, 1, 1).expand(2**16, 2**15, 1)
    with pytest.raises(ValueError, match=r"fewer than (2\^31|2147483648) tokens"):
        torch.ops.vidtok.bipartite_match(metric, 1, None, 0, None, None)


def test_rows_beyond_int32_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.randn(3, 40)
    expected = ops.topk_select(score, 7)
    monkeypatch.setattr(importlib.import_module("vidtok.ops.topk_select"), "_MOST", 100)
    assert torch.equal(ops.topk_select(score, 7), expected)
    assert torch.equal(ops.topk_select(score.T.contiguous().T, 7), expected)


def test_no_sequence_for_the_frames() -> None:
    with pytest.raises(IndexError, match="end at 6"):
        torch.ops.vidtok.contour_select(X, [1], None, 4, 0, 0, _ints(0))


def test_rows_without_tokens_cost_nothing() -> None:
    pooled = ops.pool_packed(torch.zeros(0, 4, requires_grad=True), [(2**31, 2**31, 0)], level=1)
    pooled.x.sum().backward()
    assert pooled.x.shape == (0, 4)


def test_strided_lists() -> None:
    cu = torch.stack([_ints(0, 4, 6), _ints(9, 9, 9)], 1)[:, 0]
    counts = torch.tensor([[2, 9], [1, 9]])[:, 0]
    assert not cu.is_contiguous() and not counts.is_contiguous()
    whole = cu.contiguous()
    assert torch.equal(ops.topk_select(X[:, 0], 1, cu_seqlens=cu), ops.topk_select(X[:, 0], 1, cu_seqlens=whole))
    a = ops.cluster_dpc_knn(X, counts, k=2, cu_seqlens=cu)
    b = ops.cluster_dpc_knn(X, [2, 1], k=2, cu_seqlens=whole)
    assert torch.equal(a.assignment, b.assignment) and torch.equal(a.center, b.center)
    windows = torch.tensor([[2, 9], [4, 9]])[:, 0]
    grid = [(6, 1, 1)]
    a, b = (ops.adjacent_similarity(X, grid, to="window", window=w) for w in (windows, [2, 4]))
    assert torch.equal(a, b)


def test_default_device_does_not_move_host_lists() -> None:
    x = X.repeat(4, 1)[:16].contiguous()
    with torch.device("meta"):
        assert ops.pool_packed(x, [(1, 4, 4)], level=2).x.device.type == "cpu"
        assert ops.adjacent_similarity(x, [(4, 2, 2)]).device.type == "cpu"
        assert ops.adjacent_similarity(x, [(4, 2, 2)], to="window", window=[4]).device.type == "cpu"
        assert ops.cluster_dpc_knn(x, 3, k=2).center.device.type == "cpu"
        picked = ops.attention_topk(x[None, None, :1], x[None, None], 2, span=[(0, 0, 5)], group=[0])
        assert picked.index.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_anchors_of_another_type(dtype: torch.dtype) -> None:
    plan = Plan(_ints(0, 6), _ints(0, 2), torch.tensor([3, 5], dtype=dtype), None, None, None, 6)
    assert ops.position_remap(plan, torch.arange(6))[0].tolist() == [3, 5]
    assert torch.equal(ops.plan_apply(plan, X), X[[3, 5]])
