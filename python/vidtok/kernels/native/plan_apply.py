"""Compiled plan_apply and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer


def plan_apply(x: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None) -> Any:
    """See :func:`vidtok.kernels.reference.plan_apply.plan_apply`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    m = anchor.shape[0]
    out = x.new_empty(m, c)
    nnz = 0 if member is None else member.shape[0]
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
    if dtype is None:
        return NotImplemented
    m, c = grad.shape
    out = grad.new_empty(num_in, c)
    nnz = 0 if member is None else member.shape[0]
    status = extension().plan_apply_backward(
        grad.data_ptr(), out.data_ptr(), dtype, num_in, m, c, grad.stride(0), pointer(anchor),
        pointer(member), pointer(offset), pointer(weight), nnz, num_threads(),
    )  # fmt: skip
    if status:
        check(status, "plan_apply_backward")
    return out
