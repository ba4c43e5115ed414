"""Triton kernels that move, compare, cluster and choose frames, on shapes that take their less common paths.

Run by ``TRITON_INTERPRET=1 VIDTOK_BACKEND=triton pytest -m triton tests/kernels/test_triton_paths.py``.
"""

from __future__ import annotations

import importlib

import pytest
import torch

import vidtok
from tests.cases import Make, with_rows
from tests.kernels.test_triton import assert_equal, both, launches
from tests.ops.test_contract import leaves
from vidtok import Plan, ops
from vidtok.kernels import tables

pytestmark = pytest.mark.triton

__all__ = ["launches"]


def module(op):
    return importlib.import_module(f"vidtok.kernels.triton.{op}")


def gather(anchors, n):
    cu = torch.tensor([0, n], dtype=torch.int32)
    out = torch.tensor([0, len(anchors)], dtype=torch.int32)
    return Plan.gather(torch.tensor(anchors, dtype=torch.int32), cu, out, n)


# ---------------------------------------------------------------------- moves
@pytest.mark.parametrize("channels", [1, 3, 8, 24, 600])
def test_gathers_copy_every_bit(channels):
    bits = torch.randint(-(2**15), 2**15, (40, channels), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    anchors = [39, 0, -1, 5, 5, 7, -1, 12]
    for dtype in (torch.bfloat16, torch.float16):
        with vidtok.use_backend("triton"):
            got = ops.plan_apply(gather(anchors, 40), bits.view(dtype))
        expected = torch.where(torch.tensor(anchors)[:, None] < 0, 0, bits[anchors])
        assert torch.equal(got.view(torch.int16), expected.to(torch.int16))


@pytest.mark.parametrize("anchors", [[20], [-2], [3, 900000]])
def test_bad_anchors_raise_and_read_nothing(anchors):
    with vidtok.use_backend("triton"):
        with pytest.raises(IndexError, match=r"plan_apply: expected anchor in \[-1, 20\)"):
            ops.plan_apply(gather(anchors, 20), torch.ones(20, 4))
        with pytest.raises(IndexError, match=r"position_remap: expected anchor in \[-1, 20\)"):
            ops.position_remap(gather(anchors, 20), torch.arange(20), torch.ones(3, 20))


@pytest.mark.parametrize(
    ("member", "offset", "name"),
    [
        ([0, 9], [0, 1, 2], "member"),
        ([-1, 1], [0, 1, 2], "member"),
        ([0, 1], [0, 3, 2], "offset"),
        ([0, 1], [1, 1, 2], "offset"),
    ],
)
def test_bad_lists_raise(member, offset, name):
    lists = (torch.zeros(2).int(), torch.tensor(member).int(), torch.tensor(offset).int(), torch.ones(2))
    with vidtok.use_backend("triton"), pytest.raises(IndexError, match=f"plan_apply: expected {name} in"):
        torch.ops.vidtok.plan_apply(torch.ones(5, 4), *lists)
    if name == "member":
        with vidtok.use_backend("triton"), pytest.raises(IndexError, match="plan_apply: expected member in"):
            torch.ops.vidtok.plan_apply_backward(torch.ones(2, 4), *lists, 5)


def test_gradient_adds_in_list_order():
    """A token that many outputs hold: their sum has one order, whatever the order of the launches."""
    grad = torch.tensor([1e8, 1.0, -1e8, 1.0])[:, None].repeat(1, 20)
    lists = (torch.zeros(4).int(), torch.zeros(4).int(), torch.arange(5).int(), torch.ones(4))
    with vidtok.use_backend("triton"):
        got = torch.ops.vidtok.plan_apply_backward(grad, *lists, 2)
    assert got[0].tolist() == [1.0] * 20 and not got[1].any()


def test_many_riders_take_few_launches(launches):
    riders = [torch.randint(0, 99, (s, 20)) for s in range(1, 12)]
    riders[3], riders[4], riders[5] = riders[3].bool(), riders[4].to(torch.int16), riders[5].double()
    expected, got = both(lambda: ops.position_remap(gather([3, 1, -1, 19], 20), *riders, fill=1))
    assert_equal(got, expected)
    assert launches == ["_remap"] * 2


@pytest.mark.parametrize("inner", [1, 3, 16, 130, 1024])
def test_riders_of_every_width(inner):
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64):
        x = torch.randint(0, 100, (2, 9, inner)).to(dtype)
        expected, got = both(lambda x=x: ops.position_remap(gather([8, -1, 0, 4], 9), x, dim=1, fill=7))
        assert_equal(got, expected)


@pytest.mark.parametrize("level", [1, 1.5, 3])
def test_pooling_of_many_grids(level, launches):
    grid = [(1, 3, 4), (0, 3, 3), (2, 5, 2), (1, 1, 1), (3, 0, 4), (1, 7, 3), (2, 4, 4)]
    x = Make(torch.float32).normal(sum(t * h * w for t, h, w in grid), 20)
    results = []
    for backend in ("reference", "triton"):
        with vidtok.use_backend(backend):
            leaf = x.clone().requires_grad_()
            y = ops.pool_packed(leaf, grid, level=level).x
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
            results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-6)
    assert launches == ["_pool"] * 2
    if level == 1:
        assert torch.equal(results[1][0], x)


