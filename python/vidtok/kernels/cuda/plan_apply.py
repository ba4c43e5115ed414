"""CUDA plan_apply and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, check, extension, launch, pointer, workspace
from vidtok.kernels.native.plan_apply import _members


def _choice(x: Tensor, rows: int, sm: int, gather: bool = False) -> tuple[int, int]:
    shape = {"rows": rows, "channels": x.shape[1], "itemsize": x.itemsize}
    # Bytes move alike whatever they mean, also where bf16 cannot be computed with.
    dtype = "float16" if gather and x.itemsize == 2 else DTYPE_NAME[x.dtype]
    knobs = tables.choose("cuda", "plan_apply", sm, dtype, shape)
    return knobs["threads"], knobs["vectors"]


def plan_apply(x: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None) -> Any:
    """See :func:`vidtok.kernels.reference.plan_apply.plan_apply`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None or anchor.dtype is not torch.int32:
        return NotImplemented
    n, c = x.shape
    m = anchor.shape[0]
    nnz = 0 if member is None else _members(m, member, offset, weight)
    _check.below_2_31(max(n, m, nnz), "rows")
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(m, c)
    on = launch(anchor if member is None else x)  # a gather moves bytes of any type
    status = extension().plan_apply(
        x.data_ptr(), out.data_ptr(), dtype, n, m, c, x.stride(0), pointer(anchor),
        pointer(member), pointer(offset), pointer(weight), nnz, *_choice(x, m, on.sm, member is None), *on,
    )  # fmt: skip
    check(status, "plan_apply", x)
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
    _check.below_2_31(max(num_in, m, nnz), "rows")
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    out = grad.new_empty(num_in, c)
    ext = extension()
    scratch = workspace(grad, ext.plan_apply_backward_workspace(num_in, m, member is None, nnz))
    on = launch(grad)
    status = ext.plan_apply_backward(
        grad.data_ptr(), out.data_ptr(), dtype, num_in, m, c, grad.stride(0), pointer(anchor), pointer(member),
        pointer(offset), pointer(weight), nnz, pointer(scratch), *_choice(grad, num_in, on.sm), *on,
    )  # fmt: skip
    check(status, "plan_apply_backward", grad)
    return out
