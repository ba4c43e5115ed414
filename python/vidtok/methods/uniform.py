"""Uniform sampling of tokens, the baseline that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok.methods import _common
from vidtok.methods._common import Grid, GridLike, Method
from vidtok.plan import Plan


def check(ratio: float | None = None, k: int | None = None) -> None:
    """Refuse options outside their range."""
    _common.check_one_of(ratio=ratio, k=k)
    if k is not None:
        _common.check_int("k", k, 1)
    else:
        _common.check_ratio("ratio", ratio)


def count(grid: Grid, ratio: float | None = None, k: int | None = None) -> int:
    """Tokens kept of a video of ``grid``."""
    n = _common.tokens(grid)
    return min(k, n) if k is not None else _common.share(ratio, n)  # type: ignore[arg-type]


def uniform(features: Tensor, grid_thw: GridLike, *, ratio: float | None = None, k: int | None = None) -> Plan:
    r"""Keep evenly spaced tokens of each video, both ends included.

    Of :math:`n` tokens the kept ones are :math:`\lfloor i (n-1) / (k-1) \rfloor` for
    :math:`i = 0 \dots k-1`, in integer arithmetic; ``k = 1`` keeps token 0.

    Args:
        features: ``[N, C]`` fp32, bf16 or fp16, packed videos; only the count is used.
        grid_thw: ``[V, 3]`` token grids (frames, rows, columns).
        ratio: share kept, in (0, 1]; ``max(1, int(ratio·n))`` tokens of each video.
        k: tokens kept of each video, instead of ``ratio``; a video with fewer stays whole.

    Returns:
        A gather :class:`~vidtok.Plan` of V sequences whose counts are known on the host.

    Raises:
        ValueError: for options outside their range or grids that do not cover ``features``.

    Source: the ``uni`` stages of TimeViper, without the rounding error of a float ``linspace``.

    Example:
        >>> uniform(torch.zeros(10, 4), [(1, 2, 5)], k=5).anchor.tolist()
        [0, 2, 4, 6, 9]
    """
    check(ratio, k)
    features, videos = _common.inputs(features, grid_thw)
    lengths = [_common.tokens(g) for g in videos]
    kept = [count(g, ratio, k) for g in videos]
    parts, base = [], 0
    for n, m in zip(lengths, kept):
        parts.append(torch.arange(m, device=features.device) * (n - 1) // max(m - 1, 1) + base)
        base += n
    index = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=features.device)
    return _common.gather(index, lengths, kept)


METHOD = Method(
    "uniform", uniform, check, count, {"ratio": "float", "k": "int"}, {"ratio": None, "k": None}, needs_grid=False
)
