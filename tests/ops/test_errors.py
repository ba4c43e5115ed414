"""Bad arguments raise one sentence that says what was expected and what came, before any kernel runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidtok import Plan, ops

X = torch.zeros(6, 4)
Q, K = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 5, 4)
CU = torch.tensor([0, 6], dtype=torch.int32)

BAD = [
    ("topk rank", lambda: ops.topk_select(torch.zeros(2, 2, 2), 1), r"\[N\] or \[B, N\], got \[2, 2, 2\]"),
    ("topk dtype", lambda: ops.topk_select(torch.zeros(4, dtype=torch.int64), 1), "float16, got torch.int64"),
    ("topk keep", lambda: ops.topk_select(torch.zeros(4), 5), "keep between 0 and 4, got 5"),
    ("topk segment", lambda: ops.topk_select(torch.zeros(4), [3, 0], cu_seqlens=torch.tensor([0, 2, 4])), "keep"),
    ("topk offsets", lambda: ops.topk_select(torch.zeros(4), 1, cu_seqlens=torch.tensor([0, 3])), "end at 4, got"),
    ("offsets fall", lambda: ops.cluster_dpc_knn(X, 1, k=2, cu_seqlens=torch.tensor([0, 5, 3, 6])), "never fall"),
    ("offsets type", lambda: ops.cluster_dpc_knn(X, 1, k=2, cu_seqlens=torch.tensor([0.0, 6.0])), "int32 offsets"),
    ("cluster shape", lambda: ops.cluster_dpc_knn(X[None], 1, k=2), r"x of shape \[N, C\], got \[1, 6, 4\]"),
    ("cluster k", lambda: ops.cluster_dpc_knn(X, 1, k=0), "k of at least 1, got 0"),
    ("cluster count", lambda: ops.cluster_dpc_knn(X, 7, k=2), "num_clusters between 0 and the segment's 6"),
    ("cluster counts", lambda: ops.cluster_dpc_knn(X, [1, 2], k=2), "one number or one for each of 1 segments"),
    ("grid total", lambda: ops.adjacent_similarity(X, [(1, 2, 2)]), "holds the 6 tokens of x, got"),
    ("grid shape", lambda: ops.adjacent_similarity(X, [(1, 6)]), "frames, height, width"),
    ("grid floats", lambda: ops.adjacent_similarity(X, torch.ones(1, 3)), "with integers"),
    ("grid negative", lambda: ops.pool_packed(X, [(-1, -2, 3)], level=2), "negative"),
    ("similarity mode", lambda: ops.adjacent_similarity(X, [(1, 2, 3)], to="next"), "center, got 'next'"),
    ("window missing", lambda: ops.adjacent_similarity(X, [(1, 2, 3)], to="window"), "window as frames per segment"),
    ("window cover", lambda: ops.adjacent_similarity(X, [(3, 1, 2)], to="window", window=[2, 2]), "cover the 3 frames"),
    ("center shape", lambda: ops.adjacent_similarity(X, [(3, 1, 2)], to="center", center=X[:1, :3]), "center of shape"),
    ("pool both", lambda: ops.pool_packed(X, [(1, 2, 3)], level=2, out_hw=(1, 1)), "either level or out_hw"),
    ("pool level", lambda: ops.pool_packed(X, [(1, 2, 3)], level=0.5), "level of at least 1, got 0.5"),
    ("pool NaN", lambda: ops.pool_packed(X, [(1, 2, 3)], level=float("nan")), "level of at least 1, got nan"),
    ("pool target", lambda: ops.pool_packed(X, [(1, 2, 3)], out_hw=(3, 3)), r"within the grid \(2, 3\)"),
    ("plan tokens", lambda: ops.plan_apply(Plan.identity([5]), X), r"x of shape \[5, C\], got \[6, 4\]"),
    ("plan dense", lambda: ops.plan_apply(Plan.identity([2, 4]), X.view(2, 3, 4)), "differ|differing|packed"),
    ("remap entries", lambda: ops.position_remap(Plan.identity([5]), torch.zeros(3, 6)), "5 entries along dim"),
    ("remap dim", lambda: ops.position_remap(Plan.identity([5]), torch.zeros(5), dim=1), "dim inside a tensor"),
    ("remap dims", lambda: ops.position_remap(Plan.identity([5]), torch.zeros(5), dim=[0, 0]), "dim and fill for 1"),
    ("match rank", lambda: ops.bipartite_match(X, 1), r"metric of shape \[B, T, C\] or \[B, H, T, D\], got \[6, 4\]"),
    ("match r", lambda: ops.bipartite_match(X[None], -1), "r of at least 0, got -1"),
    ("match protected", lambda: ops.bipartite_match(X[None], 1, protected=9), "protected between 0 and 6, got 9"),
    ("match mask", lambda: ops.bipartite_match(X[None], 1, protected=X[:, 0] > 0), r"bool \[1, 6\]"),
    ("match size", lambda: ops.bipartite_match(X[None], 1, size=torch.ones(1, 5)), r"size of float32 \[1, 6\]"),
    ("merge x", lambda: ops.bipartite_merge(X[None, :5], X[None], 1), r"x of shape \[1, 6, C\], got \[1, 5, 4\]"),
    ("attention heads", lambda: ops.attention_topk(torch.zeros(1, 3, 1, 4), K, 1, span=[(0, 0, 5)]), "dividing 3"),
    ("attention span", lambda: ops.attention_topk(Q, K, 1, span=[(0, 0, 6)]), "inside"),
    ("attention keep", lambda: ops.attention_topk(Q, K, 6, span=[(0, 0, 5)]), "keep between 0 and"),
    ("attention mask", lambda: ops.attention_topk(Q, K, 1, span=[(0, 0, 5)], mask=torch.ones(1, 5)), "bool"),
    ("attention reduce", lambda: ops.attention_topk(Q, K, 1, span=[(0, 0, 5)], reduce="sum"), "mean, max"),
    ("contour rule", lambda: ops.contour_select(X, 2, rule="best"), "stratified, contour"),
    ("contour num", lambda: ops.contour_select(X, 7), "num between 0 and"),
    ("contour query", lambda: ops.contour_select(X, 2, query=torch.zeros(5)), "query of shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), [(c, s) for _, c, s in BAD], ids=[n for n, _, _ in BAD])
def test_says_what_was_expected(call, sentence):
    with pytest.raises((ValueError, TypeError, IndexError), match=sentence) as caught:
        call()
    assert "expected" in str(caught.value) and "got" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("anchor", [[0, 6], [-2], [2**31 - 1]])
def test_a_plan_that_points_outside_raises(anchor):
    cu_out = torch.tensor([0, len(anchor)], dtype=torch.int32)
    plan = Plan(CU, cu_out, torch.tensor(anchor, dtype=torch.int32), None, None, None, 6)
    with pytest.raises(IndexError, match="expected anchor in"):
        ops.plan_apply(plan, X)
    with pytest.raises(IndexError, match="expected anchor in"):
        ops.position_remap(plan, X, dim=0)


@pytest.mark.parametrize(
    ("member", "offset"), [([0, 6], [0, 2]), ([0, -1], [0, 2]), ([0, 1], [0, 3]), ([0, 1], [1, 2]), ([0], [0, 2])]
)
def test_member_lists_that_point_outside_raise(member, offset):
    lists = torch.tensor(member, dtype=torch.int32), torch.tensor(offset, dtype=torch.int32), torch.ones(len(member))
    plan = Plan(CU, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), *lists, 6)
    with pytest.raises(IndexError, match=r"expected (member|offset)"):
        ops.plan_apply(plan, X)


numbers = st.integers(-3, 12)


@given(numbers, numbers, st.lists(numbers, min_size=1, max_size=4), numbers)
def test_any_integers_give_a_result_or_a_sentence(keep, k, offsets, r):
    """No combination of small integers crashes or raises anything but the three kinds of error."""
    cu = torch.tensor(offsets, dtype=torch.int32)
    calls = [
        lambda: ops.topk_select(X[:, 0], keep, cu_seqlens=cu),
        lambda: ops.cluster_dpc_knn(X, keep, k=k, cu_seqlens=cu),
        lambda: ops.bipartite_match(X, r, protected=k, cu_seqlens=cu),
        lambda: ops.adjacent_similarity(X, [(keep, k, r)]),
        lambda: ops.pool_packed(X, [(1, 2, 3)], out_hw=(keep, k)),
        lambda: ops.contour_select(X, keep, rank=max(k, 1), cu_seqlens=cu),
        lambda: ops.attention_topk(X[None, None], X[None, None], keep, span=[(r, k, keep)]),
    ]
    for call in calls:
        try:
            call()
        except (ValueError, IndexError, TypeError) as error:
            assert "expected" in str(error), error
