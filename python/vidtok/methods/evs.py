"""Efficient video sampling: keep the tokens that changed most since the frame before."""

from __future__ import annotations

from torch import Tensor

from vidtok import ops
from vidtok.methods import _common
from vidtok.methods._common import Grid, GridLike, Method
from vidtok.plan import Plan


def check(ratio: float) -> None:
    """Refuse options outside their range."""
    _common.check_ratio("ratio", ratio)


def count(grid: Grid, ratio: float) -> int:
    """Tokens kept of a video of ``grid``."""
    t, h, w = grid
    return min(t * h * w, max(h * w, int(t * h * w * ratio)))


def evs(features: Tensor, grid_thw: GridLike, *, ratio: float) -> Plan:
    r"""Keep the first frame and the tokens least like the same slot one frame earlier.

    Token (t, l) scores :math:`1 - \cos(x_{t,l}, x_{t-1,l})`, tokens of the first frame score highest;
    the ``max(h·w, int(t·h·w·ratio))`` highest of each video stay, at equal scores the earlier ones.
    ``ratio`` is the share kept, that is 1 − q of the published pruning rate q.

    Args:
        features: ``[N, C]`` fp32, bf16 or fp16, packed videos.
        grid_thw: ``[V, 3]`` token grids (frames, rows, columns).
        ratio: share kept, in (0, 1]; never less than one frame.

    Returns:
        A gather :class:`~vidtok.Plan` of V sequences whose counts are known on the host.

    Raises:
        ValueError: for a ratio outside (0, 1] or grids that do not cover ``features``.

    Source: Efficient Video Sampling (arXiv 2510.14624), with its count rule.

    Example:
        >>> import torch
        >>> evs(torch.ones(8, 4), [(4, 1, 2)], ratio=0.5).anchor.tolist()
        [0, 1, 2, 3]
    """
    check(ratio)
    features, videos = _common.inputs(features, grid_thw)
    lengths = [_common.tokens(g) for g in videos]
    kept = [count(g, ratio) for g in videos]
    if kept == lengths:
        return Plan.identity(lengths, features.device)
    similarity = ops.adjacent_similarity(features, videos, to="previous")
    index = ops.topk_select(-similarity, kept, cu_seqlens=_common.offsets(lengths, features.device))
    return _common.gather(index, lengths, kept)


METHOD = Method("evs", evs, check, count, {"ratio": "float"})
