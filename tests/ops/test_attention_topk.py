"""attention_topk: an fp64 oracle, equal keys wherever they stand, masks and causal rows, groups, cuts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vidtok
from tests.cases import DTYPES, Make
from tests.guard import guarded, poisoned_allocation
from vidtok import ops
from vidtok.kernels import select

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One rounding to 16 bits, and the fp32 sums and exponentials before it.
RELATIVE = 2.0**-15


def oracle(query, key, *, scale=None, mask=None, query_position=None, reduce="mean"):
    """Scores [B, L] in fp64, key by key as the definition says."""
    b, hq, w, d = query.shape
    length = key.shape[2]
    keys = key.double().repeat_interleave(hq // key.shape[1], 1)
    logits = query.double() @ keys.transpose(2, 3) * (scale or 1 / math.sqrt(d))
    seen = torch.ones(b, 1, w, length, dtype=torch.bool)
    if mask is not None:
        seen &= mask[:, None, None]
    if query_position is not None:
        seen &= torch.arange(length) <= query_position[:, None, :, None]
    used = seen.any(-1).expand(b, hq, w)
    share = torch.where(used[..., None], torch.softmax(logits.masked_fill(~seen, -torch.inf), -1), 0.0)
    if reduce == "max":
        return share.amax((1, 2))
    return share.sum((1, 2)) / used.sum((1, 2)).clamp(min=1)[:, None]


def whole(key):
    """Every row one span."""
    return [(b, 0, key.shape[2]) for b in range(key.shape[0])]


def assert_near(score, expected):
    torch.testing.assert_close(score.double(), expected.double(), rtol=RELATIVE, atol=1e-37, equal_nan=True)


def assert_as_reference(query, key, keep, **kwargs):
    with vidtok.use_backend("reference"):
        expected = ops.attention_topk(query, key, keep, **kwargs)
    with poisoned_allocation():
        got = ops.attention_topk(query, key, keep, **kwargs)
    assert_near(got.score, expected.score)
    assert torch.equal(got.index, expected.index)
    return got


@by_dtype
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 3), (4, 7), (1, 9)])
@pytest.mark.parametrize("dim", [1, 13, 64, 128, 200])
def test_scores_against_fp64(heads, groups, dim, dtype, isa):
    make = Make(dtype, dim)
    query, key = make.normal(2, heads * groups, 2, dim), make.normal(2, heads, 300, dim)
    for reduce in ("mean", "max"):
        got = ops.attention_topk(query, key, 100, span=whole(key), reduce=reduce)
        assert_near(got.score, oracle(query, key, reduce=reduce).flatten())
        score = got.score.view(2, 300)
        for b in range(2):
            best = torch.argsort(score[b], descending=True, stable=True)[:100].sort().values
            assert got.index[b * 100 : b * 100 + 100].tolist() == best.tolist()


@by_dtype
@pytest.mark.parametrize("length", [1, 3, 4, 255, 256, 257, 1029])
def test_lengths_around_the_cuts(length, dtype, isa):
    make = Make(dtype, length)
    query, key = make.exact(1, 6, 1, 32, levels=300), make.exact(1, 2, length, 32, levels=300)
    assert_as_reference(query, key, length // 2, span=whole(key))


@by_dtype
def test_equal_keys_have_equal_scores_wherever_they_stand(dtype, isa):
    """The same key in the body, beside a cut and in the tail; then the index decides."""
    make = Make(dtype)
    query, key = make.normal(1, 14, 3, 72), make.normal(1, 2, 775, 72)
    places = torch.tensor([0, 5, 254, 255, 256, 300, 511, 512, 700, 771, 772, 773, 774])
    key[:, :, places] = key[:, :, :1].clone()
    got = ops.attention_topk(query, key, 775, span=whole(key))
    assert len(set(got.score[places].tolist())) == 1
    same = key[:, :, :1].expand(1, 2, 775, 72)
    got = ops.attention_topk(query, same, 99, span=whole(same))
    assert len(set(got.score.tolist())) == 1
    assert got.index.tolist() == list(range(99))


@by_dtype
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_masks_and_causal_rows(reduce, dtype, isa):
    make = Make(dtype)
    query, key = make.exact(3, 8, 5, 24, levels=200), make.exact(3, 4, 600, 24, levels=200)
    mask = make.ints(10, 3, 600) < 7
    mask[1, :300] = False
    mask[2] = False
    position = torch.tensor([[0, 599, 17, -1, 2000], [299, 300, 301, 5, -1], [599, 599, 599, 599, 599]])
    for extra in ({"mask": mask}, {"query_position": position}, {"mask": mask, "query_position": position}):
        got = assert_as_reference(query, key, 150, span=whole(key), reduce=reduce, **extra)
        assert_near(got.score.view(3, 600), oracle(query, key, reduce=reduce, **extra))
    assert not got.score[1200:].any(), "a row that sees nothing gives zeros"


def test_hidden_keys_may_hold_anything(isa):
    make = Make(torch.float32)
    query, key = make.normal(1, 4, 2, 16), make.normal(1, 2, 300, 16)
    mask = torch.ones(1, 300, dtype=torch.bool)
    mask[0, 40:60] = False
    clean = ops.attention_topk(query, key, 20, span=whole(key), mask=mask)
    key[:, :, 40:50], key[:, :, 50:60] = float("nan"), float("inf")
    dirty = ops.attention_topk(query, key, 20, span=whole(key), mask=mask)
    assert torch.equal(clean.score, dirty.score)
    assert torch.equal(clean.index, dirty.index)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_a_nan_that_is_seen_spoils_its_row_of_the_batch_only(reduce, isa):
    make = Make(torch.float32)
    query, key = make.normal(2, 4, 2, 16), make.normal(2, 2, 300, 16)
    key[0, 1, 290, 3] = float("nan")
    got = assert_as_reference(query, key, 20, span=whole(key), reduce=reduce)
    assert got.score[:300].isnan().all()
    assert got.score[300:].isfinite().all()
    assert got.index[:20].tolist() == list(range(20))


def test_large_logits_neither_overflow_nor_vanish(isa):
    query = torch.full((1, 2, 1, 4), 100.0)
    key = torch.zeros(1, 1, 400, 4)
    key[0, 0, 7], key[0, 0, 300], key[0, 0, 301:] = 1.0, 0.99, -1.0
    got = ops.attention_topk(query, key, 3, span=whole(key), scale=1.0)
    assert_near(got.score.view(1, -1), oracle(query, key, scale=1.0))
    assert got.index.tolist() == [0, 7, 300]


@by_dtype
def test_groups_share_a_budget(dtype, isa):
    make = Make(dtype)
    query, key = make.exact(2, 4, 2, 16, levels=200), make.exact(2, 2, 500, 16, levels=200)
    span = [(1, 300, 420), (0, 3, 90), (1, 430, 430), (0, 100, 101), (1, 450, 500), (0, 200, 330)]
    group = [7, -1, 7, -1, 7, 4]
    got = assert_as_reference(query, key, [50, 0, 130], span=span, group=group)
    assert got.index.shape == (180,)
    inside = [*range(300, 420), *range(450, 500)]
    assert set(got.index[:50].tolist()) <= set(inside)
    assert got.index[:50].tolist() == sorted(got.index[:50].tolist())
    assert got.index[50:].tolist() == list(range(200, 330))
    as_tensors = ops.attention_topk(query, key, [50, 0, 130], span=torch.tensor(span), group=torch.tensor(group))
    assert torch.equal(as_tensors.index, got.index)
    assert torch.equal(as_tensors.score, got.score)


@by_dtype
def test_keys_in_cache_layout_are_read_in_place(dtype, isa):
    make = Make(dtype)
    cache = make.normal(2, 700, 3, 90)
    key = cache.transpose(1, 2)[:, :, 5:640, 3:67]
    query = make.normal(2, 6, 1, 64)
    strided = ops.attention_topk(query, key, 60, span=whole(key))
    for at in ("begin", "end"):
        dense = ops.attention_topk(guarded(query, at), guarded(key, at), 60, span=whole(key))
        assert torch.equal(dense.score, strided.score)
        assert torch.equal(dense.index, strided.index)


def test_many_rows_pass_in_tiles(isa):
    """More logits than are held at once: rows of the query, and rows of the batch, go one after another."""
    make = Make(torch.float32)
    query, key = make.normal(1, 8, 70, 8), make.normal(1, 2, 17000, 8)
    got = ops.attention_topk(query, key, 100, span=whole(key))
    assert_near(got.score, oracle(query, key).flatten())
    query, key = make.normal(3, 8, 20, 8), make.normal(3, 2, 30000, 8)
    position = make.ints(30000, 3, 20)
    got = ops.attention_topk(query, key, 100, span=whole(key), query_position=position)
    assert_near(got.score.view(3, -1), oracle(query, key, query_position=position))
    alone = ops.attention_topk(query[1:2], key[1:2], 100, span=whole(key[:1]), query_position=position[1:2])
    assert torch.equal(alone.score, got.score[30000:60000])


@pytest.mark.parametrize("width", [1, 9])
def test_threads_and_companions_leave_no_trace(width, isa):
    make = Make(torch.float32)
    query, key = make.normal(3, 14, width, 64), make.normal(3, 2, 1500, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(ops.attention_topk(query, key, 700, span=whole(key)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.score, results[0].score)
        assert torch.equal(other.index, results[0].index)
    alone = ops.attention_topk(query[2:], key[2:], 700, span=whole(key[:1]))
    assert torch.equal(alone.score, results[0].score[3000:])


@by_dtype
def test_empty(dtype, isa):
    query, key = torch.ones(2, 4, 1, 8, dtype=dtype), torch.ones(2, 2, 5, 8, dtype=dtype)
    for got in (
        ops.attention_topk(query, key, 0, span=[]),
        ops.attention_topk(query, key, 0, span=[(0, 3, 3), (1, 5, 5)]),
        ops.attention_topk(query, key[:, :, :0], 0, span=[(0, 0, 0)]),
        ops.attention_topk(query[:0], key[:0], 0, span=[]),
    ):
        assert got.index.shape == (0,)
        assert got.score.shape == (0,)
    no_rows = ops.attention_topk(query[:, :, :0], key, 2, span=[(0, 1, 4)])
    assert no_rows.score.tolist() == [0, 0, 0]
    assert no_rows.index.tolist() == [1, 2]


def test_what_does_not_fit_raises(isa):
    query, key = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 50, 8)
    for span in ([(0, 0, 51)], [(2, 0, 5)], [(0, -1, 5)], [(0, 9, 5)], [(-1, 0, 5)]):
        with pytest.raises(IndexError, match="expected spans"):
            ops.attention_topk(query, key, 0, span=span)
    with pytest.raises(ValueError, match="expected keep between 0 and the group's 5 tokens, got 6"):
        ops.attention_topk(query, key, 6, span=[(0, 0, 5)])
    with pytest.raises(ValueError, match="expected one keep or one for each of 2 groups, got 3"):
        ops.attention_topk(query, key, [1, 1, 1], span=[(0, 0, 5), (0, 5, 9)])
    for span in ([(0, 5, 9), (0, 0, 6)], [(0, 0, 5), (1, 6, 9)], [(0, 5, 9), (0, 5, 9)]):
        with pytest.raises(ValueError, match="ascending in one row"):
            ops.attention_topk(query, key, 1, span=span, group=[0, 0])


@given(data=st.data())
def test_any_arguments_agree_with_the_reference(data):
    before = select.build_info()["isa"]
    select.extension().force_isa(data.draw(st.sampled_from(select.build_info()["isa_usable"])))
    try:
        make = Make(data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99)))
        batch, heads, length = (data.draw(st.integers(1, n)) for n in (3, 3, 70))
        width, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
        query = make.exact(batch, heads * data.draw(st.integers(1, 8)), width, dim, levels=100)
        key = make.exact(batch, heads, length, dim, levels=data.draw(st.sampled_from([1, 100])))
        cuts = sorted(data.draw(st.lists(st.integers(0, length), min_size=4, max_size=4)))
        span = [(batch - 1, cuts[0], cuts[1]), (0, 0, length), (batch - 1, cuts[2], cuts[3])]
        budget = data.draw(st.integers(0, cuts[1] - cuts[0] + cuts[3] - cuts[2]))
        assert_as_reference(
            query, key, [budget, length // 2], span=span, group=[3, 1, 3],
            mask=data.draw(st.sampled_from([None, make.ints(4, batch, length) > 0])),
            query_position=data.draw(st.sampled_from([None, make.ints(length + 2, batch, width) - 1])),
            reduce=data.draw(st.sampled_from(["mean", "max"])),
        )  # fmt: skip
    finally:
        select.extension().force_isa(before)
