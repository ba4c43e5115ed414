"""Token merging inside each frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from vidtok import _check, ops
from vidtok.methods import _common
from vidtok.methods._common import Grid, GridLike, Method
from vidtok.plan import Plan

GROUPS = 16
Rounds = int | Sequence[int]


def check(r: Rounds | None = None, ratio: float | None = None, k: int | None = None, metric: str = "groups") -> None:
    """Refuse options outside their range."""
    _common.check_one_of(r=r, ratio=ratio, k=k)
    if metric not in ("groups", "features"):
        _check.fail("metric as groups or features", repr(metric))
    if k is not None:
        _common.check_int("k", k, 1)
    elif ratio is not None:
        _common.check_ratio("ratio", ratio)
    elif isinstance(r, list):
        for value in r:
            _common.check_int("r", value, 0)
    elif isinstance(r, tuple):
        _check.fail(
            "r as an integer or a list with one integer for each round (a pair is a schedule over the layers of "
            "a vision tower)",
            repr(r),
        )
    else:
        _common.check_int("r", r, 0)


def rounds(n: int, r: Rounds | None = None, ratio: float | None = None, k: int | None = None) -> list[int]:
    """Merges of each round for a frame of ``n`` tokens; every round at most halves it."""
    if r is not None and not isinstance(r, int):
        steps = []
        for wanted in r:
            steps.append(min(wanted, n // 2))
            n -= steps[-1]
        return [step for step in steps if step]
    if k is not None:
        target = min(k, n)
    else:
        target = _common.share(ratio, n) if ratio is not None else max(1, n - r) if r is not None else n
    steps = []
    while n > target:
        steps.append(min(n - target, n // 2))
        n -= steps[-1]
    return steps


def count(
    grid: Grid, r: Rounds | None = None, ratio: float | None = None, k: int | None = None, metric: str = "groups"
) -> int:
    """Tokens left of a video of ``grid``."""
    t, h, w = grid
    return t * (h * w - sum(rounds(h * w, r, ratio, k)))


def _metric(x: Tensor, metric: str) -> Tensor:
    """``[F, T, C]``, or a ``[F, 16, T, C/16]`` view whose mean over groups the operator takes."""
    if metric == "features" or x.shape[2] % GROUPS:
        return x
    return x.unflatten(2, (GROUPS, -1)).transpose(1, 2)


def _frames(x: Tensor, steps: Sequence[int], metric: str) -> Plan:
    """Plan over equal frames ``[F, T, C]``, one sequence per frame, ascending."""
    plan: Plan | None = None
    size = None
    for i, r in enumerate(steps):
        if i + 1 < len(steps):
            x, size, step = ops.bipartite_merge(x, _metric(x, metric), r, size=size)
        else:
            step = ops.bipartite_match(_metric(x, metric), r, size=size)
        plan = step if plan is None else plan.compose(step, partition=True)
    if plan is None:
        return Plan.identity([x.shape[1]] * x.shape[0], x.device)
    return plan.sorted()


def _by_shape(videos: Sequence[Grid]) -> Iterator[tuple[int, int]]:
    """(frames, tokens per frame) of each stretch of videos whose frames are equally large."""
    for slots, group in groupby(videos, key=lambda g: g[1] * g[2]):
        yield sum(t for t, _, _ in group), slots


def tome(
    features: Tensor,
    grid_thw: GridLike,
    *,
    r: Rounds | None = None,
    ratio: float | None = None,
    k: int | None = None,
    metric: str = "groups",
) -> Plan:
    r"""Merge the most similar tokens of each frame, in rounds that at most halve it.

    A round of :func:`vidtok.ops.bipartite_match` on a frame of n tokens merges
    :math:`\min(n - target, \lfloor n/2 \rfloor)` of them, until the target is reached. Sizes are
    carried from round to round, so every output is the plain mean of the tokens in it; it stands at
    the place of the token that the others were merged into, and outputs ascend by place.

    Args:
        features: ``[N, C]`` fp32, bf16 or fp16, packed videos.
        grid_thw: ``[V, 3]`` token grids (frames, rows, columns).
        r: tokens merged away in each frame, down to one; or a list, one round for each entry, which
            merges at most half of the frame.
        ratio: share kept of each frame, in (0, 1], instead.
        k: tokens kept of each frame instead; a frame with fewer stays whole.
        metric: ``groups`` compares means over 16 groups of C/16 channels (the features themselves
            when C is not a multiple of 16), ``features`` always the features.

    Returns:
        A :class:`~vidtok.Plan` of V sequences whose counts are known on the host.

    Raises:
        ValueError: for options outside their range or grids that do not cover ``features``.

    Source: ToMe (Bolya et al., ICLR 2023); rounds and grouped metric as TimeViper has them.

    Example:
        >>> import torch
        >>> tome(torch.randn(2 * 49, 32), [(2, 7, 7)], k=16).num_out
        32
    """
    check(r, ratio, k, metric)
    x, videos = _common.inputs(features, grid_thw)
    parts, base = [], 0
    for frames, slots in _by_shape(videos):
        n = frames * slots
        parts.append(_frames(x[base : base + n].view(frames, slots, x.shape[1]), rounds(slots, r, ratio, k), metric))
        base += n
    lengths = [_common.tokens(g) for g in videos]
    counts = [count(g, r, ratio, k) for g in videos]
    if counts == lengths:
        return Plan.identity(lengths, x.device)
    return replace(
        Plan.cat(parts),
        cu_seqlens_in=_common.offsets(lengths, x.device),
        cu_seqlens_out=_common.offsets(counts, x.device),
        length_in=_common.common(lengths),
        length_out=_common.common(counts),
    )


METHOD = Method(
    "tome",
    tome,
    check,
    count,
    {"r": "schedule", "ratio": "float", "k": "int", "metric": "word"},
    {"r": None, "ratio": None, "k": None, "metric": "groups"},
)
