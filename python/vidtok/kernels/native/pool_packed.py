"""Compiled pool_packed and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def pool_packed(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_out: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed`."""
    return NotImplemented


def pool_packed_backward(grad: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed_backward`."""
    return NotImplemented
