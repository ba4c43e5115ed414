"""CUDA contour_select."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, check, device_list, extension, launch, pointer, workspace
from vidtok.kernels.native.contour_select import _basis
from vidtok.kernels.reference._numerics import bounds

# Frames of one block of the projection, as csrc/cuda/contour_select.h has it.
_ROWS = 16


@lru_cache(maxsize=32)
def _uploaded(channels: int, rank: int, seed: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("expected a call with the same lengths before the capture of a CUDA graph, got none")
    return _basis(channels, rank, seed).to(device)


# Bases that a captured graph reads must outlive the cache above.
_captured: list[Tensor] = []


def _basis_on(channels: int, rank: int, seed: int, device: torch.device) -> Tensor:
    out = _uploaded(channels, rank, seed, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(out)
    return out


def contour_select(
    x: Tensor, num: list[int], query: Tensor | None, max_rank: int, rule: int, seed: int, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.contour_select.contour_select`.

    Each sequence's length decides its basis: offsets on a GPU are read by the host.
    """
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    spans = bounds(cu_seqlens, n)
    _check.below_2_31(n, "frames")
    budgets = num * len(spans) if len(num) == 1 else num
    if len(budgets) != len(spans):
        raise ValueError(f"expected num as one number or one for each of {len(spans)} sequences, got {len(num)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    flat: list[int] = []
    bases: list[Tensor] = []
    out = tiles = widest = 0
    for (begin, end), count in zip(spans, budgets):
        frames = end - begin
        if not 0 <= count <= frames:
            raise ValueError(f"expected num between 0 and the sequence's {frames} frames, got {count}")
        rank = min(max_rank, frames // 4, c)
        if rank > 0:
            bases.append(_basis_on(c, rank, seed, x.device))
        flat += (begin, frames, rank, count, out, bases[-1].data_ptr() if rank > 0 else 0, tiles)
        out, tiles, widest = out + count, tiles - (-frames // _ROWS), max(widest, rank)
    index = x.new_empty(out, dtype=torch.int64)
    distance = x.new_empty(n, dtype=torch.float32)
    ext = extension()
    scratch = workspace(x, ext.contour_select_workspace(n, c, len(spans), widest))
    sequences = device_list(flat, x)
    on = launch(x)
    # A sequence's bits must not depend on those beside it: the table is asked for the largest rank.
    shape = {"sequences": len(spans), "longest": n, "rank": max(1, min(max_rank, c)), "channels": max(1, c)}
    threads = tables.choose("cuda", "contour_select", on.sm, DTYPE_NAME[x.dtype], shape)["threads"]
    status = ext.contour_select(
        x.data_ptr(), dtype, n, c, x.stride(0), sequences.data_ptr(), len(spans), widest, tiles, pointer(query), rule,
        index.data_ptr(), distance.data_ptr(), pointer(scratch), threads, *on,
    )  # fmt: skip
    check(status, "contour_select", x)
    return index, distance
