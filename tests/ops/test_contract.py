"""What every operator promises, on every shared case, dtype and instruction set."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import vidtok
from tests.cases import CASES, DTYPES, Case, Make
from tests.guard import guarded, map_tensors, poisoned_allocation
from vidtok.plan import Plan

DTYPE_NAMES = [str(d).removeprefix("torch.") for d in DTYPES]
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def leaves(result: Any) -> list[Tensor]:
    """Tensors of a result in order, plans opened."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Plan):
        return [t for f in fields(Plan) if isinstance(t := getattr(result, f.name), Tensor)]
    if isinstance(result, (list, tuple)):
        return [t for part in result for t in leaves(part)]
    return []


def map_arguments(value: Any, fn: Any) -> Any:
    """``fn`` on every tensor of the arguments, plans included."""
    if isinstance(value, Plan):
        parts = {f.name: getattr(value, f.name) for f in fields(Plan)}
        return Plan(**{k: fn(v) if isinstance(v, Tensor) else v for k, v in parts.items()})
    if isinstance(value, tuple):
        return tuple(map_arguments(v, fn) for v in value)
    if isinstance(value, dict):
        return {k: map_arguments(v, fn) for k, v in value.items()}
    return map_tensors(value, fn)


def assert_same(case: Case, got: Any, expected: Any, dtype: torch.dtype) -> None:
    ours, theirs = leaves(got), leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            tolerance = TOLERANCE[a.dtype if a.dtype in TOLERANCE else dtype]
            if case.op == "contour_select":
                tolerance = {"rtol": 2e-3, "atol": 1e-3}
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
        elif case.decides or case.op not in DECISIONS:
            assert torch.equal(a, b), (a, b)


DECISIONS = {"attention_topk", "bipartite_merge", "cluster_dpc_knn", "contour_select", "topk_select"}


@by_dtype
@by_case
def test_native_equals_reference(case, dtype, isa):
    args, kwargs = case.make(Make(dtype))
    with vidtok.use_backend("reference"):
        expected = case.call(args, kwargs)
    with poisoned_allocation():
        got = case.call(args, kwargs)
    assert_same(case, got, expected, dtype)


@pytest.mark.parametrize("at", ["end", "begin"])
@by_dtype
@by_case
def test_stays_inside_its_buffers(case, dtype, at, isa):
    args, kwargs = case.make(Make(dtype))
    with vidtok.use_backend("reference"):
        expected = case.call(args, kwargs)

    def place(t: Tensor) -> Tensor:
        return guarded(t, at) if t.is_contiguous() else t

    with poisoned_allocation(at):
        got = case.call(*map_arguments((args, kwargs), place))
    assert_same(case, got, expected, dtype)


