"""Every operator on every GPU backend, shared case and dtype: the reference's result, twice the same bits."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.cases import CASES, DTYPES, Case, Make
from tests.guard import poisoned_allocation
from tests.ops.test_contract import DTYPE_NAMES, MOVES, TOLERANCE, assert_same, leaves, map_arguments, moved
from vidtok.kernels import select

by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)


def runs(dtype: torch.dtype) -> bool:
    """bf16 exists from sm_80 on."""
    return dtype is not torch.bfloat16 or not torch.cuda.is_available() or select.sm_of(0) >= 80


def on(value, device):
    return map_arguments(value, lambda t: t.to(device))


def back(result):
    return [t.cpu() for t in leaves(result)]


def oracle(case: Case, args, kwargs):
    with vidtok.use_backend("reference"):
        return case.call(args, kwargs)


@by_dtype
@by_case
def test_equals_reference(case, dtype, backend, device):
    if not runs(dtype):
        return
    args, kwargs = case.make(Make(dtype))
    expected = oracle(case, args, kwargs)
    there = on((args, kwargs), device)
    results = []
    for _ in range(2):
        with poisoned_allocation():
            got = case.call(*there)
        assert all(t.device == device for t in leaves(got)), "a result left the device"
        results.append(back(got))
    assert_same(case, results[0], expected, dtype)
    for a, b in zip(*results):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    for a, b in zip(leaves(there), leaves((args, kwargs))):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@by_dtype
@pytest.mark.parametrize("case", MOVES, ids=str)
def test_gradient_equals_reference(case, dtype, backend, device):
    if not runs(dtype):
        return
    args, kwargs = case.make(Make(dtype))
    grads = []
    for where in ("cpu", device, device):
        name = "reference" if where == "cpu" else backend
        with vidtok.use_backend(name), poisoned_allocation():
            x, y = moved(case, *on((args, kwargs), where))
            if y.numel() == 0:
                return
            seed = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
            y.backward(seed.to(where))
            grads.append(x.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], equal_nan=True, **TOLERANCE[dtype])
    assert torch.equal(grads[1].contiguous().view(torch.uint8), grads[2].contiguous().view(torch.uint8))


@pytest.mark.parametrize("case", [c for c in CASES if c.op in ("plan_apply", "position_remap")][:1], ids=str)
def test_other_dtypes_go_to_the_reference(case, backend, device):
    args, kwargs = case.make(Make(torch.float64))
    assert_same(case, back(case.call(*on((args, kwargs), device))), oracle(case, args, kwargs), torch.float32)
