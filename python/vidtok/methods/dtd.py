"""Differential token dropping: drop tokens that repeat the same slot one frame earlier."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok import ops
from vidtok.methods import _common
from vidtok.methods._common import Grid, GridLike, Method
from vidtok.plan import Plan, compact


def check(threshold: float, relative: bool = False) -> None:
    """Refuse options outside their range."""
    if not isinstance(relative, bool):
        raise TypeError(f"expected relative as true or false, got {relative!r}")
    _common.check_number("threshold", threshold, 0 if relative else -1, 1)


def count(grid: Grid, threshold: float, relative: bool = False) -> int | None:
    """Tokens kept of a video of ``grid``; None when its features decide."""
    t, h, w = grid
    if t <= 1:
        return t * h * w
    return h * w + (t - 1) * (h * w - int(h * w * threshold)) if relative else None


def dtd(features: Tensor, grid_thw: GridLike, *, threshold: float, relative: bool = False) -> Plan:
    r"""Drop tokens too similar to the same slot of the whole previous frame; the first frame stays.

    Absolute: drop (t, l) when :math:`\cos(x_{t,l}, x_{t-1,l}) >` ``threshold``. Relative: in every
    frame but the first drop the ``int(h·w·threshold)`` most similar tokens, at equal similarity the
    earlier ones. The comparison is with the previous frame, kept or not, so a slow drift is dropped.

    Args:
        features: ``[N, C]`` fp32, bf16 or fp16, packed videos.
        grid_thw: ``[V, 3]`` token grids (frames, rows, columns).
        threshold: a cosine in [−1, 1], or with ``relative`` the share dropped, in [0, 1].
        relative: drop a share of each frame instead of cutting at a cosine.

    Returns:
        A gather :class:`~vidtok.Plan` of V sequences; a token whose cosine is NaN counts as least
        similar and stays. With ``relative`` the counts are known on the host.

    Raises:
        ValueError: for a threshold outside its range or grids that do not cover ``features``.

    Source: TimeChat-Online (arXiv 2504.17343), feature mode.

    Example:
        >>> import torch
        >>> dtd(torch.ones(6, 4), [(3, 1, 2)], threshold=0.5).anchor.tolist()
        [0, 1]
    """
    check(threshold, relative)
    features, videos = _common.inputs(features, grid_thw)
    lengths = [_common.tokens(g) for g in videos]
    counts = [count(g, threshold, relative) for g in videos]
    device = features.device
    if counts == lengths:
        return Plan.identity(lengths, device)
    similarity = ops.adjacent_similarity(features, videos, to="previous")
    if not relative:
        keep = torch.logical_not(similarity > threshold)
        ends = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        cu_in = _common.offsets(lengths, device)
        index = torch.nonzero(keep).squeeze(1)
        cu_out = ends[cu_in.long()].to(torch.int32)
        return Plan.gather(index, cu_in, cu_out, sum(lengths), length_in=_common.common(lengths))
    frames, drops = [], []
    for t, h, w in videos:
        frames += [h * w] * t
        drops += [0, *[int(h * w * threshold)] * (t - 1)][:t]
    dropped = ops.topk_select(similarity, drops, cu_seqlens=_common.offsets(frames, device))
    keep = torch.ones(sum(lengths), dtype=torch.bool, device=device)
    keep.index_fill_(0, dropped, False)  # an assignment would upload the value and wait
    kept = [c for c in counts if c is not None]
    return _common.gather(compact(keep, sum(kept)), lengths, kept)


METHOD = Method("dtd", dtd, check, count, {"threshold": "float", "relative": "bool"}, {"relative": False})
