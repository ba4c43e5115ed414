"""topk_select: the order of every kind of score, exactly, against a plain sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import DTYPES
from vidtok import ops
from vidtok.kernels import select

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF, NAN = float("inf"), float("nan")


def oracle(score, keep):
    """Indices by a Python sort: NaN last, then score descending, then index ascending."""
    values = score.tolist()
    order = sorted(
        range(len(values)), key=lambda i: (math.isnan(values[i]), 0 if math.isnan(values[i]) else -values[i], i)
    )
    return sorted(order[:keep])


@by_dtype
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 64, 129])
def test_every_keep(n, dtype, isa):
    generator = torch.Generator().manual_seed(n)
    score = (torch.randint(-4, 5, (n,), generator=generator) / 256).to(dtype)
    for keep in range(n + 1):
        assert ops.topk_select(score, keep).tolist() == oracle(score, keep)


@by_dtype
def test_special_values_at_every_keep(dtype, isa):
    score = torch.tensor([NAN, 0.0, -0.0, INF, -INF, 1.0, -1.0, NAN, INF, -INF, -0.0, 0.0, 3e-8, -3e-8] * 3).to(dtype)
    score[5] = -NAN
    for keep in range(score.shape[0] + 1):
        assert ops.topk_select(score, keep).tolist() == oracle(score, keep)


def test_zero_of_either_sign_ties(isa):
    assert ops.topk_select(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 2).tolist() == [0, 1]


def test_subnormal_scores_are_not_zero(isa):
    tiny = torch.tensor([0.0, 1e-45, 0.0, -1e-45, 3e-45])
    assert [ops.topk_select(tiny, k).tolist() for k in (1, 2, 3, 4)] == [[4], [1, 4], [0, 1, 4], [0, 1, 2, 4]]


@pytest.mark.parametrize("keep", [1, 777, 2048, 16384, 32767])
@pytest.mark.parametrize("kind", ["normal", "softmax", "levels", "neighbours"])
def test_many_scores(kind, keep, isa):
    generator = torch.Generator().manual_seed(keep)
    score = torch.randn(32768, generator=generator)
    if kind == "softmax":
        score = score.softmax(0)
    elif kind == "levels":
        score = (score * 3).round()
    elif kind == "neighbours":  # differ in the last bits only
        score = (torch.randint(0, 3000, (32768,), generator=generator, dtype=torch.int32) + 0x3F800000).view(
            torch.float32
        )
    order = torch.sort(score, descending=True, stable=True).indices[:keep]
    assert torch.equal(ops.topk_select(score, keep), order.sort().values)


def test_ties_keep_the_first_and_not_the_last(isa):
    score = torch.zeros(100)
    assert ops.topk_select(score, 30).tolist() == list(range(30))
    assert ops.topk_select(score.flip(0), 30).tolist() != list(range(70, 100))


@by_dtype
def test_segments_are_chosen_alone(dtype, isa):
    lengths = [0, 5, 1, 40, 0, 300, 17]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    score = torch.randint(0, 9, (int(cu[-1]),), generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = [0, 5, 0, 11, 0, 123, 1]
    expected = [int(cu[s]) + i for s, k in enumerate(keep) for i in oracle(score[int(cu[s]) : int(cu[s + 1])], k)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert ops.topk_select(score, keep, cu_seqlens=cu).tolist() == expected
    finally:
        torch.set_num_threads(before)


def test_many_rows_over_threads(isa):
    score = torch.randn(64, 3000, generator=torch.Generator().manual_seed(0))
    expected = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :500].sort(1).values
    assert torch.equal(ops.topk_select(score, 500), expected)


def test_the_operator_itself_refuses_a_keep_above_its_segment(isa):
    cu = torch.tensor([0, 2, 4]).int()
    with pytest.raises(ValueError, match="keep between 0 and the segment's 2 tokens, got 3"):
        torch.ops.vidtok.topk_select(torch.zeros(4), [1, 3], cu)


scores = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, INF, -INF, NAN, 1e-40, 3e38]) | st.floats(width=32), max_size=80
)


@given(values=scores, data=st.data())
def test_any_scores(values, data):
    score = torch.tensor(values, dtype=torch.float32)
    keep = data.draw(st.integers(0, len(values)))
    before = select.build_info().get("isa")
    for isa in select.build_info().get("isa_usable", []):
        select.extension().force_isa(isa)
        try:
            assert ops.topk_select(score, keep).tolist() == oracle(score, keep)
        finally:
            select.extension().force_isa(before)
