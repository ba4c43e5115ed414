"""Compiled pool_packed and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer


def _grids(grid_in: Tensor, grid_out: Tensor) -> None:
    """Raise unless both are int64 ``[V, 3]``."""
    shape = grid_in.shape
    if shape != grid_out.shape or len(shape) != 2 or shape[1] != 3:
        raise IndexError(f"expected two grids of shape [V, 3], got {list(shape)} and {list(grid_out.shape)}")
    if grid_in.dtype is not torch.int64 or grid_out.dtype is not torch.int64:
        raise TypeError(f"expected int64 grids, got {grid_in.dtype} and {grid_out.dtype}")


def pool_packed(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_out: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    _grids(grid_in, grid_out)
    if x.stride(1) != 1:
        x = x.contiguous()
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
    _grids(grid_in, grid_out)
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    out = grad.new_empty(num_in, c)
    status = extension().pool_packed_backward(
        grad.data_ptr(), out.data_ptr(), dtype, num_in, m, c, grad.stride(0), pointer(grid_in), pointer(grid_out),
        grid_in.shape[0], num_threads(),
    )  # fmt: skip
    if status:
        check(status, "pool_packed_backward")
    return out
