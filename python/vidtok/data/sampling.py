"""Which frames of a video are taken: three named rules, in integers, from counts or timestamps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["RULES", "fps", "linspace", "segment_centre", "select"]

RULES = ("linspace", "segment_centre", "fps")


def _counts(num_frames: int, count: int) -> tuple[int, int]:
    for name, value in (("num_frames", num_frames), ("count", count)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected {name} as a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    return num_frames, count


def linspace(num_frames: int, count: int) -> list[int]:
    r"""``count`` frames spread from the first to the last one.

    :math:`i_k = round(k (n-1) / (count-1))`, halves to even, exact; frame 0 when ``count`` is 1.
    Indices ascend and repeat when ``count`` exceeds ``num_frames``.

    Raises:
        ValueError: for a count below 1.

    Example:
        >>> linspace(10, 4)
        [0, 3, 6, 9]
    """
    n, c = _counts(num_frames, count)
    if c == 1:
        return [0]
    out = []
    for k in range(c):
        quotient, rest = divmod(k * (n - 1), c - 1)
        twice = 2 * rest
        out.append(quotient + (twice > c - 1 or (twice == c - 1 and quotient % 2 == 1)))
    return out


def segment_centre(num_frames: int, count: int) -> list[int]:
    r"""The middle frame of each of ``count`` equal segments.

    :math:`i_k = \lfloor (2k+1) n / (2 count) \rfloor`.

    Raises:
        ValueError: for a count below 1.

    Example:
        >>> segment_centre(10, 2)
        [2, 7]
    """
    n, c = _counts(num_frames, count)
    return [(2 * k + 1) * n // (2 * c) for k in range(c)]


def fps(timestamps: Sequence[float], rate: float, max_count: int | None = None) -> list[int]:
    r"""The frame on screen at :math:`t_0, t_0 + 1/rate, t_0 + 2/rate, …` seconds, each frame once.

    Args:
        timestamps: ascending seconds at which each frame appears; unequal spacing is respected.
        rate: frames per second wanted; every frame is taken when it exceeds the video's own rate.
        max_count: above this many, ``linspace`` thins the result.

    Raises:
        ValueError: for no timestamps or a rate that is not a positive number.

    Example:
        >>> fps([0.0, 0.5, 1.0, 1.5], 1.0)
        [0, 2]
    """
    if len(timestamps) == 0:
        raise ValueError("expected at least one timestamp, got none")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"expected rate as a number of frames per second, got {rate!r}")
    if not 0 < rate < float("inf"):
        raise ValueError(f"expected a positive rate in frames per second, got {rate}")
    start, last = float(timestamps[0]), float(timestamps[-1])
    if (last - start) * rate >= len(timestamps) * 4:
        taken = list(range(len(timestamps)))
    else:
        # Half a microsecond forgives the rounding of container clocks.
        ticks = int((last - start) * rate + 5e-7 * rate) + 1
        found = (bisect_right(timestamps, start + k / rate + 5e-7) - 1 for k in range(ticks))
        taken = sorted({max(0, i) for i in found})
    if max_count is not None and len(taken) > max_count:
        taken = [taken[i] for i in linspace(len(taken), max_count)]
    return taken


def select(rule: str, timestamps: Sequence[float], *, count: int | None = None, rate: float | None = None) -> list[int]:
    """Frame indices by the rule named ``linspace``, ``segment_centre`` or ``fps``.

    ``count`` frames are taken (never more than there are; with ``fps`` it is an upper bound) and
    ``rate`` is the frames per second of the rule ``fps``.

    Raises:
        ValueError: for an unknown rule or an argument that the rule needs and did not get.
    """
    if rule not in RULES:
        raise ValueError(f"expected a sampling rule among {', '.join(RULES)}, got {rule!r}")
    if rule == "fps":
        if rate is None:
            raise ValueError("expected a rate for the sampling rule fps, got none")
        return fps(timestamps, rate, count)
    if count is None:
        raise ValueError(f"expected a frame count for the sampling rule {rule}, got none")
    _counts(max(1, len(timestamps)), count)
    pick = linspace if rule == "linspace" else segment_centre
    return pick(len(timestamps), min(count, len(timestamps)))
