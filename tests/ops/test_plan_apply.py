"""plan_apply: copies bit for bit, means against fp64, the transpose, and cuts that leave no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import DTYPES
from tests.guard import poisoned_allocation
from vidtok import Plan, ops
from vidtok.kernels import select

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gather(anchor, n):
    m = len(anchor)
    return Plan(torch.tensor([0, n]).int(), torch.tensor([0, m]).int(), torch.tensor(anchor).int(), None, None, None, n)


def lists(groups, weights, n):
    """A plan from explicit members and weights, valid or not as a mean."""
    offset = torch.tensor([0, *[len(g) for g in groups]]).cumsum(0).int()
    anchor = torch.tensor([g[0] if g else 0 for g in groups]).int()
    member = torch.tensor([i for g in groups for i in g]).int()
    return Plan(torch.tensor([0, n]).int(), torch.tensor([0, len(groups)]).int(), anchor, member, offset,
                torch.tensor([w for ws in weights for w in ws]).float(), n)  # fmt: skip


def random_bits(shape, dtype, seed=0):
    """Every bit pattern, NaN payloads among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


def bits(t):
    return t.contiguous().view(torch.uint8)


@by_dtype
@pytest.mark.parametrize(("n", "m", "c"), [(5, 9, 1), (30, 17, 63), (40, 40, 257), (300, 160, 3584)])
def test_a_gather_moves_every_bit(n, m, c, dtype, isa):
    x = random_bits((n, c), dtype)
    anchor = torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(1))
    with poisoned_allocation():
        y = ops.plan_apply(gather(anchor.tolist(), n), x)
    assert torch.equal(bits(y), bits(x[anchor]))


@by_dtype
def test_rows_at_odd_addresses(dtype, isa):
    """Neither input rows nor output rows lie on vector boundaries."""
    x = random_bits((220, 3601), dtype)[:, 3:3600]
    anchor = list(range(219, -1, -2)) * 4
    assert torch.equal(bits(ops.plan_apply(gather(anchor, 220), x)), bits(x[anchor]))


@by_dtype
def test_pads_are_zero_between_copies(dtype, isa):
    x = random_bits((4, 33), dtype)
    y = ops.plan_apply(gather([-1, 2, -1, -1, 0], 4), x)
    assert bool((bits(y[[0, 2, 3]]) == 0).all())
    assert torch.equal(bits(y[[1, 4]]), bits(x[[2, 0]]))


@by_dtype
def test_a_single_member_is_a_copy_whatever_its_weight(dtype, isa):
    x = random_bits((3, 50), dtype)
    y = ops.plan_apply(lists([[1], [2, 0]], [[0.75], [0.5, 0.5]], 3), x)
    assert torch.equal(bits(y[0]), bits(x[1]))


@pytest.mark.parametrize("c", [1, 15, 64, 131, 1100])
@pytest.mark.parametrize("largest", [2, 7, 700])
def test_means_against_fp64(c, largest, isa):
    generator = torch.Generator().manual_seed(largest)
    x = torch.randn(800, c, generator=generator)
    order = torch.randperm(800, generator=generator).tolist()
    groups, at = [order[:largest]], largest
    while at < 800:
        groups.append(order[at : at + 3])
        at += 3
    y = ops.plan_apply(lists(groups, [[1 / len(g)] * len(g) for g in groups], 800), x)
    exact = torch.stack([x[g].double().mean(0) for g in groups])
    # Each of the sums' roundings is at most half an ulp of a partial sum.
    bound = torch.stack([x[g].double().abs().sum(0) * 2.0**-23 for g in groups])
    assert bool(((y.double() - exact).abs() <= bound).all())


@by_dtype
def test_bits_do_not_depend_on_threads(dtype, isa):
    """One huge cluster among small ones, so that the cut by bytes falls differently for each count."""
    generator = torch.Generator().manual_seed(3)
    owner = torch.where(
        torch.rand(900, generator=generator) < 0.5, 0, torch.randint(0, 200, (900,), generator=generator)
    )
    owner[:200] = torch.arange(200)
    offsets = torch.tensor([0, 900]).int(), torch.tensor([0, 200]).int()
    plan = Plan.from_assignment(owner, torch.arange(200), *offsets, 900)
    x = torch.randn(900, 700, generator=generator).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = ops.plan_apply(plan, leaf)
            y.backward(y.detach() * 2)
            results.append((bits(y.detach()), bits(leaf.grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0]))


