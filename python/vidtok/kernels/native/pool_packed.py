"""Compiled pool_packed and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer


def pool_packed(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_out: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    if num_out < 0:
        num_out = int(grid_out.prod(1).sum())
    out = x.new_empty(num_out, c)
    status = extension().pool_packed(
        x.data_ptr(), out.data_ptr(), dtype, n, num_out, c, x.stride(0), pointer(grid_in), pointer(grid_out),
        grid_in.shape[0], num_threads(),
    )  # fmt: skip
    if status:
        check(status, "pool_packed")
    return out


def pool_packed_backward(grad: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed_backward`."""
    dtype = DTYPE_CODE.get(grad.dtype)
    if dtype is None:
        return NotImplemented
    m, c = grad.shape
    out = grad.new_empty(num_in, c)
    status = extension().pool_packed_backward(
        grad.data_ptr(), out.data_ptr(), dtype, num_in, m, c, grad.stride(0), pointer(grid_in), pointer(grid_out),
        grid_in.shape[0], num_threads(),
    )  # fmt: skip
    if status:
        check(status, "pool_packed_backward")
    return out
