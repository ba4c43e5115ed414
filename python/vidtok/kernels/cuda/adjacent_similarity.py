"""CUDA adjacent_similarity."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, check, device_list, extension, launch, pointer
from vidtok.kernels.reference.adjacent_similarity import MODES, window_slots

_PREVIOUS, _WINDOW, _CENTER = (MODES.index(name) for name in ("previous", "window", "center"))

# Channels that csrc/cuda/adjacent_similarity.h lets a block sum in shared memory.
_WIDEST = 24000


def _step(n: int, sms: int, most: int) -> int:
    """Tokens of one block: as many as leave every SM its blocks. No sum depends on it."""
    step = 1
    while step < most and n // (2 * step) >= 8 * sms:
        step *= 2
    return step


@lru_cache(maxsize=1024)
def _videos(grid: tuple[int, ...], n: int, step: int) -> tuple[tuple[int, ...], int]:
    """(first row, rows of a frame, frames, pieces before) of each video, and all pieces."""
    flat: list[int] = []
    row = pieces = 0
    for t, h, w in zip(grid[::3], grid[1::3], grid[2::3]):
        if min(t, h, w) < 0:
            break
        if t * h * w:
            flat += (row, h * w, t, pieces)
            pieces += h * w * max(1, -((1 - t) // step))
        row += t * h * w
    else:
        if row == n:
            return tuple(flat), pieces
    raise IndexError(f"expected grids that hold {n} tokens, got {grid[:12]}")


@lru_cache(maxsize=1024)
def _segments(grid: tuple[int, ...], window: tuple[int, ...], n: int, num_out: int) -> tuple[tuple[int, ...], int]:
    """The same of each segment of frames."""
    flat: list[int] = []
    row = out = segment = 0
    fits = True
    for t, h, w in zip(grid[::3], grid[1::3], grid[2::3]):
        fits = fits and min(t, h, w) >= 0
        frame = 0
        while fits and frame < t:
            frames = window[segment] if segment < len(window) else 0
            fits = 1 <= frames <= t - frame
            if h * w:
                flat += (row + frame * h * w, h * w, frames, out)
            frame, out, segment = frame + frames, out + h * w, segment + 1
        row += t * h * w
    if not fits or row != n or out != num_out or segment != len(window):
        raise IndexError(
            f"expected grids and windows that cover {n} tokens and give {num_out} scores, got {window[:12]} "
            f"over {grid[:12]}"
        )
    return tuple(flat), out


def adjacent_similarity(
    x: Tensor,
    grid: Tensor,
    mode: int,
    window: Tensor | None,
    center: Tensor | None,
    cu_seqlens: Tensor | None,
    num_out: int,
) -> Any:
    """See :func:`vidtok.kernels.reference.adjacent_similarity.adjacent_similarity`."""
    dtype = DTYPE_CODE.get(x.dtype)
    n, c = x.shape
    if dtype is None or (mode == _WINDOW and c > _WIDEST):
        return NotImplemented
    _check.below_2_31(n, "tokens")
    if len(grid.shape) != 2 or grid.shape[1] != 3:
        raise IndexError(f"expected grid of shape [V, 3], got {list(grid.shape)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    on = launch(x)
    runs: tuple[int, ...] = ()
    pieces, step = 0, 1
    if mode == _CENTER:
        assert center is not None and cu_seqlens is not None
        if center.dtype is not x.dtype or list(center.shape) != [cu_seqlens.shape[0] - 1, c]:
            raise IndexError(f"expected center of shape [{cu_seqlens.shape[0] - 1}, {c}], got {list(center.shape)}")
        if cu_seqlens.device != x.device:
            cu_seqlens = device_list(cu_seqlens.tolist(), x, torch.int32)
        step = _step(n, on.sms, 8)
    else:
        rows = tuple(chain.from_iterable(grid.tolist()))
        if mode == _WINDOW:
            assert window is not None
            windows = tuple(window.tolist())
            if num_out < 0:
                num_out = window_slots(grid.tolist(), list(windows), n)
            runs, pieces = _segments(rows, windows, n, num_out)
        else:
            step = _step(n, on.sms, 32)
            runs, pieces = _videos(rows, n, step)
    out = x.new_empty(num_out if mode == _WINDOW else n, dtype=torch.float32)
    table = device_list(runs, x)
    knobs = tables.choose("cuda", "adjacent_similarity", on.sm, DTYPE_NAME[x.dtype], {"tokens": n, "channels": c})
    status = extension().adjacent_similarity(
        x.data_ptr(), out.data_ptr(), dtype, n, c, x.stride(0), mode, table.data_ptr(), len(runs) // 4, pieces, step,
        pointer(center), pointer(cu_seqlens), 0 if center is None else center.shape[0], knobs["warps"], *on,
    )  # fmt: skip
    check(status, "adjacent_similarity", x)
    return out
