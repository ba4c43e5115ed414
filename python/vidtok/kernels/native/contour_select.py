"""Compiled contour_select."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer
from vidtok.kernels.reference import contour_select as reference

# The columns of a basis come in whole vectors, as csrc/cpu/contour_select.h has it.
PAD = 8


@lru_cache(maxsize=32)
def _basis(channels: int, rank: int, seed: int) -> Tensor:
    out = torch.zeros(channels, -(-rank // PAD) * PAD, dtype=torch.float64)
    out[:, :rank] = reference.projection(channels, rank, seed)
    return out


def contour_select(
    x: Tensor, num: list[int], query: Tensor | None, max_rank: int, rule: int, seed: int, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.contour_select.contour_select`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    cu = [0, n] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = len(cu) - 1
    bases = []
    for a, b in zip(cu, cu[1:]):
        rank = min(max_rank, (b - a) // 4, c)
        bases.append(_basis(c, rank, seed) if rank > 0 else None)
    index = x.new_empty(max(num[0] * sequences if len(num) == 1 else sum(num), 0), dtype=torch.int64)
    distance = x.new_empty(n, dtype=torch.float32)
    status = extension().contour_select(
        x.data_ptr(), dtype, n, c, x.stride(0), pointer(cu_seqlens), sequences, num, pointer(query), max_rank,
        [pointer(b) for b in bases], rule, pointer(index), pointer(distance), num_threads(),
    )  # fmt: skip
    if status:
        check(status, "contour_select")
    return index, distance
