"""Schedules: published values, clamps and errors."""

from __future__ import annotations

import pytest

from vidtok.merge import Schedule, ToMe, inflected

# Layers, (r, inflection), published merges per layer.
PUBLISHED = [
    (12, (8, 0), [8] * 12),
    (12, (8, -1), [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
    (12, (8, 1), [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
    (12, (16, -1), [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
    (12, (13, -1), [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
    (12, (2, -1), [4, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]),
    (1, (8, -1), [16]),
]


@pytest.mark.parametrize(("layers", "r", "merges"), PUBLISHED)
def test_published_schedules(layers, r, merges):
    assert inflected(layers, *r) == merges
    assert list(Schedule(r=r).wanted(layers, 1000)) == merges


# Tokens with one class token, layers, r, tokens left.
LEFT = [(197, 12, 8, 101), (197, 12, 13, 41), (197, 12, 16, 11), (197, 24, 8, 7), (50, 12, 2, 26), (50, 12, 4, 4)]


@pytest.mark.parametrize(("tokens", "layers", "r", "left"), LEFT)
def test_tokens_left(tokens, layers, r, left):
    assert tokens - sum(Schedule(r=r).counts(layers, tokens, 1)) == left


def test_a_small_tower_collapses():
    left, trace = 50, []
    for merges in Schedule(r=8).counts(12, 50, 1):
        left -= merges
        trace.append(left)
    assert trace == [42, 34, 26, 18, 10, 6, 4, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("ratio", [1.0, 0.75, 0.5, 0.3])
def test_a_ratio_is_what_is_left(ratio):
    assert 197 - sum(Schedule(ratio=ratio).counts(12, 197, 1)) == int(ratio * 197)


def test_down_to_k_tokens():
    counts = Schedule(k=100).counts(12, 197, 1)
    assert 197 - sum(counts) == 100
    assert max(counts) - min(counts) <= 1


def test_k_takes_up_what_a_clamp_left():
    assert 64 - sum(Schedule(k=4).counts(5, 64, 0)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "one of r, ratio and k"),
        ({"r": 1, "k": 2}, "r and k"),
        ({"r": -1}, "-1"),
        ({"r": 1.5}, "1.5"),
        ({"r": True}, "True"),
        ({"r": [1, -2]}, "at least 0"),
        ({"r": []}, "list"),
        ({"r": (8, 2)}, "inflection"),
        ({"r": "8"}, "'8'"),
        ({"ratio": 0.0}, r"\(0, 1\]"),
        ({"k": 0}, "at least 1"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ToMe(**options)


def test_a_list_needs_one_number_for_each_layer():
    with pytest.raises(ValueError, match="each of the 12 layers, got 3"):
        Schedule(r=[8, 8, 8]).counts(12, 197, 1)
