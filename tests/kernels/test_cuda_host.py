"""Every CUDA kernel, compiled for the host, on every shared case: equal to the reference, in several orders."""

from __future__ import annotations

import copy

import pytest
import torch

import vidtok
from tests.cases import CASES, DTYPES, Case, Make
from tests.guard import guarded, poisoned_allocation
from tests.ops.test_contract import DTYPE_NAMES, MOVES, TOLERANCE, assert_same, leaves, map_arguments, moved
from vidtok.kernels import cuda, select

SM = cuda.extension().build_info()["sms"][0]
HERE = [d for d in DTYPES if SM >= 80 or d is not torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", HERE, ids=[DTYPE_NAMES[DTYPES.index(d)] for d in HERE])
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def on_the_host_machine():
    with vidtok.use_backend("cuda"):
        yield
    cuda.extension().set_order(0)


def reference(case: Case, args, kwargs):
    with vidtok.use_backend("reference"):
        return case.call(args, kwargs)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def test_every_operator_runs_here():
    """No operator falls back: the module holds each, and each has its Python caller."""
    for operator in select.OPERATORS:
        assert select.can_run_cuda(operator), operator
    assert {c.op for c in CASES} == set(select.OPERATORS)


@by_dtype
@by_case
def test_equals_reference_in_every_order(case, dtype, monkeypatch):
    """Threads and blocks forward, backward and shuffled: the reference's result, with the same bits each time."""
    args, kwargs = case.make(Make(dtype))
    expected = reference(case, args, kwargs)
    before = copy.deepcopy((args, kwargs))
    first = None
    for order in (0, 1, 2):
        cuda.extension().set_order(order)
        with poisoned_allocation():
            got = case.call(args, kwargs)
        assert_same(case, got, expected, dtype)
        if first is not None:
            assert all(same_bits(a, b) for a, b in zip(leaves(got), leaves(first)))
        first = got
    now: list[torch.Tensor] = []
    then: list[torch.Tensor] = []
    map_arguments((args, kwargs), lambda t: now.append(t) or t)
    map_arguments(before, lambda t: then.append(t) or t)
    for a, b in zip(now, then):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("at", ["end", "begin"])
@by_dtype
@by_case
def test_stays_inside_its_buffers(case, dtype, at):
    args, kwargs = case.make(Make(dtype))
    expected = reference(case, args, kwargs)
    with poisoned_allocation(at):
        got = case.call(*map_arguments((args, kwargs), lambda t: guarded(t, at) if t.is_contiguous() else t))
    assert_same(case, got, expected, dtype)


@by_dtype
@pytest.mark.parametrize("case", MOVES, ids=str)
def test_gradient_equals_reference(case, dtype):
    args, kwargs = case.make(Make(dtype))
    grads = []
    for backend, order in (("reference", 0), ("cuda", 0), ("cuda", 1)):
        cuda.extension().set_order(order)
        with vidtok.use_backend(backend), poisoned_allocation("end"):
            x, y = moved(case, args, kwargs)
            if y.numel() == 0:
                return
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
            grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], equal_nan=True, **TOLERANCE[dtype])
    assert same_bits(grads[1], grads[2])


@pytest.mark.skipif(SM >= 80, reason="bf16 exists from sm_80 on")
@pytest.mark.parametrize("op", sorted(set(select.OPERATORS) - {"position_remap"}))
def test_bf16_is_refused_on_sm_70(op):
    """Everything that computes says so; bytes are moved whatever they mean."""
    case = next(
        c for c in CASES if c.op == op and not any(w in c.name for w in ("none", "empty", "gather", "identity"))
    )
    with pytest.raises(ValueError, match=r"bf16 needs sm_80 or newer, got sm_70"):
        case.call(*case.make(Make(torch.bfloat16)))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.op == "position_remap" or str(c) == "plan_apply-gather"], ids=str
)
def test_bf16_is_moved_everywhere(case):
    args, kwargs = case.make(Make(torch.bfloat16))
    assert_same(case, case.call(args, kwargs), reference(case, args, kwargs), torch.bfloat16)
