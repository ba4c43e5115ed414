"""CUDA attention_topk."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, check, device_list, extension, launch, pointer, workspace
from vidtok.kernels.spans import layout

# Kernels count in int32, and step past the last by at most a tile.
_MOST = 2**31 - 65536


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
    kv_heads, length = key.shape[1], key.shape[2]
    numbers = None if group is None else tuple(group.tolist())
    plan = layout(tuple(span.flatten().tolist()), numbers, tuple(keep), batch, length)
    tokens, groups = plan.offsets[-1], len(plan.budgets)
    for count, what in ((length, "keys"), (batch * heads * width, "query rows"), (tokens, "tokens")):
        if count > _MOST:
            raise ValueError(f"expected at most {_MOST} {what}, got {count}")
    index = key.new_empty(sum(plan.budgets), dtype=torch.int64)
    score = key.new_empty(tokens, dtype=torch.float32)
    if tokens == 0:
        return index, score
    if heads * width == 0:
        query = query.new_zeros(batch, kv_heads, 1, dim)
        heads, width = kv_heads, 1
        query_position = torch.full((batch, 1), -1, device=key.device)
    if mask is not None:
        mask = mask.contiguous()
    on, name, ext = launch(key), DTYPE_NAME[key.dtype], extension()
    shape = {"length": length, "q_heads": heads, "kv_heads": kv_heads, "dim": dim, "rows": width}
    knobs = tables.choose("cuda", "attention_topk", on.sm, name, shape)
    longest = {"segments": groups, "longest": -(-tokens // groups)}
    threads = tables.choose("cuda", "topk_select", on.sm, "float32", longest)["threads"]
    even = len(set(plan.budgets)) == 1
    starts = None if even else device_list([0, *accumulate(plan.budgets)], key)
    sizes = (batch, heads, kv_heads, width, length, dim)
    scratch = workspace(
        key, ext.attention_topk_workspace(dtype, *sizes, tokens, plan.ordered, knobs["split"], knobs["warps"])
    )
    status = ext.attention_topk(
        pointer(query), key.data_ptr(), dtype, *sizes, *key.stride()[:3], scale, pointer(mask),
        pointer(query_position), use_max, pointer(device_list(plan.pieces, key)), span.shape[0], tokens, plan.ordered,
        pointer(device_list(plan.offsets, key, torch.int32)), groups, plan.budgets[0] if even else 0, pointer(starts),
        index.data_ptr(), score.data_ptr(), pointer(scratch), threads, knobs["split"], knobs["warps"], *on,
    )  # fmt: skip
    check(status, "attention_topk", key)
    return index, score
