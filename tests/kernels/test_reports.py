"""What kernels report of bad indices is raised once, in words, by whoever looks next."""

from __future__ import annotations

import pytest

from vidtok.kernels import reports


@pytest.fixture
def words(monkeypatch):
    monkeypatch.setattr(reports, "_names", {})
    reports.register(0, lambda code: ("plan_apply", {1: "anchor", 2: "keep"}[code]))
    reports.register(reports.TRITON, lambda code: ("topk_select", "cu_seqlens"))
    return reports.Words(-1)


def store(words, *values):
    for i, value in enumerate(values):
        words.view[i] = value


def test_nothing_stored_raises_nothing(words):
    words.raise_pending(late=True)


@pytest.mark.parametrize(
    ("stored", "error", "said"),
    [
        ((1, 9, -1, 3), IndexError, r"^plan_apply: expected anchor in \[-1, 3\), got 9$"),
        ((2, -4, 0, 8), ValueError, r"^plan_apply: expected keep in \[0, 8\), got -4$"),
        ((reports.TRITON, 7, 0, 5), IndexError, r"^topk_select: expected cu_seqlens in \[0, 5\), got 7$"),
    ],
)
def test_each_backend_names_its_own(words, stored, error, said):
    store(words, *stored)
    with pytest.raises(error, match=said):
        words.raise_pending(late=False)
    words.raise_pending(late=False)  # once


def test_a_late_report_says_so(words):
    store(words, 1, 9, -1, 3)
    with pytest.raises(IndexError, match=r"^an earlier call of plan_apply: expected anchor"):
        words.raise_pending(late=True)


def test_the_words_are_where_the_address_says(words):
    assert words.address == words.tensor.data_ptr() and words.tensor.is_cpu
    words.tensor[0] = 5
    assert words.view[0] == 5