# ---------------------------------------------------------------------- adjacent_similarity
@pytest.mark.parametrize("block", [256, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_of_short_and_long_rows(dtype, block, monkeypatch):
    adjacent = module("adjacent_similarity")
    monkeypatch.setattr(adjacent, "PROGRAMS", 20)
    if block == 32:
        monkeypatch.setattr(adjacent, "LONGEST", 16)
    grid = [(1, 3, 4), (0, 3, 3), (5, 5, 2), (1, 1, 1), (3, 0, 4), (9, 1, 3)]
    n = sum(t * h * w for t, h, w in grid)
    make = Make(dtype)
    x, center = make.normal(n, 90), make.normal(3, 90)
    cu = torch.tensor([0, 20, 20, n], dtype=torch.int32)
    step = 2.0**-20 if dtype == torch.float32 else 2.0**-16
    with tables.forced("triton", "adjacent_similarity", {"block": block, "num_warps": 4}):
        windows = {"to": "window", "window": [1, 2, 3, 1, 3, 9]}
        centers = {"to": "center", "center": center, "cu_seqlens": cu}
        for options in ({}, windows, centers):
            expected, got = both(lambda options=options: ops.adjacent_similarity(x, grid, **options))
            torch.testing.assert_close(got, expected, rtol=0, atol=1.01 * step)


# ---------------------------------------------------------------------- cluster_dpc_knn
@pytest.mark.parametrize("workspace", [0, 24000])
@pytest.mark.parametrize("k", [5, 20, 80])
def test_segments_beyond_the_workspace_are_swept(k, workspace, monkeypatch, launches):
    monkeypatch.setattr(module("cluster_dpc_knn"), "WORKSPACE", workspace)
    make = Make(torch.bfloat16)
    x = with_rows(make.exact(121, 24, levels=3), zero=(1, 40), nan=(5,), inf=(60,))
    counts, cu = torch.tensor([4, 0, 9, 20, 0]), make.offsets(30, 0, 70, 20, 1)
    with tables.forced("triton", "cluster_dpc_knn", {"tile": 32, "depth": 32, "num_warps": 4, "num_stages": 2}):
        expected, got = both(lambda: ops.cluster_dpc_knn(x, counts, k=k, cu_seqlens=cu))
    assert_equal(got, expected)
    assert {"_swept_density", "_swept_scores", "_swept_assign"} <= set(launches)
    assert ("_gram" in launches) == (workspace > 0)


@pytest.mark.parametrize("k", [1, 17, 40])
def test_neighbours_few_and_many(k, launches):
    make = Make(torch.float32)
    x = torch.cat([make.exact(50, 12, levels=2), make.duplicated(4, 8, 12)])
    expected, got = both(lambda: ops.cluster_dpc_knn(x, 7, k=k, cu_seqlens=make.offsets(41, 41)))
    assert_equal(got, expected)
    assert launches == ["_norms", "_segments", "_gram", "_density", "_scores", "_rank", "_assign"]


def test_many_segments():
    make, lengths = Make(torch.float32), [3] * 40 + [0] * 5 + [17] * 2
    x, counts = make.exact(sum(lengths), 8), torch.tensor([min(2, n) for n in lengths])
    expected, got = both(lambda: ops.cluster_dpc_knn(x, counts, k=2, cu_seqlens=make.offsets(*lengths)))
    assert_equal(got, expected)


def test_clusters_of_a_segment_are_the_same_in_any_batch():
    make = Make(torch.float16)
    x = make.normal(90, 40)
    with vidtok.use_backend("triton"):
        together = ops.cluster_dpc_knn(x, 8, k=5, cu_seqlens=make.offsets(35, 55))
        alone = ops.cluster_dpc_knn(x[35:], 8, k=5)
    assert torch.equal(together.assignment[35:], alone.assignment)
    assert torch.equal(together.center[8:] - 35, alone.center)


# ---------------------------------------------------------------------- contour_select
@pytest.mark.parametrize("rule", ["stratified", "contour", "contour+fps"])
def test_contour_of_sequences_of_different_rank(rule):
    make = Make(torch.float32)
    x, cu = make.normal(337, 90), make.offsets(17, 60, 0, 260)
    for rank in (5, 64):
        expected, got = both(
            lambda rank=rank: ops.contour_select(x, [9, 4, 0, 40], rank=rank, rule=rule, cu_seqlens=cu)
        )
        torch.testing.assert_close(got.distance, expected.distance, rtol=2**-14, atol=0)
        assert torch.equal(got.index, expected.index)


def test_contour_beyond_one_block_goes_through_torch(launches):
    make = Make(torch.float32)
    x, query = make.normal(300, 80), make.normal(80)
    expected, got = both(lambda: ops.contour_select(x, 12, rank=70, query=query, rule="contour"))
    torch.testing.assert_close(got.distance, expected.distance, rtol=2**-14, atol=0)
    assert torch.equal(got.index, expected.index) and "_measure" not in launches


def test_contour_with_frames_that_are_not_finite():
    make = Make(torch.bfloat16)
    x = with_rows(make.exact(150, 24, levels=2), zero=(1, 40), nan=(5, 90), inf=(60,))
    x[70:76] = torch.nan
    cu = make.offsets(70, 6, 71, 3)
    for rule in ("stratified", "contour", "contour+fps"):
        expected, got = both(lambda rule=rule: ops.contour_select(x, [6, 4, 6, 3], rule=rule, cu_seqlens=cu))
        torch.testing.assert_close(got.distance, expected.distance, rtol=2**-14, atol=0, equal_nan=True)
        assert torch.equal(got.index, expected.index)


def test_distances_of_a_sequence_are_the_same_in_any_batch():
    make = Make(torch.float32)
    x = make.normal(200, 40)
    with vidtok.use_backend("triton"):
        together = ops.contour_select(x, 5, cu_seqlens=make.offsets(60, 140))
        alone = ops.contour_select(x[:60], 5)
    assert_equal(leaves(together.distance[:60]), leaves(alone.distance))
    assert torch.equal(together.index[:5], alone.index)
