"""Adaptive average pooling of each frame, as a plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vidtok._constant import held
from vidtok.methods import _common
from vidtok.methods._common import Grid, GridLike, Method
from vidtok.plan import Plan


def check(level: float | None = None, out_hw: Sequence[int] | None = None) -> None:
    """Refuse options outside their range."""
    _common.check_one_of(level=level, out_hw=out_hw)
    if level is not None:
        _common.check_number("level", level, 1, float("inf"))
    elif not isinstance(out_hw, list | tuple) or len(out_hw) != 2:
        raise ValueError(f"expected out_hw as a pair (rows, columns), got {out_hw!r}")
    else:
        for side in out_hw:
            _common.check_int("out_hw", side, 1)


def out_grid(grid: Grid, level: float | None = None, out_hw: Sequence[int] | None = None) -> Grid:
    """Grid after pooling."""
    t, h, w = grid
    if out_hw is not None:
        return t, min(h, out_hw[0]), min(w, out_hw[1])
    assert level is not None
    return t, _side(h, level), _side(w, level)


def _side(side: int, level: float) -> int:
    # round() is half-to-even, in double, as the levels are defined.
    return 1 if side / level < 1 else round(side / level)


def count(grid: Grid, level: float | None = None, out_hw: Sequence[int] | None = None) -> int:
    """Tokens left of a video of ``grid``."""
    return _common.tokens(out_grid(grid, level, out_hw))


def _axis(n: int, m: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(m)
    return i * n // m, -((i + 1) * -n // m)


@lru_cache(maxsize=64)
def _frame(h: int, w: int, oh: int, ow: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchor, member, count per output and weight of the pooling of one frame."""
    (top, bottom), (left, right) = _axis(h, oh), _axis(w, ow)
    anchor = ((top + bottom - 1) // 2 * w).unsqueeze(1) + (left + right - 1) // 2
    rows = [torch.arange(a, b) for a, b in zip(top.tolist(), bottom.tolist())]
    columns = [torch.arange(a, b) for a, b in zip(left.tolist(), right.tolist())]
    windows = [(r.unsqueeze(1) * w + c).reshape(-1) for r in rows for c in columns]
    area = torch.tensor([v.numel() for v in windows])
    return anchor.reshape(-1), torch.cat(windows), area, (1.0 / area.float()).repeat_interleave(area)


def _video(grid: Grid, target: Grid, device: torch.device) -> Plan:
    """The plan of one video; the same one again on a GPU, where it would have to be uploaded."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        kept: Plan = held(_kept_video(grid, target, device))
        return kept
    return _make_video(grid, target, device)


@lru_cache(maxsize=64)
def _kept_video(grid: Grid, target: Grid, device: torch.device) -> Plan:
    return _make_video(grid, target, device)


def _make_video(grid: Grid, target: Grid, device: torch.device) -> Plan:
    t, h, w = grid
    if target == grid:
        return Plan.identity([t * h * w], device)
    anchor, member, area, weight = _frame(h, w, target[1], target[2])
    base = torch.arange(t).unsqueeze(1) * (h * w)
    offset = torch.zeros(t * area.shape[0] + 1, dtype=torch.int32)
    offset[1:] = area.repeat(t).cumsum(0)
    n, m = _common.tokens(grid), _common.tokens(target)
    return Plan(
        _common.offsets([n], device),
        _common.offsets([m], device),
        (anchor + base).reshape(-1).to(device, torch.int32),
        (member + base).reshape(-1).to(device, torch.int32),
        offset.to(device),
        weight.repeat(t).to(device),
        n,
        n,
        m,
    )


def pool(
    features: Tensor, grid_thw: GridLike, *, level: float | None = None, out_hw: Sequence[int] | None = None
) -> Plan:
    r"""Average-pool each frame of each video, windows as :func:`vidtok.ops.pool_packed` has them.

    Output (i, j) is the mean of rows :math:`\lfloor i h / h' \rfloor` to
    :math:`\lceil (i+1) h / h' \rceil - 1` and the columns likewise; it stands at the window's middle
    row and column, the earlier of two. Windows overlap where the side does not divide.

    Args:
        features: ``[N, C]`` fp32, bf16 or fp16, packed videos; only the count is used.
        grid_thw: ``[V, 3]`` token grids (frames, rows, columns).
        level: at least 1; a side becomes ``round(side / level)``, half to even and at least 1;
            level 1 is the identity.
        out_hw: rows and columns of the output instead; a side that is not larger stays.

    Returns:
        A :class:`~vidtok.Plan` of V sequences whose counts are known on the host.

    Raises:
        ValueError: for options outside their range or grids that do not cover ``features``.

    Source: the pooling levels of VideoGPT+ style encoders.

    Example:
        >>> pool(torch.zeros(16, 4), [(1, 4, 4)], level=2).anchor.tolist()
        [0, 2, 8, 10]
    """
    check(level, out_hw)
    features, videos = _common.inputs(features, grid_thw)
    targets = [out_grid(g, level, out_hw) for g in videos]
    if targets == videos:
        return Plan.identity([_common.tokens(g) for g in videos], features.device)
    return Plan.cat([_video(g, target, features.device) for g, target in zip(videos, targets)])


METHOD = Method(
    "pool",
    pool,
    check,
    count,
    {"level": "float", "out_hw": "pair"},
    {"level": None, "out_hw": None},
    out_grid=out_grid,
)
