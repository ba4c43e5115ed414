"""PruneVid stage 1, decision and move, against its eager formulas; the limit is the sum of its operators' limits."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.baselines import prunevid as baseline
from bench.case import Case, Inputs, Provider, Target, Work, tokens
from bench.suites.cluster_dpc_knn import work as dpc_work
from vidtok import methods, ops

OPTIONS = {"tau": 0.8, "cluster_ratio": 0.5, "temporal_segment_ratio": 0.25, "k": 7}
SCENE = 4


def _video(seed: int, frames: int, slots: int, c: int) -> Inputs:
    """Scenes of a few frames; half of the slots of each stand still."""
    generator = torch.Generator().manual_seed(seed)
    scene = tokens(seed, -(-frames // SCENE), slots, c).repeat_interleave(SCENE, 0)[:frames]
    moving = torch.rand(1, slots, 1, generator=generator) < 0.5
    noise = tokens(seed + 1, frames, slots, c)
    return {"x": torch.where(moving, noise, scene + noise / 8).view(frames * slots, c)}


def _ours(x: Tensor, grid: list[tuple[int, int, int]]) -> Tensor:
    return ops.plan_apply(methods.prunevid(x, grid, **OPTIONS), x)


def _unordered(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """One number per output token, sorted: the two sides order their outputs differently."""
    direction = torch.randn(result.shape[1], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (((result.double() @ direction).sort().values),)


def operator_work(x: Tensor, grid: list[tuple[int, int, int]]) -> Work:
    """(bytes, FLOPs) of every operator call that the method and the move make."""
    calls: list[tuple[float, float]] = []

    def record(name: str, count: Any) -> Any:
        run = getattr(ops, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            calls.extend(count(args, kwargs, result))
            return result

        return mock.patch.object(ops, name, wrapped)

    def moved(args: Any, kwargs: Any, result: Tensor) -> list[tuple[float, float]]:
        plan, tokens_in = args
        rows = plan.num_out if plan.is_gather else torch.unique(plan.member).numel()
        return [(4.0 * (rows + plan.num_out) * tokens_in.shape[1], 0.0)]

    def clustered(args: Any, kwargs: Any, result: Any) -> list[tuple[float, float]]:
        n, c = args[0].shape
        cu = kwargs.get("cu_seqlens")
        lengths = [n] if cu is None else cu.diff().tolist()
        parts = [dpc_work(length, c) for length in lengths]
        return [(sum(b for b, _ in parts), sum(f for _, f in parts))]

    def compared(args: Any, kwargs: Any, result: Tensor) -> list[tuple[float, float]]:
        return [(4.0 * args[0].numel() + 4 * result.numel(), 0.0)]

    patches = (
        record("plan_apply", moved),
        record("cluster_dpc_knn", clustered),
        record("adjacent_similarity", compared),
    )
    with torch.no_grad(), patches[0], patches[1], patches[2]:
        _ours(x, grid)
    return tuple(calls)


def cases(tiny: bool = False) -> list[Case]:
    """One video."""
    frames, side, c = (8, 4, 64) if tiny else (32, 14, 3584)
    grid = [(frames, side, side)]

    @functools.cache
    def work() -> Work:
        return operator_work(_video(0, frames, side * side, c)["x"], grid)

    return [
        Case(
            "prunevid",
            f"{frames}×{side * side}×{c}",
            lambda seed: _video(seed, frames, side * side, c),
            Provider("vidtok", "methods.prunevid, plan_apply", lambda i: _ours(i["x"], grid), _unordered, 0.01),
            (
                Provider(
                    "eager",
                    "windows and frames in a loop",
                    lambda i: baseline.eager(i["x"].view(frames, side * side, c), **OPTIONS),
                    _unordered,
                    1.0 if tiny else 0.1,
                ),
            ),
            work,
            (Target("limit", 2), Target("eager", 5)),
        )
    ]
