"""Compiled topk_select."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer


def topk_select(score: Tensor, keep: list[int], cu_seqlens: Tensor | None) -> Any:
    """See :func:`vidtok.kernels.reference.topk_select.topk_select`."""
    dtype = DTYPE_CODE.get(score.dtype)
    if dtype is None:
        return NotImplemented
    segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    total = keep[0] * segments if len(keep) == 1 else sum(keep)
    out = score.new_empty(total, dtype=torch.int64)
    status = extension().topk_select(
        pointer(score), dtype, score.shape[0], keep, pointer(cu_seqlens), segments, out.data_ptr(), num_threads()
    )
    if status:
        check(status, "topk_select")
    return out
