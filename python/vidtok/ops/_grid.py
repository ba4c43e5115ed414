"""Token grids as operators take them: int64 rows (frames, height, width) on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidtok import _check

GridLike = Tensor | Sequence[Sequence[int]]


def as_tensor(grid_thw: GridLike) -> Tensor:
    """``[V, 3]`` int64 on the CPU."""
    if not isinstance(grid_thw, Tensor):
        for row in grid_thw:
            if len(row) != 3:
                _check.fail("grid_thw as rows (frames, height, width)", str(grid_thw))
        return torch.tensor(grid_thw, dtype=torch.int64, device="cpu").reshape(-1, 3)
    if grid_thw.dtype == torch.int64 and grid_thw.dim() == 2 and grid_thw.shape[1] == 3 and grid_thw.is_cpu:
        return grid_thw if grid_thw.is_contiguous() else grid_thw.contiguous()
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
        _check.fail("grid_thw of shape [V, 3] with integers", grid_thw)
    return grid_thw.to(device="cpu", dtype=torch.int64).contiguous()


def rows(grid: Tensor) -> list[list[int]]:
    """The rows as Python integers; only outside traced code."""
    out: list[list[int]] = grid.tolist()
    for row in out:
        t, h, w = row
        if t < 0 or h < 0 or w < 0:
            _check.fail("grid_thw without negative entries", str(row))
    return out


def check_total(grid_rows: list[list[int]], total: int) -> None:
    """Raise unless the grids hold ``total`` tokens together."""
    held = 0
    for t, h, w in grid_rows:
        held += t * h * w
    if held != total:
        _check.fail(f"grid_thw that holds the {total} tokens of x", f"{grid_rows} with {held}")
