"""adjacent_similarity against fp64, and exact ties where tokens repeat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vidtok
from tests.cases import DTYPES
from tests.guard import poisoned_allocation
from vidtok import ops
from vidtok.kernels import select

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
STEP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-16}


def normal(n, c, dtype=torch.float32, seed=0):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_kind(x, grid, window, center):
    return (
        ops.adjacent_similarity(x, grid),
        ops.adjacent_similarity(x, grid, to="window", window=window),
        ops.adjacent_similarity(x, grid, to="center", center=center),
    )


@by_dtype
@pytest.mark.parametrize("c", [1, 7, 64, 100, 1152])
def test_within_half_a_step_of_fp64(c, dtype, isa):
    """Beside the rounding to the grid, errors stay below a quarter of fp32's step."""
    grid, window = [(5, 3, 7), (2, 1, 1)], [2, 3, 2]
    x, center = normal(5 * 21 + 2, c, dtype), normal(2, c, dtype, 1)
    with poisoned_allocation():
        ours = every_kind(x, grid, window, center)
    with vidtok.use_backend("reference"):
        unrounded = every_kind(x.double(), grid, window, center.double())
    for a, b in zip(ours, unrounded):
        assert a.dtype == torch.float32 and torch.equal(a.isinf(), b.isinf())
        real = ~b.isinf()
        assert bool(((a.double() - b)[real].abs() <= 0.5 * STEP[dtype] + 0.75 * 2.0**-20).all())
        steps = a[real].double() / STEP[dtype]
        assert torch.equal(steps, steps.round())


@by_dtype
@pytest.mark.parametrize("c", [3, 64, 3584])
def test_repeated_tokens_are_exactly_one(c, dtype, isa):
    frames = normal(4, c, dtype).repeat(6, 1)
    previous, window, center = every_kind(frames, [(6, 2, 2)], [1, 5], frames[:1])
    assert previous.tolist() == [-torch.inf] * 4 + [1.0] * 20
    assert window.tolist() == [-torch.inf] * 4 + [1.0] * 4
    assert center[::4].tolist() == [1.0] * 6
    opposite = ops.adjacent_similarity(torch.cat([frames[:4], -frames[:4]]), [(2, 2, 2)])
    assert opposite[4:].tolist() == [-1.0] * 4


@by_dtype
def test_zero_rows_and_rows_without_a_norm(dtype, isa):
    x = normal(6, 40, dtype)
    x[1] = 0
    x[3, 5] = float("inf")
    x[4, 39] = float("nan")
    score = ops.adjacent_similarity(x, [(6, 1, 1)])
    assert score[0] == -torch.inf and score[1] == 0 and score[2] == 0
    assert score[3:].isnan().tolist() == [True, True, True]
    center = ops.adjacent_similarity(x, [(6, 1, 1)], to="center", center=torch.zeros(1, 40, dtype=dtype))
    assert center[[0, 1, 2, 5]].tolist() == [0.0] * 4 and center[[3, 4]].isnan().all()


def test_a_norm_beyond_fp32_is_not_a_number(isa):
    x = torch.full((2, 8), 1e30)
    assert ops.adjacent_similarity(x, [(2, 1, 1)])[1].isnan()
    assert ops.adjacent_similarity(torch.full((2, 8), 1e-15), [(2, 1, 1)])[1] == 1


@pytest.mark.parametrize(("t", "h", "w"), [(200, 1, 1), (66, 1, 3), (65, 5, 6), (3, 29, 1), (2, 1, 1)])
def test_long_and_wide_videos(t, h, w, isa):
    """Past the cuts along time and slots, each score is that of its pair alone."""
    x = normal(t * h * w, 33)
    score = ops.adjacent_similarity(x, [(t, h, w)]).view(t, -1)
    pairs = torch.stack([x.view(t, -1, 33)[:-1], x.view(t, -1, 33)[1:]], 2).flatten(0, 1)
    alone = torch.stack([ops.adjacent_similarity(p, [(2, 1, 1)])[1] for p in pairs])
    assert torch.equal(score[1:].flatten(), alone)


def test_center_of_sequences_that_are_not_videos(isa):
    x, center = normal(10, 24), normal(3, 24, seed=1)
    cu = torch.tensor([0, 4, 4, 10])
    score = ops.adjacent_similarity(x, [(1, 2, 5)], to="center", center=center, cu_seqlens=cu)
    cosine = torch.nn.functional.cosine_similarity(x, center[[0] * 4 + [2] * 6])
    torch.testing.assert_close(score, cosine, rtol=0, atol=2e-6)


@by_dtype
def test_bits_do_not_depend_on_threads_or_companions(dtype, isa):
    grid, window = [(9, 6, 7), (4, 3, 3)], [4, 5, 2, 2]
    x, center = normal(9 * 42 + 36, 800, dtype), normal(2, 800, dtype, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(every_kind(x, grid, window, center))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0]))
    first = every_kind(x[: 9 * 42], grid[:1], window[:2], center[:1])
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(first, results[0]))


def test_the_operator_itself_refuses_what_does_not_cover(isa):
    op, x = torch.ops.vidtok.adjacent_similarity, torch.zeros(12, 4)
    grid = torch.tensor([[3, 2, 2]])
    for bad, mode, window, out in (
        (torch.tensor([[4, 2, 2]]), 0, None, 12),
        (torch.tensor([[2, 2, 2]]), 0, None, 12),
        (torch.tensor([[2**62, 2, 2]]), 0, None, 12),
        (grid, 1, torch.tensor([2, 2]), 8),
        (grid, 1, torch.tensor([3, 1]), 8),
        (grid, 1, torch.tensor([0, 3]), 8),
        (grid, 1, torch.tensor([3]), 8),
    ):
        with pytest.raises(IndexError, match="expected"):
            op(x, bad, mode, window, None, None, out)
    with pytest.raises(IndexError, match="cu_seqlens"):
        op(x, grid, 2, None, torch.zeros(1, 4), torch.tensor([0, 13]).int(), 12)


@given(
    grid=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=4),
    c=st.integers(1, 40),
    data=st.data(),
)
def test_any_grids(grid, c, data):
    """Small multiples of 1/256: native and reference agree exactly, but for a step where unit rows were rounded."""
    n = sum(t * h * w for t, h, w in grid)
    x = (torch.randint(-2, 3, (n, c), generator=torch.Generator().manual_seed(c)) / 256).to(torch.float32)
    window = []
    for t, _, _ in grid:
        while t > 0:
            window.append(data.draw(st.integers(1, t)))
            t -= window[-1]
    center = torch.ones(len(grid), c) / 256
    with vidtok.use_backend("reference"):
        expected = every_kind(x, grid, window, center)
    before = select.build_info().get("isa")
    for isa in select.build_info().get("isa_usable", []):
        select.extension().force_isa(isa)
        try:
            previous, windows, centers = every_kind(x, grid, window, center)
            assert torch.equal(previous, expected[0]) and torch.equal(centers, expected[2])
            torch.testing.assert_close(windows, expected[1], rtol=0, atol=2.0**-20)
        finally:
            select.extension().force_isa(before)


def test_the_operator_itself_refuses_centers_that_do_not_fit(isa):
    op, x, grid = torch.ops.vidtok.adjacent_similarity, torch.zeros(12, 4), torch.tensor([[3, 2, 2]])
    cu = torch.tensor([0, 12]).int()
    for center in (torch.zeros(2, 4), torch.zeros(1, 3), torch.zeros(1, 4, dtype=torch.float16)):
        with pytest.raises(IndexError, match="expected center"):
            op(x, grid, 2, None, center, cu, 12)
