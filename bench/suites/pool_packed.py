"""pool_packed against adaptive_avg_pool2d on a permuted copy and on a channels-last view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.baselines import pool as baseline
from bench.case import LEVEL, Case, Inputs, Provider, Target, compiled, filled
from vidtok import ops
from vidtok.ops.pool_packed import target_side

FRAMES = 48
UNIFORM = tuple((side, to, c) for c in (1024, 3584) for side, to in ((24, 12), (24, 6), (16, 8), (16, 4)))
SIDES = (
    (8, 8),
    (8, 12),
    (10, 14),
    (12, 12),
    (12, 20),
    (14, 14),
    (16, 16),
    (16, 28),
    (18, 18),
    (20, 20),
    (24, 24),
    (9, 13),
)


def _packed(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    x = result[0] if isinstance(result, tuple) else result
    return (x.reshape(-1, x.shape[-1]),)


def _uniform(side: int, to: int, c: int, frames: int) -> Case:
    grid, out_hw = [(frames, side, side)], (to, to)

    def maps(i: Inputs) -> Tensor:
        return i["x"].view(frames, side, side, c)

    compiled_pool = compiled(baseline.permuted)
    return Case(
        "pool_packed",
        f"{frames}×{side}×{side} to {to}×{to}, {c}",
        lambda seed: {"x": filled(seed, frames * side * side, c)},
        Provider("vidtok", "pool_packed", lambda i: ops.pool_packed(i["x"], grid, out_hw=out_hw), _packed),
        (
            Provider("eager", "permuted copy", lambda i: baseline.permuted(maps(i), out_hw), _packed),
            Provider("careful", "channels-last view", lambda i: baseline.channels_last(maps(i), out_hw), _packed),
        ),
        ((4.0 * frames * (side * side + to * to) * c, 0.0),),
        (Target("limit", 1.2), Target("eager", 15), LEVEL),
        Provider("compile", "torch.compile of eager", lambda i: compiled_pool(maps(i), out_hw), _packed),
    )


def _ragged(count: int, sides: tuple[tuple[int, int], ...], c: int) -> Case:
    grids = [(1, *sides[i % len(sides)]) for i in range(count)]
    targets = [(target_side(h, 2), target_side(w, 2)) for _, h, w in grids]
    grid = torch.tensor(grids)
    n, m = sum(h * w for _, h, w in grids), sum(h * w for h, w in targets)
    return Case(
        "pool_packed",
        f"{count} grids of {len(set(sides))} sizes, level 2, {c}",
        lambda seed: {"x": filled(seed, n, c)},
        Provider("vidtok", "pool_packed", lambda i: ops.pool_packed(i["x"], grid, level=2), _packed),
        (
            Provider(
                "eager", "loop, permuted copy", lambda i: baseline.loop(i["x"], grids, targets, baseline.permuted)
            ),
            Provider(
                "careful",
                "loop, channels-last view",
                lambda i: baseline.loop(i["x"], grids, targets, baseline.channels_last),
            ),
        ),
        ((4.0 * (n + m) * c, 0.0),),
        (Target("limit", 1.3), Target("eager", 3)),
    )


def cases(tiny: bool = False) -> list[Case]:
    """Uniform grids, and 64 grids of 12 different sizes."""
    if tiny:
        return [_uniform(6, 3, 16, 2), _ragged(4, SIDES[:2], 16)]
    return [*(_uniform(*shape, FRAMES) for shape in UNIFORM), *(_ragged(64, SIDES, c) for c in (1024, 3584))]
