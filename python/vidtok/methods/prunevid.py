"""PruneVid's first stage: merge what stands still over time, then cluster in space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from vidtok import ops
from vidtok._constant import constant
from vidtok.methods import _common
from vidtok.methods._common import Grid, GridLike, Method
from vidtok.plan import Plan, compact

# Groups of up to this many tokens are kept as they are, as published.
KEPT_WHOLE = 14


def check(tau: float = 0.8, cluster_ratio: float = 0.5, temporal_segment_ratio: float = 0.25, k: int = 7) -> None:
    """Refuse options outside their range."""
    _common.check_number("tau", tau, -1, 1)
    _common.check_ratio("cluster_ratio", cluster_ratio)
    _common.check_ratio("temporal_segment_ratio", temporal_segment_ratio)
    _common.check_int("k", k, 1)


def count(grid: Grid, **options: float) -> int | None:
    """None: the features decide what stands still."""
    return None


def group_count(n: int, cluster_ratio: float) -> int:
    """Tokens left of a group of ``n``: all up to 14, else ``int(n · cluster_ratio)`` and at least 1."""
    return n if n <= KEPT_WHOLE else max(1, int(n * cluster_ratio))


def refine(labels: Sequence[int]) -> list[int]:
    """Lengths of the temporal segments that a label per frame gives.

    Of each label only its longest runs stay (none when the longest is one frame). Each stretch left
    over takes, from left to right, the label of the longer run beside it, the left one at a tie;
    label 0 when there is no run beside it. Segments are the runs of the result.
    """
    runs = [(label, len(list(group))) for label, group in groupby(labels)]
    longest: dict[int, int] = {}
    for label, n in runs:
        longest[label] = max(n, longest.get(label, 0))
    # Stretches without a label (None) that touch are one stretch.
    kept = [(label if n == longest[label] > 1 else None, n) for label, n in runs]
    merged = [(label, sum(n for _, n in group)) for label, group in groupby(kept, key=lambda run: run[0])]
    result: list[tuple[int, int]] = []
    for i, (label, n) in enumerate(merged):
        if label is None:
            left = result[-1] if result else (0, 0)
            right = merged[i + 1] if i + 1 < len(merged) else (0, 0)
            label = right[0] if right[1] > left[1] else left[0]
            assert label is not None
        if result and result[-1][0] == label:
            n += result.pop()[1]
        result.append((label, n))
    return [n for _, n in result]


def _blocks(length: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Block of each of Σ length entries and its place inside the block, int64."""
    sizes = constant(length, torch.int64, device)
    total = sum(length)
    owner = torch.repeat_interleave(torch.arange(len(length), device=device), sizes, output_size=total)
    return owner, torch.arange(total, device=device) - (sizes.cumsum(0) - sizes)[owner]


def _windows(x: Tensor, videos: Sequence[Grid], temporal_segment_ratio: float, k: int) -> list[list[int]]:
    """Frames per temporal segment of each video: its frame means, clustered and refined."""
    wanted = [_common.share(temporal_segment_ratio, t) for t, _, _ in videos]
    if max(wanted, default=0) <= 1:
        return [[t] if t else [] for t, _, _ in videos]
    frames = [h * w for t, h, w in videos for _ in range(t)]
    offset = _common.offsets(frames, x.device)
    sizes = constant(frames, torch.int64, x.device)
    mean = Plan(
        _common.offsets([x.shape[0]], x.device),
        _common.offsets([len(frames)], x.device),
        offset[:-1],
        torch.arange(x.shape[0], dtype=torch.int32, device=x.device),
        offset,
        torch.repeat_interleave(1.0 / sizes.float(), sizes, output_size=x.shape[0]),
        x.shape[0],
    )
    cu_frames = _common.offsets([t for t, _, _ in videos], x.device)
    labels = ops.cluster_dpc_knn(ops.plan_apply(mean, x), wanted, k=k, cu_seqlens=cu_frames).assignment.tolist()
    return [refine(labels[a:b]) for a, b in _spans([t for t, _, _ in videos])]


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(lengths))
    return [(end - n, end) for end, n in zip(ends, lengths)]


def _temporal(
    static: Tensor, windows: Sequence[int], slots: Sequence[int], num_in: int, device: torch.device
) -> tuple[Plan | None, list[int]]:
    """First level: the plan that averages static slots over their segment and keeps the rest.

    Its outputs are the static slots of each segment, then the dynamic tokens of each frame; also
    returns the sizes of these groups. None stands for the identity.
    """
    window, slot = _blocks(slots, device)
    # The one place where the features decide how much there is: how many slots of each segment stand still.
    still = torch.zeros(len(windows), dtype=torch.int64, device=device).index_add_(0, window, static.long()).tolist()
    groups = still + [n - s for w, n, s in zip(windows, slots, still) for _ in range(w)]
    if sum(still) == 0:
        return None, groups
    index = compact(static, sum(still))
    start = constant([a for a, _ in _spans([w * n for w, n in zip(windows, slots)])], torch.int64, device)
    width, step = constant(windows, torch.int64, device), constant(slots, torch.int64, device)
    own = window[index]
    first = start[own] + slot[index]
    copies = width[own]
    total = sum(w * s for w, s in zip(windows, still))
    rank = torch.arange(total, device=device)
    rank = rank - torch.repeat_interleave(copies.cumsum(0) - copies, copies, output_size=total)
    repeated = torch.repeat_interleave(torch.stack([first, step[own]]), copies, dim=1, output_size=total)
    member = repeated[0] + rank * repeated[1]
    dynamic = torch.ones(num_in, dtype=torch.bool, device=device)
    dynamic.index_fill_(0, member, False)  # an assignment would upload the value and wait
    rest = compact(dynamic, num_in - total)
    offset = torch.zeros(index.shape[0] + rest.shape[0] + 1, dtype=torch.int32, device=device)
    offset[1:] = torch.cat([copies, torch.ones_like(rest)]).cumsum(0)
    share = torch.repeat_interleave(1.0 / copies.float(), copies, output_size=total)
    anchor = torch.cat([first, rest]).to(torch.int32)
    plan = Plan(
        _common.offsets([num_in], device),
        _common.offsets([anchor.shape[0]], device),
        anchor,
        torch.cat([member, rest]).to(torch.int32),
        offset,
        torch.cat([share, torch.ones(rest.shape[0], device=device)]),
        num_in,
    )
    return plan, groups


