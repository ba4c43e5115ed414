"""bipartite_match and bipartite_merge: an oracle in plain Python, ties, ragged input, cuts that leave no trace."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vidtok
from tests.cases import DTYPES, Make, with_rows
from tests.guard import guarded, poisoned_allocation
from vidtok import ops
from vidtok.kernels import select

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def lists(plan):
    return plan.cu_seqlens_in, plan.cu_seqlens_out, plan.anchor, plan.member, plan.offset, plan.weight


def assert_equal_plans(got, expected):
    for a, b in zip(lists(got), lists(expected)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_as_reference(metric, r, x, **kwargs):
    """Match and merge agree with the reference; decisions and, in fp32, values to the bit."""
    with vidtok.use_backend("reference"):
        expected = ops.bipartite_merge(x, metric, r, **kwargs)
    with poisoned_allocation():
        got = ops.bipartite_merge(x, metric, r, **kwargs)
        plan = ops.bipartite_match(metric, r, **kwargs)
    assert_equal_plans(got.plan, expected.plan)
    assert_equal_plans(plan, expected.plan)
    torch.testing.assert_close(got.size, expected.size, rtol=0, atol=0, equal_nan=True)
    tolerance = 0 if x.dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(got.x, expected.x, rtol=tolerance, atol=0, equal_nan=True)
    return got


def oracle(metric, r, protected=0):
    """Anchors and members of one fp32 sequence of exact values, from the definition, in rational arithmetic."""
    rows = [[Fraction(v) for v in row] for row in metric.tolist()]
    tokens = len(rows)
    sources = [i for i in range(protected, tokens) if i % 2 == 0]
    destinations = [i for i in range(protected, tokens) if i % 2 == 1]
    r = min(r, (tokens - protected) // 2, len(sources)) if destinations else 0

    def cosine(i, j):
        dot = sum((a * b for a, b in zip(rows[i], rows[j])), Fraction(0))
        norm = math.sqrt(sum(a * a for a in rows[i]) * sum(a * a for a in rows[j]))
        return round(float(dot) / norm * 2**20) if norm else 0

    best = {}
    for i in sources:
        scores = [cosine(i, j) for j in destinations]
        best[i] = (max(scores), destinations[scores.index(max(scores))]) if scores else (0, 0)
    merged = sorted(sources, key=lambda i: (-best[i][0], i))[:r]
    anchors = [*range(protected), *(i for i in sources if i not in merged), *destinations]
    return anchors, [sorted([a, *(i for i in merged if best[i][1] == a)]) for a in anchors]


@pytest.mark.parametrize("protected", [0, 1, 3])
@pytest.mark.parametrize("tokens", [2, 9, 40, 67])
def test_decides_as_the_definition_says(tokens, protected, isa):
    metric = Make(torch.float32, tokens).exact(tokens, 6, levels=3)
    metric[tokens // 2 :: 5] = metric[: len(metric[tokens // 2 :: 5])]  # duplicates
    for r in (1, tokens // 4, tokens):
        plan = ops.bipartite_match(metric[None], r, protected=min(protected, tokens))
        anchors, members = oracle(metric, r, min(protected, tokens))
        assert plan.anchor.tolist() == anchors
        offset = plan.offset.tolist()
        assert [plan.member[a:b].tolist() for a, b in zip(offset, offset[1:])] == members


@by_dtype
@pytest.mark.parametrize(("tokens", "channels"), [(1, 4), (2, 1), (31, 15), (66, 64), (197, 33), (260, 513)])
def test_dense_equals_reference(tokens, channels, dtype, isa):
    make = Make(dtype, tokens)
    metric, x = make.exact(3, tokens, channels), make.exact(3, tokens, 75, levels=64)
    size = make.ints(4, 3, tokens).float() + 1
    for r in (0, 1, tokens // 3, tokens // 2, 10 * tokens):
        assert_as_reference(metric, r, x)
        assert_as_reference(metric, r, x, size=size, protected=1)


@by_dtype
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_keys_are_averaged_over_heads(heads, dtype, isa):
    """Keys as attention holds them, [B, T, H, D] seen as [B, H, T, D], without a copy."""
    make = Make(dtype)
    keys, x = make.exact(2, 50, heads, 24).transpose(1, 2), make.exact(2, 50, 16)
    assert not keys.is_contiguous() or heads == 1
    got = assert_as_reference(keys, 11, x)
    if dtype == torch.float32:
        assert_equal_plans(got.plan, ops.bipartite_match(keys.mean(1), 11))
    packed = make.exact(50, heads, 24).transpose(0, 1)
    assert_as_reference(packed, 5, x[0], cu_seqlens=make.offsets(20, 0, 29, 1))


@by_dtype
def test_ragged_sequences_have_their_own_count(dtype, isa):
    make = Make(dtype)
    lengths = (0, 1, 2, 33, 7, 100, 0, 3)
    n = sum(lengths)
    metric, x = make.exact(n, 20), make.exact(n, 9)
    cu = make.offsets(*lengths)
    got = assert_as_reference(metric, 8, x, cu_seqlens=cu, protected=1)
    counts = [min(8, (t - 1) // 2, (t + 1) // 2 - 1) if t > 2 else 0 for t in lengths]
    assert got.plan.cu_seqlens_out.diff().tolist() == [t - max(0, c) for t, c in zip(lengths, counts)]
    for i, (lo, hi) in enumerate(zip(cu.tolist(), cu[1:].tolist())):
        alone = ops.bipartite_merge(x[None, lo:hi], metric[None, lo:hi], 8, protected=min(1, hi - lo))
        a, b = got.plan.cu_seqlens_out[i : i + 2].tolist()
        assert torch.equal(alone.x[0], got.x[a:b]), "a sequence alone equals itself in a batch, bit for bit"


@by_dtype
def test_masks_protect(dtype, isa):
    make = Make(dtype)
    metric, x = make.exact(3, 41, 12), make.exact(3, 41, 5)
    mask = make.ints(10, 3, 41) < 4
    got = assert_as_reference(metric, 30, x, protected=mask)
    kept = got.plan.anchor.view(3, -1)
    for b in range(3):
        stays = mask[b].nonzero().squeeze(1)
        assert kept[b, : len(stays)].tolist() == (stays + b * 41).tolist()
    assert_as_reference(metric, 5, x, protected=torch.ones(3, 41, dtype=torch.bool))
    odd_only = (torch.arange(41) % 2 == 1).expand(3, 41)
    assert ops.bipartite_match(metric, 5, protected=odd_only).num_out == 3 * 41, "no destinations, no merges"
    flat = mask.reshape(-1)
    assert_as_reference(metric.reshape(-1, 12), 6, x.reshape(-1, 5), protected=flat, cu_seqlens=make.offsets(50, 0, 73))


@by_dtype
def test_equal_tokens_tie_and_the_index_decides(dtype, isa):
    """Static video: the same frame again. Values whose dot products do not round alike everywhere."""
    frame = Make(dtype).normal(1, 1, 96)
    metric = frame.expand(1, 120, 96).contiguous()
    plan = ops.bipartite_match(metric, 20)
    assert plan.anchor.tolist() == [*range(40, 120, 2), *range(1, 120, 2)]
    first = plan.member[: plan.offset[41]].tolist()[40:]
    assert first == sorted([*range(0, 40, 2), 1])


@by_dtype
def test_opposite_tokens_tie_at_minus_one(dtype, isa):
    """Cosine −1 to every destination, the first of which is NaN: the clamp below, and its first number."""
    token = Make(dtype).normal(96)
    metric = torch.stack([token, -token] * 20)[None].contiguous()
    metric[0, 1, 3] = float("nan")
    assert_as_reference(metric, 7, metric)
    plan = ops.bipartite_match(metric, 7)
    start, stop = plan.offset[14:16].tolist()
    assert plan.member[start:stop].tolist() == [0, 2, 3, 4, 6, 8, 10, 12]


@by_dtype
def test_zero_nan_and_infinite_rows(dtype, isa):
    metric = with_rows(Make(dtype).exact(2, 40, 20), zero=(0, 7, 8), nan=(4, 11, 12), inf=(2, 21))
    for r in (3, 17, 18, 20):
        assert_as_reference(metric, r, Make(dtype).exact(2, 40, 8))
    nothing = torch.full((1, 10, 4), float("nan"), dtype=dtype)
    assert ops.bipartite_match(nothing, 2).anchor.tolist() == [4, 6, 8, 1, 3, 5, 7, 9]
    assert_as_reference(nothing, 2, torch.ones(1, 10, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 0, 4), (2, 1, 4)])
def test_empty(shape, isa):
    x = torch.ones(shape)
    got = ops.bipartite_merge(x, x, 3)
    assert got.x.shape == x.shape
    assert got.size.shape == x.shape[:2]
    assert ops.bipartite_match(x, 3).num_out == shape[0] * shape[1]


def test_strided_rows_are_read_in_place(isa):
    make = Make(torch.float32)
    wide, other = make.exact(2, 60, 90), make.exact(4, 120, 50)
    metric, x = wide[:, ::2, 5:38], other[::2, ::4, 3:44]
    for guard in ("begin", "end"):
        dense = assert_as_reference(guarded(metric, guard), 9, guarded(x, guard))
        strided = assert_as_reference(metric, 9, x)
        assert torch.equal(dense.x, strided.x)
        assert_equal_plans(dense.plan, strided.plan)


def test_a_token_that_meets_no_other_keeps_every_bit(isa):
    x = torch.randint(-(2**31), 2**31, (1, 64, 37), dtype=torch.int64).to(torch.int32).view(torch.float32)
    metric = Make(torch.float32).normal(1, 64, 8)
    got = ops.bipartite_merge(x, metric, 9, size=torch.full((1, 64), 0.3))
    single = (got.plan.offset.diff() == 1).nonzero().squeeze(1)
    assert len(single) > 40
    assert torch.equal(got.x[0, single].view(torch.int32), x[0, got.plan.anchor[single].long()].view(torch.int32))


def test_merged_values_are_means_by_size(isa):
    make = Make(torch.float32)
    x, metric = make.normal(2, 90, 100), make.normal(2, 90, 12)
    size = torch.rand(2, 90, generator=make.generator) + 0.1
    got = ops.bipartite_merge(x, metric, 45, size=size)
    plan = got.plan
    owner = torch.repeat_interleave(torch.arange(plan.num_out), plan.offset.diff().long())
    member = plan.member.long()
    mass = size.view(-1).double()[member]
    total = torch.zeros(plan.num_out, dtype=torch.float64).index_add_(0, owner, mass)
    mean = torch.zeros(plan.num_out, 100, dtype=torch.float64)
    mean.index_add_(0, owner, x.view(-1, 100).double()[member] * mass[:, None])
    torch.testing.assert_close(got.x.view(-1, 100).double(), mean / total[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.size.view(-1).double(), total, rtol=1e-6, atol=0)
    assert int(plan.offset.diff().max()) > 2
    torch.testing.assert_close(got.size.sum(1), size.sum(1))


def test_streams_large_outputs(isa):
    """Above the size at which stores pass the cache; rows off their alignment too."""
    make = Make(torch.float32)
    for c in (1280, 1283):
        x = make.normal(4, 300, c)
        assert_as_reference(make.exact(4, 300, 16), 150, x)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_threads_leave_no_trace(batch, isa):
    make = Make(torch.float32)
    x, metric = make.normal(batch, 400, 64), make.normal(batch, 400, 32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(ops.bipartite_merge(x, metric, 77))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.x, results[0].x)
        assert_equal_plans(other.plan, results[0].plan)


@by_dtype
def test_random_decisions_lie_within_the_rounding_bound(dtype, isa):
    """Each merge's cosine is, within a step of the grid, the best there is for its source and above what stays."""
    make = Make(dtype)
    metric = make.normal(2, 150, 200)
    plan = ops.bipartite_match(metric, 40)
    step = 2.0**-20 if dtype == torch.float32 else 2.0**-16
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    for b in range(2):
        cosine = unit[b, ::2] @ unit[b, 1::2].T
        best = cosine.amax(1)
        lo, hi = plan.cu_seqlens_out[b : b + 2].tolist()
        merged = {}
        for m in range(lo, hi):
            for token in plan.member[plan.offset[m] : plan.offset[m + 1]].tolist():
                if token != int(plan.anchor[m]):
                    merged[(token - b * 150) // 2] = (int(plan.anchor[m]) - b * 150) // 2
        assert len(merged) == 40
        for s, d in merged.items():
            assert cosine[s, d] >= best[s] - 2 * step
        stays = [s for s in range(75) if s not in merged]
        assert min(best[s] for s in merged) >= max(best[s] for s in stays) - 2 * step


@by_dtype
def test_gradient_is_the_transpose(dtype, isa):
    make = Make(dtype)
    x = make.exact(2, 60, 33, levels=64).requires_grad_()
    metric = make.exact(2, 60, 10).requires_grad_()
    size = make.ints(3, 2, 60).float() + 1
    got = ops.bipartite_merge(x, metric, 20, size=size)
    upstream = make.exact(*got.x.shape, levels=32)
    got.x.backward(upstream)
    assert metric.grad is None
    dense = torch.zeros(got.plan.num_out, 120, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(got.plan.num_out), got.plan.offset.diff().long())
    dense[owner, got.plan.member.long()] = got.plan.weight.double()
    expected = dense.T @ upstream.view(-1, 33).double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(x.grad.view(-1, 33).double(), expected, rtol=tolerance, atol=1e-6)


def test_falling_offsets_never_reach_the_kernel(isa):
    metric = torch.ones(10, 4)
    for cu in ([0, 7, 5, 10], [0, 12, 10], [1, 10], [0, 9]):
        offsets = torch.tensor(cu, dtype=torch.int32)
        with pytest.raises((ValueError, IndexError), match="expected"):
            ops.bipartite_match(metric, 2, cu_seqlens=offsets)
        with pytest.raises(IndexError, match="expected cu_seqlens"):
            torch.ops.vidtok.bipartite_match.default(metric, 2, None, 0, None, offsets)


@given(data=st.data())
def test_any_arguments_agree_with_the_reference(data):
    before = select.build_info()["isa"]
    select.extension().force_isa(data.draw(st.sampled_from(select.build_info()["isa_usable"])))
    try:
        dtype = data.draw(st.sampled_from(DTYPES))
        make = Make(dtype, data.draw(st.integers(0, 99)))
        batch, tokens = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 50))
        metric = make.exact(batch, tokens, data.draw(st.integers(1, 40)), levels=data.draw(st.integers(0, 3)))
        x = make.exact(batch, tokens, data.draw(st.integers(1, 70)), levels=64)
        protected = data.draw(st.one_of(st.integers(0, tokens), st.just(make.ints(3, batch, tokens) == 0)))
        size = data.draw(st.sampled_from([None, make.ints(3, batch, tokens).float() + 1]))
        assert_as_reference(metric, data.draw(st.integers(0, 60)), x, protected=protected, size=size)
    finally:
        select.extension().force_isa(before)
