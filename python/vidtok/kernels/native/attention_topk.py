"""Compiled attention_topk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer


def attention_topk(
    query: Tensor,
    key: Tensor,
    keep: list[int],
    span: Tensor,
    group: Tensor | None,
    scale: float,
    mask: Tensor | None,
    query_position: Tensor | None,
    use_max: bool,
    num_index: int,
    num_score: int,
) -> Any:
    """See :func:`vidtok.kernels.reference.attention_topk.attention_topk`."""
    dtype = DTYPE_CODE.get(key.dtype)
    if dtype is None:
        return NotImplemented
    batch, heads, width, dim = query.shape
    by_batch, by_head, by_row, _ = key.stride()
    spans = span.shape[0]
    if num_score < 0:
        num_score = max(0, int((span[:, 2] - span[:, 1]).sum()))
    if num_index < 0:
        groups = spans if group is None else len(set(group.tolist()))
        num_index = keep[0] * groups if len(keep) == 1 else sum(keep)
    index = key.new_empty(max(0, num_index), dtype=torch.int64)
    score = key.new_empty(max(0, num_score), dtype=torch.float32)
    if mask is not None:
        mask = mask.contiguous()
    status = extension().attention_topk(
        pointer(query), key.data_ptr(), dtype, batch, heads, key.shape[1], width, key.shape[2], dim, by_batch, by_head,
        by_row, scale, pointer(mask), pointer(query_position), use_max, pointer(span), spans, pointer(group), keep,
        index.data_ptr(), num_index, score.data_ptr(), num_score, num_threads(),
    )  # fmt: skip
    if status:
        check(status, "attention_topk")
    return index, score
