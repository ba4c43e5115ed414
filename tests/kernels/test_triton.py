"""Triton kernels in their interpreter, against the reference, on the shared cases and on shapes that take other paths.

Run by ``TRITON_INTERPRET=1 VIDTOK_BACKEND=triton pytest -m triton tests/kernels/test_triton.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import vidtok
from tests.cases import CASES, Make, with_rows
from tests.guard import guarded, poisoned_allocation
from tests.ops.test_contract import MOVES, TOLERANCE, assert_same, by_dtype, leaves, map_arguments, moved
from vidtok import ops
from vidtok.kernels.reference import _numerics
from vidtok.kernels.triton import _common

pytestmark = pytest.mark.triton

FILES = {"bipartite_match": "bipartite", "bipartite_merge": "bipartite"}
# In the interpreter each of these takes longer than all others together.
SLOW = {"plan_apply-gather large"}


def written(op: str) -> bool:
    return importlib.util.find_spec(f"vidtok.kernels.triton.{FILES.get(op, op)}") is not None


HERE = [c for c in CASES if written(c.op) and str(c) not in SLOW]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, so that a test cannot pass by falling back to the reference."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    run = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names


def both(call: Any) -> tuple[Any, Any]:
    """Result of the reference and of Triton."""
    with vidtok.use_backend("reference"):
        expected = call()
    with vidtok.use_backend("triton"), poisoned_allocation("end"):
        return expected, call()


def assert_equal(ours: Any, theirs: Any) -> None:
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@by_dtype
@pytest.mark.parametrize("case", HERE, ids=str)
def test_equals_reference(case, dtype, launches):
    args, kwargs = case.make(Make(dtype))

    def place(t: Tensor) -> Tensor:
        return guarded(t, "end") if t.is_contiguous() else t

    args, kwargs = map_arguments((args, kwargs), place)
    expected, got = both(lambda: case.call(args, kwargs))
    assert_same(case, got, expected, dtype)
    assert launches or all(t.numel() <= 1 for t in leaves(expected))


@by_dtype
@pytest.mark.parametrize("case", [c for c in MOVES if c in HERE], ids=str)
def test_gradient_equals_reference(case, dtype, launches):
    args, kwargs = case.make(Make(dtype))
    grads = []
    for backend in ("reference", "triton"):
        with vidtok.use_backend(backend), poisoned_allocation("end"):
            x, y = moved(case, args, kwargs)
            if y.numel() == 0 or not y.requires_grad:
                return
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
            grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], equal_nan=True, **TOLERANCE[dtype])
    # The gradient of a gather of riders is torch's own.
    assert launches or case.op == "position_remap"


@pytest.mark.parametrize("case", [c for c in HERE if "random" in c.name or "vit" in c.name], ids=str)
def test_deterministic(case):
    args, kwargs = case.make(Make(torch.bfloat16))
    with vidtok.use_backend("triton"):
        assert_equal(case.call(args, kwargs), case.call(args, kwargs))


@pytest.mark.parametrize("file", sorted({FILES.get(c.op, c.op) for c in HERE}))
def test_specimens_name_every_argument(file):
    found = importlib.import_module(f"vidtok.kernels.triton.{file}").specimens()
    assert len({s.name for s in found}) == len(found) > 0
    for s in found:
        given = set(s.signature) | set(s.constexprs)
        assert given == set(s.kernel.arg_names), (s.name, given ^ set(s.kernel.arg_names))
        assert not set(s.signature) & set(s.constexprs)


# ---------------------------------------------------------------------- what all share
def run(kernel: Any, *tensors: Tensor, **options: Any) -> None:
    kernel[(1,)](*tensors, **options)


@triton.jit
def grids(x, bits, cosine, inverse, key, half, half_key, n: tl.constexpr):
    at = tl.arange(0, n)
    v = tl.load(x + at)
    tl.store(bits + at, _common.round_16_bits(tl.abs(v)))
    tl.store(cosine + at, _common.round_cosine(v, 1048576.0))
    tl.store(inverse + at, _common.inverse_norm(tl.abs(v)))
    tl.store(key + at, _common.order_key(v).to(tl.int64))
    tl.store(half_key + at, _common.order_key(tl.load(half + at)).to(tl.int64))


@triton.jit
def exponential(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, _common.exp_not_above_0(tl.load(x + at)))


def test_grids_are_those_of_the_reference():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e-42, 1e-45, -1e-39, 1.0, -1.0, 1.5, -torch.nan]
    x[: len(special)] = torch.tensor(special)
    x[100:300] *= 1e-39
    bits, cosine, inverse = (torch.empty(1024) for _ in range(3))
    for half in (x.half(), x.bfloat16()):
        key, half_key = (torch.empty(1024, dtype=torch.int64) for _ in range(2))
        run(grids, x, bits, cosine, inverse, key, half, half_key, n=1024)
        assert_equal(bits, _numerics.round_bits(x.abs()))
        assert_equal(cosine, _numerics.round_cosine(x, torch.float32))
        assert torch.equal(torch.argsort(key, descending=True, stable=True), _numerics.rank(x))
        assert torch.equal(torch.argsort(half_key, descending=True, stable=True), _numerics.rank(half))
    squared = x.abs()
    expected = torch.where(squared == 0, 0.0, squared.double().rsqrt())
    expected = torch.where(torch.isfinite(squared), expected, torch.nan).float()
    torch.testing.assert_close(inverse, expected, rtol=2e-7, atol=0, equal_nan=True)


def test_exponential_is_within_two_units():
    x = -torch.rand(8192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2.1, 8192)
    x[:4] = torch.tensor([0.0, -0.0, -torch.inf, torch.nan])
    y = torch.empty(8192)
    run(exponential, x, y, n=8192)
    assert y[:3].tolist() == [1.0, 1.0, 0.0] and y[3].isnan()
    exact = x[4:].double().exp()
    torch.testing.assert_close(y[4:].double(), exact, rtol=2**-23, atol=2e-45)


# ---------------------------------------------------------------------- topk_select
def test_topk_shares_a_long_segment_among_programs(monkeypatch, launches):
    from vidtok.kernels.triton import topk_select

    monkeypatch.setattr(topk_select, "ONE_PROGRAM", 64)
    monkeypatch.setattr(topk_select, "_CHUNK", 512)
    make = Make(torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for lengths, keep in (((6000,), 1500), ((1000, 3000, 1, 2000), [10, 2999, 0, 700]), ((700, 900), 0)):
            score = make.normal(sum(lengths)).to(dtype)
            score[::5], score[7], score[11] = 0.5, torch.nan, -torch.inf
            expected, got = both(lambda s=score, k=keep, n=lengths: ops.topk_select(s, k, cu_seqlens=make.offsets(*n)))
            assert torch.equal(got, expected)
    assert {"count_digits", "count_chosen", "emit_chunk"} <= set(launches)


def test_topk_reports_what_the_host_cannot_see():
    score, cu = torch.randn(900), torch.tensor([0, 200, 900], dtype=torch.int32)
    with vidtok.use_backend("triton"):
        with pytest.raises(ValueError, match=r"expected keep in \[0, 201\), got 205"):
            ops.topk_select(score, [205, 3], cu_seqlens=cu)
        # The report is gone with its exception.
        assert ops.topk_select(score, [200, 3], cu_seqlens=cu).shape == (203,)
        bad = torch.tensor([0, 1200, 900], dtype=torch.int32)
        with pytest.raises(IndexError, match="expected cu_seqlens"):
            torch.ops.vidtok.topk_select(score, [1, 1], bad)


# ---------------------------------------------------------------------- attention_topk
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("rows", [1, 9])
def test_attention_over_many_splits(rows, reduce, launches):
    make = Make(torch.float32)
    query, key = make.normal(2, 4, rows, 24), make.normal(2, 2, 700, 24)
    key[0, 0, 5, 0], key[1, 1, 9, 3] = torch.inf, -torch.inf
    position = torch.tensor([[699] * rows, [*range(300, 300 + rows)]])
    position[1, 0] = -1
    mask = torch.ones(2, 700, dtype=torch.bool)
    mask[0, :6], mask[1, 100:200] = False, False
    span, group = [(0, 6, 300), (1, 0, 40), (0, 320, 700), (1, 50, 400)], [3, 1, 3, 1]

    def call(columns: slice = slice(None)) -> Any:
        return ops.attention_topk(
            query, key, [50, 60], span=span, group=group, mask=mask, query_position=position, reduce=reduce
        )

    expected, got = both(call)
    torch.testing.assert_close(got.score, expected.score, rtol=2e-5, atol=2e-6, equal_nan=True)
    assert got.index.shape == (110,)
    picked = expected.score.new_zeros(2, 700)
    at = 0
    for b, lo, hi in span:
        picked[b, lo:hi] = got.score[at : at + hi - lo]
        at += hi - lo
    # Each group's choice is the exact best of the scores returned.
    for g, (b, members) in enumerate(((0, [(6, 300), (320, 700)]), (1, [(0, 40), (50, 400)]))):
        place = torch.cat([torch.arange(lo, hi) for lo, hi in members])
        with vidtok.use_backend("reference"):
            best = ops.topk_select(picked[b, place], (50, 60)[g])
        assert torch.equal(got.index[(0, 50)[g] : (50, 110)[g]], place[best])
    assert ("combine" in launches) == (rows > 1)


def test_attention_of_a_row_is_the_same_in_any_batch():
    make = Make(torch.bfloat16)
    query, key = make.normal(3, 4, 1, 64), make.normal(3, 2, 300, 64)
    with vidtok.use_backend("triton"):
        together = ops.attention_topk(query, key, 20, span=[(b, 0, 300) for b in range(3)])
        for b in range(3):
            alone = ops.attention_topk(query[b : b + 1], key[b : b + 1], 20, span=[(0, 0, 300)])
            assert torch.equal(alone.score, together.score[300 * b : 300 * b + 300])
            assert torch.equal(alone.index, together.index[20 * b : 20 * b + 20])


def test_attention_refuses_what_does_not_fit():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 20, 8)
    wrong = [
        (IndexError, {"keep": 1, "span": [(0, 5, 21)]}),
        (ValueError, {"keep": 9, "span": [(0, 0, 8)]}),
        (ValueError, {"keep": [1, 1], "span": [(0, 0, 8)]}),
        (ValueError, {"keep": 2, "span": [(0, 5, 9), (0, 0, 4)], "group": [1, 1]}),
    ]
    for error, arguments in wrong:
        messages = []
        for backend in ("reference", "triton"):
            with vidtok.use_backend(backend), pytest.raises(error) as raised:
                ops.attention_topk(q, k, arguments["keep"], span=arguments["span"], group=arguments.get("group"))
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


# ---------------------------------------------------------------------- bipartite
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_bipartite_matches_long_sequences_by_strips(heads, ragged, monkeypatch, launches):
    from vidtok.kernels.triton import bipartite

    monkeypatch.setattr(bipartite, "_STRIPS", 1)
    make = Make(torch.bfloat16)
    lengths = (3, 150, 0, 301)
    lead = (sum(lengths),) if ragged else (2, 227)
    shape = (*lead[:-1], heads, lead[-1], 16) if heads > 1 else (*lead, 16)
    metric = with_rows(make.exact(*shape), zero=(2, 60), nan=(5, 90))
    options: dict[str, Any] = {"protected": make.ints(4, *lead) == 0, "size": 1.0 + make.ints(4, *lead).float()}
    if ragged:
        options["cu_seqlens"] = make.offsets(*lengths)
    x = make.exact(*lead, 24)
    expected, got = both(lambda: ops.bipartite_merge(x, metric, 60, **options))
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, **TOLERANCE[a.dtype])
        else:
            assert torch.equal(a, b)
    assert {"match", "list_one", "count_kinds"} <= set(launches)


def test_bipartite_is_two_launches(launches):
    make = Make(torch.float16)
    with vidtok.use_backend("triton"):
        ops.bipartite_merge(make.exact(2, 197, 48), make.exact(2, 4, 197, 16), 16, protected=1)
    assert launches == ["match_and_list", "merge"]


def test_bipartite_of_a_sequence_is_the_same_in_any_batch():
    make = Make(torch.bfloat16)
    metric, x = make.normal(3, 90, 32), make.normal(3, 90, 20)
    with vidtok.use_backend("triton"):
        together = ops.bipartite_merge(x, metric, 30)
        for b in range(3):
            alone = ops.bipartite_merge(x[b : b + 1], metric[b : b + 1], 30)
            assert torch.equal(alone.x[0], together.x[b]) and torch.equal(alone.size[0], together.size[b])
            assert torch.equal(alone.plan.member + 90 * b, together.plan.member[90 * b : 90 * b + 90])


def test_bipartite_refuses_bad_offsets():
    metric = torch.randn(20, 8)
    bad = torch.tensor([0, 15, 12, 20], dtype=torch.int32)
    for mask in (None, torch.zeros(20, dtype=torch.bool)):
        with vidtok.use_backend("triton"), pytest.raises(IndexError, match="expected cu_seqlens that start at 0"):
            torch.ops.vidtok.bipartite_match(metric, 3, None, 0, mask, bad)