@by_dtype
@by_case
def test_deterministic_and_leaves_inputs_alone(case, dtype, isa):
    args, kwargs = case.make(Make(dtype))
    before = copy.deepcopy((args, kwargs))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(leaves(case.call(args, kwargs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (
                a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
                if a.dtype != torch.bfloat16
                else (torch.equal(a.view(torch.int16), b.view(torch.int16)))
            )
    changed: list[Tensor] = []
    kept: list[Tensor] = []
    map_arguments((args, kwargs), lambda t: changed.append(t) or t)
    map_arguments(before, lambda t: kept.append(t) or t)
    for a, b in zip(changed, kept):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@by_case
def test_reference_agrees_with_its_fp64_self(case):
    """The fp32 reference takes the decisions of the fp64 oracle on exactly representable values."""
    if not case.decides:
        return
    make64 = Make(torch.float64)
    args64, kwargs64 = case.make(make64)
    args, kwargs = case.make(Make(torch.float32))
    with vidtok.use_backend("reference"):
        ours, oracle = case.call(args, kwargs), case.call(args64, kwargs64)
    for a, b in zip(leaves(ours), leaves(oracle)):
        if a.is_floating_point():
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(a, b)


# ---------------------------------------------------------------------- torch's own contracts
FIRST = {c.op: c for c in reversed([c for c in CASES if "empty" not in c.name and "none" not in c.name])}


def float_inputs(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_arguments((args, kwargs), lambda t: found.append(t) or t)
    return [t for t in found if t.is_floating_point()]


@pytest.mark.parametrize("case", [c for c in CASES if "empty" not in c.name], ids=str)
def test_compiles_without_graph_breaks(case):
    torch._dynamo.reset()
    args, kwargs = case.make(Make(torch.float32))
    expected = case.call(args, kwargs)
    got = torch.compile(lambda a, k: case.call(a, k), fullgraph=True, backend="aot_eager")(args, kwargs)
    for a, b in zip(leaves(got), leaves(expected)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_compiles_with_inductor(case):
    torch._dynamo.reset()
    args, kwargs = case.make(Make(torch.float32))
    expected = case.call(args, kwargs)
    got = torch.compile(lambda a, k: case.call(a, k), fullgraph=True)(args, kwargs)
    for a, b in zip(leaves(got), leaves(expected)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_exports(case):
    class Module(torch.nn.Module):
        def forward(self, args: Any, kwargs: Any) -> list[Tensor]:
            return leaves(case.call(args, kwargs))

    args, kwargs = case.make(Make(torch.float32))
    expected = leaves(case.call(args, kwargs))
    program = torch.export.export(Module(), (args, kwargs))
    for a, b in zip(program.module()(args, kwargs), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def recorded_calls(case: Case, dtype: torch.dtype, grad: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered operators a public call makes, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "vidtok":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    args, kwargs = case.make(Make(dtype))
    if grad:
        args = map_arguments(args, lambda t: t.requires_grad_() if t.is_floating_point() and t.dim() > 1 else t)
    with Record():
        case.call(args, kwargs)
    return calls


DIFFERENTIABLE = ("bipartite_merge", "plan_apply", "pool_packed")
CHECKED = [(c, False) for c in FIRST.values()] + [(c, True) for c in FIRST.values() if c.op in DIFFERENTIABLE]


@pytest.mark.parametrize(("case", "grad"), CHECKED, ids=lambda v: str(v) if isinstance(v, Case) else f"grad={v}")
def test_opcheck(case, grad):
    calls = recorded_calls(case, torch.float32, grad)
    assert calls and (not grad or calls[0][0]._opname == f"{case.op}_grad")
    for func, args in calls:
        args = map_tensors(
            args, lambda t: t.detach().clone().requires_grad_(grad and t.is_floating_point() and t.dim() > 1)
        )
        tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(func, args, test_utils=tests)


# ---------------------------------------------------------------------- gradients
MOVES = [c for c in CASES if c.op in ("plan_apply", "pool_packed", "bipartite_merge", "position_remap")]


def moved(case: Case, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """The operator's tensor that carries gradients, and its result."""
    x = args[1] if case.op in ("plan_apply", "position_remap") else args[0]
    x = x.detach().clone().requires_grad_()
    args = (args[0], x, *args[2:]) if case.op in ("plan_apply", "position_remap") else (x, *args[1:])
    return x, leaves(case.call(args, kwargs))[0]


@pytest.mark.parametrize("case", [c for c in MOVES if "NaN" not in c.name and "large" not in c.name], ids=str)
def test_gradcheck(case):
    args, kwargs = case.make(Make(torch.float64))

    def fn(x: Tensor) -> Tensor:
        here = (args[0], x, *args[2:]) if case.op in ("plan_apply", "position_remap") else (x, *args[1:])
        return leaves(case.call(here, kwargs))[0]

    x = args[1] if case.op in ("plan_apply", "position_remap") else args[0]
    if not x.is_floating_point() or x.numel() == 0:
        return
    assert torch.autograd.gradcheck(fn, (x.detach().clone().requires_grad_(),), fast_mode=True)


@by_dtype
@pytest.mark.parametrize("case", MOVES, ids=str)
def test_native_gradient_equals_reference(case, dtype, isa):
    args, kwargs = case.make(Make(dtype))
    grads = []
    for backend in ("reference", "auto"):
        with vidtok.use_backend(backend), poisoned_allocation("end"):
            x, y = moved(case, args, kwargs)
            if y.numel() == 0:
                return
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
            grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], equal_nan=True, **TOLERANCE[dtype])


def test_gradient_is_bit_identical_across_threads(isa):
    make = Make(torch.bfloat16)
    args, _ = next(c for c in CASES if str(c) == "plan_apply-mean").make(make)
    threads, grads = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            x = args[1].detach().clone().requires_grad_()
            vidtok.ops.plan_apply(args[0], x).float().square().sum().backward()
            grads.append(x.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g.view(torch.int16), grads[0].view(torch.int16)) for g in grads[1:])