def prunevid(
    features: Tensor,
    grid_thw: GridLike,
    *,
    tau: float = 0.8,
    cluster_ratio: float = 0.5,
    temporal_segment_ratio: float = 0.25,
    k: int = 7,
) -> Plan:
    r"""Cut each video into segments, average what is static in them, and cluster the rest.

    1. Frame means are clustered (:func:`vidtok.ops.cluster_dpc_knn`) into ``max(1, int(t·temporal_segment_ratio))``
       groups, which are refined to segments of consecutive frames.
    2. A slot of a segment of w > 1 frames is static when the mean cosine over all ordered pairs of
       its w tokens is above ``tau``; then it becomes the mean of these tokens.
    3. The static slots of each segment and the dynamic tokens of each frame are groups; one of
       n > 14 becomes the means of ``max(1, int(n·cluster_ratio))`` clusters, a smaller one stays.

    An output stands at its cluster's centre, in the first frame of the segment when it is static, and
    outputs ascend by place (the published code leaves them in the order of cluster ranks).

    Args:
        features: ``[N, C]`` fp32, bf16 or fp16, packed videos.
        grid_thw: ``[V, 3]`` token grids (frames, rows, columns).
        tau: mean cosine above which a slot is static, in [−1, 1].
        cluster_ratio: share kept of each group, in (0, 1].
        temporal_segment_ratio: clusters of frames per frame, in (0, 1].
        k: neighbours of the density, itself included; clamped for short videos and small groups.

    Returns:
        A :class:`~vidtok.Plan` of V sequences; Σ over segments of g(static) + Σ over their frames of
        g(dynamic) tokens. Tokens whose cosine is NaN are dynamic.

    Raises:
        ValueError: for options outside their range or grids that do not cover ``features``.

    Source: PruneVid (arXiv 2412.16117), stage 1, from its formulas; densities tie by index instead of
    by random noise.

    Example:
        >>> import torch
        >>> prunevid(torch.ones(4 * 16, 8), [(4, 4, 4)]).num_out  # 16 static slots, one segment
        8
    """
    check(tau, cluster_ratio, temporal_segment_ratio, k)
    x, videos = _common.inputs(features, grid_thw)
    device, num_in = x.device, x.shape[0]
    lengths = [_common.tokens(g) for g in videos]
    if num_in == 0:
        return Plan.identity(lengths, device)
    per_video = _windows(x, videos, temporal_segment_ratio, k)
    windows = [w for video in per_video for w in video]
    slots = [h * w for (_, h, w), video in zip(videos, per_video) for _ in video]
    static = ops.adjacent_similarity(x, videos, to="window", window=windows) > tau
    temporal, groups = _temporal(static, windows, slots, num_in, device)
    kept = [group_count(n, cluster_ratio) for n in groups]
    z = x if temporal is None else ops.plan_apply(temporal, x)
    anchor = torch.arange(num_in, device=device) if temporal is None else temporal.anchor.long()
    if kept == groups:
        owner = center = torch.arange(z.shape[0], device=device)
    else:
        cu_groups = _common.offsets(groups, device)
        assignment, center = ops.cluster_dpc_knn(z, kept, k=k, cu_seqlens=cu_groups)
        base = _common.offsets(kept, device)[:-1].long()
        owner = assignment + base[_blocks(groups, device)[0]]
    order = torch.argsort(anchor[center])
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=device)
    counts = _per_video(kept, [len(v) for v in per_video], [t for t, _, _ in videos])
    if counts == lengths:
        return Plan.identity(lengths, device)
    cu_in, cu_out = (_common.offsets([n], device) for n in (z.shape[0], order.shape[0]))
    plan = Plan.from_assignment(place[owner], center[order], cu_in, cu_out, z.shape[0], partition=True)
    if temporal is not None:
        plan = temporal.compose(plan, partition=True)
    return replace(
        plan,
        cu_seqlens_in=_common.offsets(lengths, device),
        cu_seqlens_out=_common.offsets(counts, device),
        length_in=_common.common(lengths),
        length_out=_common.common(counts),
    )


def _per_video(kept: Sequence[int], segments: Sequence[int], frames: Sequence[int]) -> list[int]:
    """Outputs per video from those per group: static ones of all segments, then dynamic ones of all frames."""
    static, dynamic = kept[: sum(segments)], kept[sum(segments) :]
    return [sum(static[a:b]) + sum(dynamic[c:d]) for (a, b), (c, d) in zip(_spans(segments), _spans(frames))]


METHOD = Method(
    "prunevid",
    prunevid,
    check,
    count,
    {"tau": "float", "cluster_ratio": "float", "temporal_segment_ratio": "float", "k": "int"},
    {"tau": 0.8, "cluster_ratio": 0.5, "temporal_segment_ratio": 0.25, "k": 7},
)
