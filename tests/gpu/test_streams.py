"""Streams, a second device, and what is said when something is wrong."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.cases import Make
from tests.gpu.test_operators import back, on, oracle
from tests.ops.test_contract import FIRST, assert_same, leaves
from vidtok import ops
from vidtok.kernels import select
from vidtok.plan import Plan

CYCLES = 50_000_000


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_on_a_stream_that_is_not_the_default(case, backend, device):
    """The inputs appear late on that stream: a kernel on another one would read what was there before."""
    args, kwargs = case.make(Make(torch.float16))
    expected = oracle(case, args, kwargs)
    case.call(*on((args, kwargs), device))
    ready = on((args, kwargs), device)
    late = [t for t in leaves_of(ready) if t.is_floating_point()]
    kept = [t.clone() for t in late]
    for t in late:
        t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for t, value in zip(late, kept):
            t.copy_(value)
        got = case.call(*ready)
    stream.synchronize()
    assert_same(case, back(got), expected, torch.float16)


def leaves_of(value):
    from tests.ops.test_contract import map_arguments

    found: list[torch.Tensor] = []
    map_arguments(value, lambda t: found.append(t) or t)
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_on_a_second_device(case, backend):
    args, kwargs = case.make(Make(torch.float16))
    expected = oracle(case, args, kwargs)
    second = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    got = case.call(*on((args, kwargs), second))
    assert torch.cuda.current_device() == 0
    assert all(t.device == second for t in leaves(got))
    assert_same(case, back(got), expected, torch.float16)


def bad_plan(device):
    one = torch.tensor([0, 3], dtype=torch.int32, device=device)
    return Plan.gather(torch.tensor([0, 9, 1], dtype=torch.int32, device=device), one, one, 3)


def test_a_bad_index_is_reported_and_nothing_is_read_outside(backend, device):
    y = ops.plan_apply(bad_plan(device), torch.ones(3, 64, device=device))
    with pytest.raises(IndexError, match=r"plan_apply: expected anchor in \[-1, 3\), got 9"):
        vidtok.synchronize(device)
    assert y[0].eq(1).all() and y[1].eq(0).all()
    ops.plan_apply(Plan.identity([3], device), torch.ones(3, 64, device=device))  # reported once
    vidtok.synchronize(device)


def test_the_next_call_raises_what_an_earlier_one_reported(backend, device):
    ops.plan_apply(bad_plan(device), torch.ones(3, 64, device=device))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="an earlier call of plan_apply"):
        ops.plan_apply(Plan.identity([3], device), torch.ones(3, 64, device=device))


def test_tensors_on_two_devices_are_refused(backend, device):
    plan = Plan.identity([3])
    with pytest.raises((ValueError, RuntimeError), match=r"device|cuda|cpu"):
        ops.plan_apply(plan, torch.ones(3, 64, device=device))


def test_out_of_memory_leaves_the_callers_tensors_intact(backend, device):
    free, _ = torch.cuda.mem_get_info()
    x = torch.arange(4 * 1024.0, device=device).view(4, 1024)
    rows = min(2**31 - 2, 2 * free // (4 * 1024))
    index = torch.zeros(rows, dtype=torch.int32, device=device)
    ends = [torch.tensor([0, v], dtype=torch.int32, device=device) for v in (4, rows)]
    with pytest.raises(torch.OutOfMemoryError):
        ops.plan_apply(Plan.gather(index, *ends, 4), x)
    torch.cuda.synchronize()
    assert torch.equal(x, torch.arange(4 * 1024.0, device=device).view(4, 1024))


@pytest.mark.skipif(not torch.cuda.is_available() or select.sm_of(0) >= 80, reason="bf16 exists from sm_80 on")
def test_bf16_is_refused_before_sm_80(device):
    with vidtok.use_backend("cuda"), pytest.raises(ValueError, match="bf16 needs sm_80 or newer, got sm_70"):
        ops.bipartite_match(torch.ones(1, 6, 8, dtype=torch.bfloat16, device=device), 1)
