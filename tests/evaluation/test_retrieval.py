"""Ranks and recalls: by hand, by brute force over orders of ties, in chunks, and against the published form."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidtok.evaluation import ranks, score
from vidtok.evaluation.ranking import Ranks, count


def published(similarity: np.ndarray) -> np.ndarray:
    """The usual form: sort each row and look where the diagonal's value stands, wherever it is."""
    ordered = np.sort(-similarity, axis=1)
    return np.where(ordered - np.diag(-similarity)[:, None] == 0)[1]


def test_by_hand() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.3, 0.4], [0.1, 0.2, 0.3]])
    found = count(similarity, torch.eye(3, dtype=torch.bool))
    assert found.expected().tolist() == [1, 3, 1]
    assert found.within(1).tolist() == [1, 0, 1] and found.within(3).tolist() == [1, 1, 1]


def test_without_ties_it_is_the_published_form() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.standard_normal((40, 40))
    mine = count(torch.from_numpy(similarity), torch.eye(40, dtype=torch.bool)).expected().numpy()
    assert np.array_equal(mine, published(similarity) + 1)


def test_ties_break_the_published_form() -> None:
    similarity = np.array([[0.5, 0.5, 0.1], [0.1, 0.9, 0.2], [0.3, 0.2, 0.8]])
    # Four ranks for three queries.
    assert published(similarity).tolist() == [0, 1, 0, 0]
    found = count(torch.from_numpy(similarity), torch.eye(3, dtype=torch.bool))
    assert found.expected().tolist() == [1.5, 1, 1] and found.within(1).tolist() == [0.5, 1, 1]


def test_a_constant_model_is_worth_chance() -> None:
    text = torch.ones(50, 4)
    found = score(text, torch.ones(50, 4), range(50))["text_to_video"]
    assert (found.r1, found.r5, found.r10) == pytest.approx((2, 10, 20))
    assert found.median == found.mean == 25.5 and found.queries == 50
    # Ranking ties in the query's favour would call it perfect.
    assert float((count(torch.ones(50, 50), torch.eye(50, dtype=torch.bool)).above == 0).double().mean()) == 1


LEVELS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(LEVELS, st.data())
def test_expectations_over_all_orders(levels: list[int], data: Any) -> None:
    right = data.draw(st.lists(st.booleans(), min_size=len(levels), max_size=len(levels)).filter(any))
    found = count(torch.tensor([levels], dtype=torch.float64), torch.tensor([right]))
    first = []
    for order in itertools.permutations(range(len(levels))):
        ranked = sorted(order, key=lambda i: -levels[i])  # stable: ties stay in this order
        first.append(1 + next(k for k, i in enumerate(ranked) if right[i]))
    assert float(found.expected()) == pytest.approx(np.mean(first))
    for k in (1, 2, 5):
        assert float(found.within(k)) == pytest.approx(np.mean([f <= k for f in first]))


def test_several_captions_of_a_video() -> None:
    video = torch.eye(3)
    text = torch.tensor([[1, 0, 0], [0, 0.9, 0.1], [0, 0.4, 0.5], [0.3, 0.2, 0.1], [0, 0, 1.0]])
    owner = [0, 0, 1, 1, 2]
    forward, backward = ranks(text, video, owner)
    assert forward.expected().tolist() == [1, 3, 2, 2, 1]
    # Video 1 scores its own captions .4 and .2, one of video 0 .9, and that of video 2 0.
    assert backward.expected().tolist() == [1, 2, 1]
    _, captions = ranks(text, video, owner, gallery="captions")
    assert captions.expected().tolist() == [1, 2, 1]
    # Two captions of video 0 above: one video, two captions.
    text[0] = torch.tensor([1, 0.8, 0])
    assert ranks(text, video, owner)[1].expected().tolist()[1] == 2
    assert ranks(text, video, owner, gallery="captions")[1].expected().tolist()[1] == 3


def test_owners_in_any_order_and_chunks_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    text, video = torch.randn(23, 6, generator=generator), torch.randn(9, 6, generator=generator)
    owner = torch.cat([torch.arange(9), torch.randint(0, 9, (14,), generator=generator)])
    for gallery in ("videos", "captions"):
        whole = ranks(text, video, owner, gallery=gallery)
        for chunk in (1, 4, 23):
            for a, b in zip(whole, ranks(text, video, owner, gallery=gallery, chunk=chunk)):
                assert torch.equal(a.expected(), b.expected())
        order = torch.randperm(23, generator=generator)
        shuffled = ranks(text[order], video, owner[order], gallery=gallery)
        assert torch.equal(shuffled[0].expected(), whole[0].expected()[order])
        assert torch.equal(shuffled[1].expected(), whole[1].expected())


def test_recall_and_median() -> None:
    found = score(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], range(4))["text_to_video"]
    # Two queries at rank 1; two whose right video ties at 0 with two wrong ones behind the one above: 2 + 1 each.
    assert (found.r1, found.r5, found.median, found.mean) == (50, 100, 2, 2)
    assert found.as_dict("t2v/") == {
        "t2v/R@1": 50, "t2v/R@5": 100, "t2v/R@10": 100, "t2v/MdR": 2, "t2v/MnR": 2, "t2v/queries": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "video", "owner", "options", "says"),
    [
        (torch.eye(2), torch.eye(3), [0, 1], {}, r"text \[C, D\]"),
        (torch.eye(2), torch.eye(2), [0], {}, r"owner \[C\], got"),
        (torch.eye(2), torch.eye(2), [0, 2], {}, "owners from 0"),
        (torch.eye(2), torch.eye(2), [-1, 1], {}, "owners from 0"),
        (torch.eye(2), torch.eye(2), [0, 0], {}, "a caption for every video"),
        (torch.eye(2), torch.eye(2), [0, 1], {"gallery": "all"}, "a gallery among videos, captions"),
        (torch.eye(2), torch.eye(2), [0, 1], {"chunk": 0}, "chunk of at least 1"),
        (torch.eye(2) * float("nan"), torch.eye(2), [0, 1], {}, "similarities that are numbers, got 4"),
        (torch.zeros(0, 2), torch.zeros(0, 2), [], {}, "owners from 0"),
    ],
)
def test_bad_input(text: Any, video: Any, owner: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ranks(text, video, owner, **options)


def test_not_a_number_would_look_perfect() -> None:
    # Nothing is greater than nan: ranks counted so would all be 1.
    similarity = torch.full((3, 3), float("nan"))
    assert ((similarity > similarity.diag()[:, None]).sum(1) == 0).all()
    with pytest.raises(ValueError, match="NaN"):
        count(similarity, torch.eye(3, dtype=torch.bool))


def test_within_needs_no_loop_over_ties() -> None:
    found = Ranks(torch.tensor([0, 3, 12]), torch.tensor([10_000, 1, 0]), torch.tensor([1, 2, 1]))
    assert found.within(10).tolist() == pytest.approx([10 / 10_001, 1, 0])
