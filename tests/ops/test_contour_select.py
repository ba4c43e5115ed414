"""contour_select: the compiled kernels against the reference and against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import DTYPES, Make
from tests.guard import guarded, poisoned_allocation
from vidtok import ops
from vidtok.kernels.reference.contour_select import RULES, projection
from vidtok.kernels.select import use_backend

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_rule = pytest.mark.parametrize("rule", RULES)


def agree(x: Tensor, num, **options):
    """Both accumulate in double and round to 16 bits: the same decisions, and distances within one such step."""
    got = ops.contour_select(x, num, **options)
    with use_backend("reference"):
        expected = ops.contour_select(x, num, **options)
    assert got.distance.dtype == torch.float32 and got.index.dtype == torch.int64
    torch.testing.assert_close(got.distance, expected.distance, rtol=2.0**-15, atol=0, equal_nan=True)
    if torch.equal(got.distance.nan_to_num(), expected.distance.nan_to_num()):
        assert torch.equal(got.index, expected.index)
    return got


def expected_distance(x: np.ndarray, query: np.ndarray | None, rank: int, seed: int) -> np.ndarray:
    """From the formulas; no rounding."""
    t, c = x.shape
    r = min(rank, t // 4, c)
    if r == 0:
        return np.zeros(t)
    weight = np.full(t, 1 / t)
    if query is not None:
        cosine = x @ query / np.linalg.norm(x, axis=1) / np.linalg.norm(query)
        weight = np.exp(cosine / 0.1 - (cosine / 0.1).max())
        weight /= weight.sum()
    z = x @ projection(c, r, seed).numpy()
    centred = z - weight @ z
    spread = (centred * weight[:, None]).T @ centred
    sigma = 0.9 * spread + 0.1 * np.trace(spread) / r * np.eye(r)
    return np.einsum("ti,ij,tj->t", centred, np.linalg.inv(sigma), centred)


@by_dtype
@by_rule
@pytest.mark.parametrize(
    "t,c,num,rank", [(1, 4, 1, 64), (3, 9, 2, 64), (32, 300, 8, 64), (301, 1030, 40, 64), (64, 5, 64, 3)]
)
def test_same_choice_as_the_reference(t, c, num, rank, rule, dtype, isa):
    x = Make(dtype, t).normal(t, c)
    got = agree(x, num, rule=rule, rank=rank, seed=t)
    assert got.index.shape == (num,) and (got.index.diff() > 0).all()
    agree(x, num, rule=rule, rank=rank, query=Make(dtype, 1).normal(c))


@pytest.mark.parametrize("with_query", [False, True])
def test_distances_follow_the_formula(with_query, isa):
    x, query = Make(torch.float32, 2).normal(90, 120), Make(torch.float32, 3).normal(120) if with_query else None
    got = ops.contour_select(x, 9, query=query, rank=16, seed=5)
    wanted = expected_distance(x.double().numpy(), None if query is None else query.double().numpy(), 16, 5)
    np.testing.assert_allclose(got.distance.numpy(), wanted, rtol=2.0**-15)
    assert not np.allclose(expected_distance(x.double().numpy(), None, 16, 6), wanted, rtol=1e-2)


def test_rules_follow_their_definitions(isa):
    x = Make(torch.float32, 4).normal(101, 50)
    distance = ops.contour_select(x, 1).distance.double()
    contour = distance.sort().values[50]
    off = (distance - contour).abs().tolist()
    nearest = sorted(range(101), key=lambda i: (off[i], i))
    picked = ops.contour_select(x, 7).index.tolist()
    assert picked == [min(range(i * 101 // 7, (i + 1) * 101 // 7), key=lambda i: (off[i], i)) for i in range(7)]
    assert ops.contour_select(x, 7, rule="contour").index.tolist() == sorted(nearest[:7])
    chosen = nearest[:1]
    while len(chosen) < 7:
        rest = [i for i in sorted(nearest[:14]) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(abs(i - j) for j in chosen), -i)))
    assert ops.contour_select(x, 7, rule="contour+fps").index.tolist() == sorted(chosen)


@by_dtype
@by_rule
def test_sequences_are_independent_of_companions_and_threads(rule, dtype, isa):
    sizes = [5, 0, 64, 3, 130, 1]
    x = Make(dtype, 5).normal(sum(sizes), 200)
    query = Make(dtype, 6).normal(len(sizes), 200)
    num = [2, 0, 9, 3, 30, 1]
    cu = Make(dtype).offsets(*sizes)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            results.append(ops.contour_select(x, num, query=query, rule=rule, cu_seqlens=cu))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.index, results[0].index) and torch.equal(other.distance, results[0].distance)
    start, first = 0, 0
    for s, (n, k) in enumerate(zip(sizes, num)):
        alone = ops.contour_select(x[start : start + n], k, query=query[s], rule=rule)
        assert torch.equal(alone.index + start, results[0].index[first : first + k])
        assert torch.equal(alone.distance, results[0].distance[start : start + n])
        start, first = start + n, first + k
    agree(x, num, query=query, rule=rule, cu_seqlens=cu)


@by_dtype
@by_rule
def test_frames_that_are_not_finite_come_last(rule, dtype, isa):
    x = Make(dtype, 7).normal(40, 30)
    x[3, 0], x[9, 29], x[10, 5], x[11] = torch.nan, torch.inf, -torch.inf, 0
    got = agree(x, 20, rule=rule, query=Make(dtype, 8).normal(30))
    assert torch.isnan(got.distance).nonzero().flatten().tolist() == [3, 9, 10]
    if rule == "contour":
        assert not {3, 9, 10} & set(got.index.tolist())
    x[:] = torch.nan
    assert agree(x, 4, rule="contour").index.tolist() == [0, 1, 2, 3]
    agree(Make(dtype, 7).normal(40, 30), 4, rule=rule, query=torch.full((30,), torch.nan, dtype=dtype))
    agree(Make(dtype, 7).normal(40, 30), 4, rule=rule, query=torch.zeros(30, dtype=dtype))


@by_dtype
def test_equal_frames_tie_and_the_index_decides(dtype, isa):
    same = Make(dtype, 9).normal(1, 77).expand(30, 77)
    got = agree(same, 5)
    assert got.index.tolist() == [0, 6, 12, 18, 24] and (got.distance == 0).all()
    assert agree(same, 5, rule="contour").index.tolist() == [0, 1, 2, 3, 4]
    twice = Make(dtype, 10).normal(20, 77).repeat(2, 1)
    got = ops.contour_select(twice, 40)
    assert torch.equal(got.distance[:20], got.distance[20:])


@pytest.mark.parametrize("at", ["end", "begin"])
@by_dtype
def test_stays_inside_its_buffers(at, dtype, isa):
    for t, c in ((1, 1), (29, 31), (53, 130)):
        x, query = guarded(Make(dtype, t).normal(t, c), at), guarded(Make(dtype).normal(c), at)
        with poisoned_allocation(at):
            agree(x, t // 3 + 1, query=query)
    wide = Make(dtype, 11).normal(24, 90)
    agree(wide[:, 10:50], 3)
    agree(wide[::2], 3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arguments(data, isa):
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
    num = [data.draw(st.integers(0, n)) for n in sizes]
    make = Make(data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 5)))
    c = data.draw(st.integers(1, 40))
    query = make.normal(len(sizes), c) if data.draw(st.booleans()) else None
    options = {"rank": data.draw(st.integers(1, 20)), "rule": data.draw(st.sampled_from(RULES)), "query": query}
    agree(make.normal(sum(sizes), c), num, cu_seqlens=make.offsets(*sizes), **options)


@pytest.mark.parametrize("num", [-1, 9, [2, 2]])
def test_refuses_counts_outside_a_sequence(num, isa):
    with pytest.raises(ValueError, match="expected num"):
        ops.contour_select(torch.zeros(8, 4), num)
