"""position_remap: every element type, size and layout, exactly."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vidtok
from tests.guard import poisoned_allocation
from tests.ops.test_plan_apply import bits, gather, random_bits
from vidtok import Plan, ops

ELEMENTS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip


def values(shape, dtype):
    if dtype == torch.bool:
        return (
            torch.arange(max(1, torch.Size(shape).numel())).remainder(3).eq(0)[: torch.Size(shape).numel()].view(shape)
        )
    return random_bits(shape, dtype)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((50,), 0), ((3, 50), -1), ((50, 7), 0), ((2, 50, 5), 1), ((2, 50, 400), 1)]
)
def test_every_element_type_moves_bit_for_bit(shape, dim, dtype, isa):
    x = values(shape, dtype)
    anchor = torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(0))
    with contextlib.nullcontext() if dtype == torch.uint8 else poisoned_allocation():  # its poison passes 255
        (y,) = ops.position_remap(gather(anchor.tolist(), 50), x, dim=dim)
    assert torch.equal(bits(y), bits(x.index_select(dim, anchor)))


@pytest.mark.parametrize("dtype", [d for d in ELEMENTS if d != torch.bool], ids=str)
@pytest.mark.parametrize("inner", [1, 3, 130])
@pytest.mark.parametrize("fill", [0, 7, 100])
def test_pads_take_the_fill(fill, inner, dtype, isa):
    x = values((4, inner), dtype)
    (y,) = ops.position_remap(gather([-1, 3, -1, 0], 4), x, dim=0, fill=fill)
    assert torch.equal(y[[0, 2]], torch.full((2, inner), fill, dtype=dtype))
    assert torch.equal(bits(y[[1, 3]]), bits(x[[3, 0]]))


def test_labels_get_minus_one_hundred_and_positions_one(isa):
    plan = gather([-1, 1], 2)
    labels, position, mask = (
        torch.tensor([[5, 6]]),
        torch.tensor([[[2, 3]], [[4, 5]], [[6, 7]]]),
        torch.tensor([[1.0, 0.5]]),
    )
    a, b, c = ops.position_remap(plan, labels, position, mask, fill=(-100, 1, 0))
    assert a.tolist() == [[-100, 6]] and b.tolist() == [[[1, 3]], [[1, 5]], [[1, 7]]] and c.tolist() == [[0.0, 0.5]]


def test_a_fill_that_is_not_a_number(isa):
    (y,) = ops.position_remap(gather([-1, 0], 1), torch.ones(1), fill=float("nan"))
    assert y.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_fill_that_does_not_fit_raises(backend):
    with vidtok.use_backend(backend), pytest.raises(RuntimeError):
        ops.position_remap(gather([-1, 0], 1), torch.ones(1, dtype=torch.uint8), fill=300)


def test_dense_rows_with_different_pads(isa):
    """Two rows of four tokens, of which the second loses two."""
    plan = gather([0, 1, 3, -1, 4, 7], 8)
    plan = Plan(
        torch.tensor([0, 4, 8]).int(), torch.tensor([0, 3, 6]).int(), plan.anchor, None, None, None, 8, 4, 3, True
    )
    position = torch.arange(24).view(3, 2, 4)
    hidden = torch.arange(40.0).view(2, 4, 5)
    p, h = ops.position_remap(plan, position, hidden, dim=(-1, 1), fill=(-1, 0))
    assert p[1].tolist() == [[8, 9, 11], [-1, 12, 15]]
    assert h[1, 0].tolist() == [0.0] * 5 and torch.equal(h[1, 1:], hidden[1, [0, 3]])


def test_large_embeddings_with_riders_do_not_depend_on_threads(isa):
    n = 1200
    anchor = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n // 2].sort().values
    plan = gather(anchor.tolist(), n)
    hidden, position = torch.randn(1, n, 1031), torch.randint(0, 99, (3, 1, n))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            h, p = ops.position_remap(plan, hidden, position, dim=(1, -1))
            assert torch.equal(h, hidden[:, anchor]) and torch.equal(p, position[..., anchor])
    finally:
        torch.set_num_threads(before)


def test_gradients_reach_their_tensors():
    x = torch.randn(1, 4, 3, requires_grad=True)
    h, p = ops.position_remap(gather([-1, 2, 2], 4), x, torch.arange(4)[None], dim=(1, -1), fill=(0, 9))
    h.sum().backward()
    assert x.grad[0, :, 0].tolist() == [0.0, 0.0, 2.0, 0.0] and p.tolist() == [[9, 2, 2]]


@given(outer=st.integers(0, 3), inner=st.integers(0, 40), n=st.integers(1, 30), data=st.data())
def test_any_shape(outer, inner, n, data):
    anchor = data.draw(st.lists(st.integers(-1, n - 1), max_size=40))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.int32, torch.int64]))
    x = random_bits((outer, n, inner), dtype) if inner else torch.empty(outer, n, 0, dtype=dtype)
    (y,) = ops.position_remap(gather(anchor, n), x, dim=1, fill=3)
    index = torch.tensor(anchor, dtype=torch.int64)
    expected = x[:, index.clamp(min=0)]
    expected[:, index < 0] = torch.tensor(3, dtype=dtype)
    assert y.shape == expected.shape and (not inner or torch.equal(bits(y), bits(expected)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_operator_itself_refuses_tensors_that_differ(backend):
    """Whatever calls it, nothing is written past an output or read past an input."""
    op, anchor = torch.ops.vidtok.position_remap, torch.tensor([3, 0, 1]).int()
    with vidtok.use_backend(backend):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            op(anchor, [torch.zeros(2), torch.zeros(4)], [0, 0], [0, 0], 0, [0.0, 0.0])
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            op(anchor, [torch.zeros(2, 2)], [1], [1], 1, [0.0])