@by_dtype
def test_the_gradient_of_a_repeated_token_is_a_sum_in_fp32(dtype, isa):
    """Ten thousand ones: a sum kept in fp16 would stop at 2048, in bf16 at 256."""
    x = torch.zeros(3, 20, dtype=dtype, requires_grad=True)
    ops.plan_apply(gather([1] * 10000 + [2], 3), x).backward(torch.ones(10001, 20, dtype=dtype))
    assert x.grad[:, 0].tolist() == [0.0, float(torch.tensor(10000.0).to(dtype)), 1.0]


def test_the_gradient_weighs_a_shared_single_member(isa):
    """A token alone in one output and half of another takes 1 and 0.5, though lists say 0.25 for the first."""
    x = torch.zeros(2, 8, requires_grad=True)
    ops.plan_apply(lists([[0], [0, 1]], [[0.25], [0.5, 0.5]], 2), x).sum().backward()
    assert x.grad[:, 0].tolist() == [1.5, 0.5]


def test_large_gradient_equals_index_add(isa):
    anchor = torch.randint(0, 500, (700,), generator=torch.Generator().manual_seed(0))
    grad = torch.randn(700, 1030, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(500, 1030, requires_grad=True)
    ops.plan_apply(gather(anchor.tolist(), 500), x).backward(grad)
    exact = torch.zeros(500, 1030, dtype=torch.float64).index_add_(0, anchor, grad.double())
    torch.testing.assert_close(x.grad, exact.float(), rtol=1e-6, atol=1e-6)


@given(data=st.data())
def test_any_lists(data):
    n, c = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 40))
    group = st.lists(st.integers(0, n - 1), min_size=1, max_size=6)
    groups = data.draw(st.lists(group, max_size=9))
    weights = [data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=len(g), max_size=len(g))) for g in groups]
    x = (torch.arange(n * c) % 97 - 48).view(n, c) / 256
    expected = torch.zeros(len(groups), c)
    slope = torch.zeros(n, c)
    for m, (g, ws) in enumerate(zip(groups, weights)):
        for i, w in zip(g, ws):
            w = 1.0 if len(g) == 1 else w
            expected[m] += w * x[i]
            slope[i] += w
    for isa in select.build_info().get("isa_usable", []):
        before = select.build_info()["isa"]
        select.extension().force_isa(isa)
        try:
            leaf = x.clone().requires_grad_()
            y = ops.plan_apply(lists(groups, weights, n), leaf)
            assert torch.equal(y.detach(), expected)
            y.sum().backward()
            assert torch.equal(leaf.grad, slope)
        finally:
            select.extension().force_isa(before)


@pytest.mark.parametrize("backward", [False, True])
def test_the_operator_itself_refuses_lists_that_do_not_belong_together(backward, isa):
    """Short lists would be read past their end."""
    x, anchor = torch.zeros(4, 8), torch.tensor([0, 2]).int()
    member, offset, weight = torch.tensor([0, 1, 2]).int(), torch.tensor([0, 2, 3]).int(), torch.ones(3)

    def call(*lists):
        if backward:
            return torch.ops.vidtok.plan_apply_backward(torch.zeros(2, 8), *lists, 4)
        return torch.ops.vidtok.plan_apply(x, *lists)

    assert call(anchor, member, offset, weight).shape == ((4, 8) if backward else (2, 8))
    for lists in ((member, offset[:2], weight), (member, offset, weight[:2]), (member[:2], offset, weight)):
        with pytest.raises((IndexError, RuntimeError)):
            call(anchor, *lists)
    with pytest.raises(TypeError, match="int32"):
        call(anchor, member.long(), offset, weight)


def test_the_operator_itself_takes_any_strides(isa):
    x = torch.arange(48.0).view(6, 8)
    anchor = torch.tensor([5, 1]).int()
    assert torch.equal(torch.ops.vidtok.plan_apply(x.t(), anchor, None, None, None), x.t()[[5, 1]])
