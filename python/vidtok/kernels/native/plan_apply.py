"""Compiled plan_apply and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer


def _members(m: int, member: Tensor, offset: Tensor | None, weight: Tensor | None) -> int:
    """How many; raises where the three lists do not belong together."""
    nnz = member.shape[0]
    if offset is None or weight is None or offset.shape[0] != m + 1 or weight.shape[0] != nnz:
        got = [None if t is None else t.shape[0] for t in (offset, weight)]
        raise IndexError(f"expected offset of {m + 1} entries and weight of {nnz}, got {got}")
    if member.dtype is not torch.int32 or offset.dtype is not torch.int32 or weight.dtype is not torch.float32:
        raise TypeError(f"expected int32 lists and float32 weights, got {member.dtype}, {offset.dtype}, {weight.dtype}")
    return nnz


def plan_apply(x: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None) -> Any:
    """See :func:`vidtok.kernels.reference.plan_apply.plan_apply`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None or anchor.dtype is not torch.int32:
        return NotImplemented
    n, c = x.shape
    m = anchor.shape[0]
    nnz = 0 if member is None else _members(m, member, offset, weight)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(m, c)
    status = extension().plan_apply(
        x.data_ptr(), out.data_ptr(), dtype, n, m, c, x.stride(0), pointer(anchor),
        pointer(member), pointer(offset), pointer(weight), nnz, num_threads(),
    )  # fmt: skip
    if status:
        check(status, "plan_apply")
    return out


def plan_apply_backward(
    grad: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None, num_in: int
) -> Any:
    """See :func:`vidtok.kernels.reference.plan_apply.plan_apply_backward`."""
    dtype = DTYPE_CODE.get(grad.dtype)
    if dtype is None or anchor.dtype is not torch.int32:
        return NotImplemented
    m, c = grad.shape
    if anchor.shape[0] != m:
        raise IndexError(f"expected anchor of {m} outputs, got {anchor.shape[0]}")
    nnz = 0 if member is None else _members(m, member, offset, weight)
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    out = grad.new_empty(num_in, c)
    status = extension().plan_apply_backward(
        grad.data_ptr(), out.data_ptr(), dtype, num_in, m, c, grad.stride(0), pointer(anchor),
        pointer(member), pointer(offset), pointer(weight), nnz, num_threads(),
    )  # fmt: skip
    if status:
        check(status, "plan_apply_backward")
    return out
