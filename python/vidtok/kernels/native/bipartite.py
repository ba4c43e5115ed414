"""Compiled bipartite_match and bipartite_merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer

_INT, _FLOAT = torch.int32, torch.float32


def _call(
    name: str,
    x: Tensor | None,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    protected: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Any:
    code = DTYPE_CODE.get(metric.dtype)
    x_code = 0 if x is None else DTYPE_CODE.get(x.dtype)
    if code is None or x_code is None:
        return NotImplemented
    ext = extension()
    shape, stride = metric.shape, metric.stride()
    tokens, dim = shape[-2], shape[-1]
    if cu_seqlens is None:
        batch, n = shape[0], shape[0] * tokens
        heads, by_batch, by_head = (shape[1], stride[0], stride[1]) if len(shape) == 4 else (1, stride[0], 0)
    else:
        batch, n = cu_seqlens.shape[0] - 1, tokens
        heads, by_batch, by_head = (shape[0], 0, stride[0]) if len(shape) == 3 else (1, 0, 0)
    at_mask, at_cu = pointer(mask), pointer(cu_seqlens)
    m = ext.bipartite_outputs(batch, tokens, r, protected, at_mask, at_cu)
    if m < 0:
        check(-m, name)
    empty = metric.new_empty
    cu_in, cu_out = empty(batch + 1, dtype=_INT), empty(batch + 1, dtype=_INT)
    anchor, member, offset = empty(m, dtype=_INT), empty(n, dtype=_INT), empty(m + 1, dtype=_INT)
    weight = empty(n, dtype=_FLOAT)
    lists = (cu_in, cu_out, anchor, member, offset, weight)
    moved: tuple[int, ...]
    if x is None:
        out: tuple[Tensor, ...] = lists
        moved = (0, 0, 0, 0, 0, 0, 0)
    else:
        c = x.shape[-1]
        y, total = empty(m, c, dtype=x.dtype), empty(m, dtype=_FLOAT)
        out = (y, total, *lists)
        x_batch = x.stride(0) if cu_seqlens is None else 0
        moved = (x.data_ptr(), x_code, c, x_batch, x.stride(-2), y.data_ptr(), total.data_ptr())
    status = getattr(ext, name)(
        metric.data_ptr(), code, heads, dim, by_batch, by_head, stride[-2], pointer(size), at_mask, at_cu,
        batch, tokens, r, protected, m, num_threads(), cu_in.data_ptr(), cu_out.data_ptr(), anchor.data_ptr(),
        member.data_ptr(), offset.data_ptr(), weight.data_ptr(), *moved,
    )  # fmt: skip
    if status:
        check(status, name)
    return out


def bipartite_match(
    metric: Tensor, r: int, size: Tensor | None, protected: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_match`."""
    return _call("bipartite_match", None, metric, r, size, protected, mask, cu_seqlens)


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    protected: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_merge`."""
    return _call("bipartite_merge", x, metric, r, size, protected, mask, cu_seqlens)
