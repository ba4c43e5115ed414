"""CUDA topk_select."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, check, device_list, extension, launch, pointer


def topk_select(score: Tensor, keep: list[int], cu_seqlens: Tensor | None) -> Any:
    """See :func:`vidtok.kernels.reference.topk_select.topk_select`."""
    dtype = DTYPE_CODE.get(score.dtype)
    if dtype is None or (cu_seqlens is not None and cu_seqlens.dtype is not torch.int32):
        return NotImplemented
    n = score.shape[0]
    _check.below_2_31(n, "scores")
    segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if min(keep, default=0) < 0 or max(keep, default=0) > n:
        raise ValueError(f"expected keep between 0 and {n}, got {keep}")
    one = len(keep) == 1
    out = score.new_empty(keep[0] * segments if one else sum(keep), dtype=torch.int64)
    if segments == 0:
        return out
    on = launch(score)
    shape = {"segments": segments, "longest": -(-n // segments)}
    threads = tables.choose("cuda", "topk_select", on.sm, DTYPE_NAME[score.dtype], shape)["threads"]
    starts = None if one else device_list([0, *accumulate(keep)], score)
    status = extension().topk_select(
        pointer(score), dtype, n, pointer(cu_seqlens), segments, keep[0] if one else 0, pointer(starts), 0,
        out.data_ptr(), threads, *on,
    )  # fmt: skip
    check(status, "topk_select", score)
    return out
