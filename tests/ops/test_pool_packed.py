"""pool_packed against adaptive_avg_pool2d, level 1 bit for bit, and the transpose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d

from tests.cases import DTYPES
from tests.guard import poisoned_allocation
from tests.ops.test_plan_apply import bits, random_bits
from vidtok import ops
from vidtok.kernels import select

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIDES = [(24, 24), (16, 16), (20, 28), (28, 20), (12, 34), (34, 12), (18, 18), (14, 30), (1, 7), (7, 1), (2, 3), (5, 5)]


def by_torch(x, grid, out):
    """The same by one call of torch per grid; ``out`` gives each target side."""
    parts, start = [], 0
    for (t, h, w), (oh, ow) in zip(grid, out):
        frames = x[start : start + t * h * w].view(t, h, w, -1).permute(0, 3, 1, 2)
        start += t * h * w
        parts.append(adaptive_avg_pool2d(frames, (oh, ow)).permute(0, 2, 3, 1).reshape(-1, x.shape[1]))
    return torch.cat(parts)


@pytest.mark.parametrize("c", [1, 17, 64, 130])
@pytest.mark.parametrize(("side", "out"), [(24, 12), (24, 6), (16, 8), (16, 4), (7, 3), (9, 8), (5, 1), (4, 4)])
def test_uniform_grids_equal_torch(side, out, c, isa):
    x = torch.randn(3 * side * side, c, generator=torch.Generator().manual_seed(side))
    with poisoned_allocation():
        y = ops.pool_packed(x, [(3, side, side)], out_hw=(out, out)).x
    torch.testing.assert_close(y, by_torch(x, [(3, side, side)], [(out, out)]), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("level", [1.5, 2, 3, 100])
def test_grids_of_many_sizes_equal_torch(level, isa):
    grid = [(1 + i % 3, *side) for i, side in enumerate(SIDES * 2)]
    out = [[1 if s / level < 1 else round(s / level) for s in (h, w)] for _, h, w in grid]
    x = torch.randn(sum(t * h * w for t, h, w in grid), 48, generator=torch.Generator().manual_seed(1))
    pooled = ops.pool_packed(x, grid, level=level)
    assert pooled.grid_thw.tolist() == [[t, *o] for (t, _, _), o in zip(grid, out)]
    torch.testing.assert_close(pooled.x, by_torch(x, grid, out), rtol=1e-5, atol=2e-7)


@by_dtype
def test_level_one_returns_every_bit(dtype, isa):
    """Also where one side alone is kept, and beyond the cache."""
    x = random_bits((2 * 12 * 17, 1101), dtype)
    assert torch.equal(bits(ops.pool_packed(x, [(2, 12, 17)], level=1).x), bits(x))


@by_dtype
def test_exact_values_are_rounded_once(dtype, isa):
    """Windows of four: sums of multiples of 1/256 are exact, so the only rounding is to the dtype."""
    x = (torch.randint(-64, 65, (6 * 8 * 8, 70), generator=torch.Generator().manual_seed(0)) / 256).to(dtype)
    exact = x.double().view(6, 4, 2, 4, 2, 70).mean((2, 4)).reshape(-1, 70)
    assert torch.equal(ops.pool_packed(x, [(6, 8, 8)], level=2).x, exact.to(dtype))


def test_round_half_to_even_and_sides_below_the_level():
    grid = ops.pool_packed(torch.zeros(5 * 7 + 3, 4), [(1, 5, 7), (1, 1, 3)], level=2).grid_thw
    assert grid.tolist() == [[1, 2, 4], [1, 1, 2]]


@pytest.mark.parametrize(
    ("h", "w", "out"), [(8, 8, (4, 4)), (7, 5, (3, 4)), (6, 9, (6, 2)), (5, 5, (5, 5)), (3, 4, (1, 1))]
)
def test_gradient_equals_torch(h, w, out, isa):
    x = torch.randn(2 * h * w, 67, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2 * out[0] * out[1], 67, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    ops.pool_packed(ours, [(2, h, w)], out_hw=out).x.backward(grad)
    by_torch(theirs, [(2, h, w)], [out]).backward(grad.double())
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-6, atol=1e-6)


@by_dtype
def test_bits_do_not_depend_on_threads_or_companions(dtype, isa):
    grid = [(2, 18, 18), (1, 14, 30), (3, 5, 4)]
    sizes = [t * h * w for t, h, w in grid]
    x = torch.randn(sum(sizes), 520, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = ops.pool_packed(leaf, grid, level=2.5).x
            y.backward(y.detach())
            results.append((bits(y.detach()), bits(leaf.grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0]))
    alone = torch.cat([ops.pool_packed(p, [g], level=2.5).x for p, g in zip(x.split(sizes), grid)])
    assert torch.equal(bits(alone), results[0][0])


def test_the_operator_itself_refuses_grids_that_do_not_fit(isa):
    x = torch.zeros(12, 4)
    for grid_in, grid_out, num_out in (
        ([[1, 3, 4]], [[1, 4, 4]], 16),  # grows
        ([[1, 3, 4]], [[2, 1, 2]], 4),  # another number of frames
        ([[1, 2, 4]], [[1, 1, 2]], 2),  # too few tokens
        ([[2**40, 2**40, 2**40]], [[2**40, 1, 1]], 1),  # their product passes 64 bits
        ([[-1, -3, 4]], [[-1, -3, 4]], 12),
        ([[1, 3, 4]], [[1, 3, 4], [0, 0, 0]], 12),
    ):
        with pytest.raises(IndexError, match=r"expected.* grids"):
            torch.ops.vidtok.pool_packed(x, torch.tensor(grid_in), torch.tensor(grid_out), num_out)


@given(
    grid=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 7)), max_size=4),
    level=st.sampled_from([1, 1.3, 2, 2.5, 4, 9]),
    c=st.integers(0, 40),
)
def test_any_grids(grid, level, c):
    n = sum(t * h * w for t, h, w in grid)
    x = ((torch.arange(n * c) * 37) % 101 - 50).view(n, c) / 256
    out = [[s if h * w == 0 else (1 if s / level < 1 else round(s / level)) for s in (h, w)] for _, h, w in grid]
    full = [((t, h, w), o) for (t, h, w), o in zip(grid, out) if t * h * w]
    expected = by_torch(x, [g for g, _ in full], [o for _, o in full]) if full and c else x.new_empty(0, c)
    before = select.build_info().get("isa")
    for isa in select.build_info().get("isa_usable", []):
        select.extension().force_isa(isa)
        try:
            y = ops.pool_packed(x, grid, level=level).x
            if c:
                torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
            else:
                assert y.shape[1] == 0
        finally:
            select.extension().force_isa(before)
