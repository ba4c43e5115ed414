"""Compiled adjacent_similarity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer
from vidtok.kernels.reference.adjacent_similarity import MODES, window_slots

_WINDOW, _CENTER = MODES.index("window"), MODES.index("center")


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
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    if len(grid.shape) != 2 or grid.shape[1] != 3:
        raise IndexError(f"expected grid of shape [V, 3], got {list(grid.shape)}")
    if mode == _CENTER:
        assert center is not None and cu_seqlens is not None
        if center.dtype is not x.dtype or list(center.shape) != [cu_seqlens.shape[0] - 1, c]:
            raise IndexError(f"expected center of shape [{cu_seqlens.shape[0] - 1}, {c}], got {list(center.shape)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    if mode != _WINDOW:
        num_out = n
    elif num_out < 0:
        assert window is not None
        num_out = window_slots(grid.tolist(), window.tolist(), n)
    out = x.new_empty(num_out, dtype=torch.float32)
    status = extension().adjacent_similarity(
        x.data_ptr(), out.data_ptr(), dtype, n, c, x.stride(0), pointer(grid), grid.shape[0], mode,
        pointer(window), 0 if window is None else window.shape[0], pointer(center), pointer(cu_seqlens),
        0 if center is None else center.shape[0], num_out, num_threads(),
    )  # fmt: skip
    if status:
        check(status, "adjacent_similarity")
    return out
