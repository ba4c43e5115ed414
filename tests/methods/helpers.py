"""Making of videos and comparing of plans."""

from __future__ import annotations

import itertools

import torch

from vidtok import Plan


def outputs(plan: Plan) -> list[list[tuple[int, dict[int, float]]]]:
    """Per sequence its outputs as (anchor, {member: weight}), counted from the sequence's start."""
    anchor, member, weight = plan.anchor.tolist(), plan.member.tolist(), plan.weight.tolist()
    offset, cu_in, cu_out = plan.offset.tolist(), plan.cu_seqlens_in.tolist(), plan.cu_seqlens_out.tolist()
    result = []
    for b, (lo, hi) in enumerate(itertools.pairwise(cu_out)):
        rows = []
        for m in range(lo, hi):
            span = range(offset[m], offset[m + 1])
            rows.append((anchor[m] - cu_in[b], {member[j] - cu_in[b]: weight[j] for j in span}))
        result.append(rows)
    return result


def check_same(plan: Plan, expected: list[list[tuple[int, dict[int, float]]]]) -> None:
    """Same anchors and members; weights to fp32 rounding."""
    got = outputs(plan.validate())
    assert [[a for a, _ in video] for video in got] == [[a for a, _ in video] for video in expected]
    for mine, theirs in zip(got, expected):
        for (_, a), (_, b) in zip(mine, theirs):
            assert a.keys() == b.keys()
            assert all(abs(a[i] - b[i]) < 1e-6 for i in a)


def equal(a: Plan, b: Plan) -> bool:
    """Whether two plans hold the same numbers, bit for bit."""
    names = ("cu_seqlens_in", "cu_seqlens_out", "anchor", "member", "offset", "weight")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def make_video(seed: int, grid: tuple[int, int, int], channels: int = 32, noise: float = 0.7) -> torch.Tensor:
    """fp64 [N, C]: scenes of four frames; the left part of each stands still, the right part moves."""
    t, h, w = grid
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(-(-t // 4) or 1, 1, h, w, channels, generator=generator, dtype=torch.float64)
    still = scenes.repeat_interleave(4, 0)[:t, 0]
    change = torch.randn(t, h, w, channels, generator=generator, dtype=torch.float64)
    amount = torch.full((w,), 0.05, dtype=torch.float64)
    amount[w // 2 :] = noise
    level = torch.randn(-(-t // 4) or 1, 1, 1, channels, generator=generator, dtype=torch.float64)
    base = still + 2 * level.repeat_interleave(4, 0)[:t]
    return (base + amount[:, None] * change * 3).reshape(t * h * w, channels)


def as_frames(x: torch.Tensor, grid: tuple[int, int, int]):
    """A numpy [t, l, C] of one video."""
    t, h, w = grid
    return x.double().view(t, h * w, -1).numpy()
