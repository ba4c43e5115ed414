"""Sampling rules: exact values, bounds, order."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidtok.data import sampling

counts = st.integers(1, 5000)


@given(counts, counts)
def test_linspace_is_the_rounded_line(n: int, c: int) -> None:
    got = sampling.linspace(n, c)
    assert len(got) == c and got[0] == 0 and got == sorted(got)
    if c > 1:
        assert got[-1] == n - 1
        assert got == [round(Fraction(k * (n - 1), c - 1)) for k in range(c)]


@given(counts, counts)
def test_segment_centre_lies_in_its_segment(n: int, c: int) -> None:
    got = sampling.segment_centre(n, c)
    assert len(got) == c and got == sorted(got) and got[0] >= 0 and got[-1] < n
    for k, i in enumerate(got):
        assert k * n // c <= i <= (k + 1) * n // c
    if c <= n:
        assert len(set(got)) == c


@given(
    st.lists(st.floats(0.001, 2.0), min_size=1, max_size=300),
    st.floats(0.05, 120.0),
    st.one_of(st.none(), st.integers(1, 64)),
    st.floats(-5.0, 5.0),
)
def test_fps_takes_what_is_on_screen(gaps: list[float], rate: float, most: int | None, start: float) -> None:
    stamps = (start + np.cumsum([0.0, *gaps])).tolist()
    got = sampling.fps(stamps, rate, most)
    assert got[0] == 0 and got == sorted(set(got)) and got[-1] < len(stamps)
    if most is not None:
        assert len(got) <= most
    else:
        assert len(got) <= int((stamps[-1] - start) * rate) + 2
        for earlier, later in pairwise(got):
            # No frame that stayed on screen for a whole tick is passed over.
            for skipped in range(earlier + 1, later):
                assert stamps[skipped + 1] - stamps[skipped] <= 1 / rate + 1e-5


def test_fps_on_even_frames() -> None:
    stamps = [i / 25 for i in range(250)]
    assert sampling.fps(stamps, 1.0) == list(range(0, 250, 25))
    assert sampling.fps(stamps, 25.0) == list(range(250))
    assert sampling.fps(stamps, 1e9) == list(range(250))
    assert sampling.fps(stamps, 5.0, 4) == [0, 80, 165, 245]


def test_agrees_with_numpy_where_floats_are_exact() -> None:
    for n, c in ((250, 24), (132, 7), (9, 5), (1, 3), (100, 100)):
        assert sampling.linspace(n, c) == np.linspace(0, n - 1, c).round().astype(int).tolist()


def test_named_rules() -> None:
    stamps = [i / 10 for i in range(30)]
    assert sampling.select("linspace", stamps, count=3) == [0, 14, 29]
    assert sampling.select("segment_centre", stamps, count=3) == [5, 15, 25]
    assert sampling.select("fps", stamps, rate=1.0) == [0, 10, 20]
    assert len(sampling.select("linspace", stamps, count=100)) == 30
    for arguments, words in (
        (("line",), "linspace, segment_centre, fps"),
        (("linspace",), "frame count"),
        (("fps",), "rate"),
    ):
        with pytest.raises(ValueError, match=words):
            sampling.select(*arguments, stamps)


@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sampling.linspace(10, value)
    with pytest.raises(ValueError, match="at least 1"):
        sampling.segment_centre(value, 2)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_are_no_rate_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="positive rate"):
        sampling.fps([0.0, 1.0], rate)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="whole number"):
        sampling.linspace(10, 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="number of frames"):
        sampling.fps([0.0], "2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got none"):
        sampling.fps([], 1.0)
