"""Compiled position_remap."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import check, extension, num_threads, pointer
from vidtok.kernels.reference.position_remap import result_shape

_fill_bits: dict[tuple[torch.dtype, float], int] = {}


def _bits(dtype: torch.dtype, value: float) -> int:
    """The bytes of ``value`` in ``dtype`` as a signed number; raises as torch does where it does not fit."""
    known = _fill_bits.get((dtype, value))
    if known is None:
        element = torch.zeros(1, dtype=dtype).masked_fill_(torch.ones(1, dtype=torch.bool), value)
        known = int.from_bytes(bytes(element.view(torch.uint8).tolist()), "little", signed=True)
        if len(_fill_bits) < 256:
            _fill_bits[dtype, value] = known
    return known


def position_remap(
    anchor: Tensor, tensors: list[Tensor], dims: list[int], dense: list[int], length: int, fill: list[float]
) -> Any:
    """See :func:`vidtok.kernels.reference.position_remap.position_remap`."""
    if anchor.dtype is not torch.int32:
        return NotImplemented
    m = anchor.shape[0]
    out: list[Tensor] = []
    flat: list[int] = []
    n = -1
    for t, dim, batch, value in zip(tensors, dims, dense, fill):
        size = t.itemsize
        shape = t.shape
        if size > 8:
            return NotImplemented
        if len(shape) == 2 and dim == 1:  # [B, L] or [rows, N]
            outer, inner = (1, 1) if batch else (shape[0], 1)
            held = shape[1] * shape[0] if batch else shape[1]
            y = t.new_empty(shape[0], length if batch else m)
        else:
            first = dim - batch
            held = shape[first] * shape[dim] if batch else shape[dim]
            outer, inner = math.prod(shape[:first]), math.prod(shape[dim + 1 :])
            y = t.new_empty(result_shape(shape, dim, batch, m, length))
        if held != n >= 0 or (batch and shape[dim - 1] * length != m):
            raise ValueError(f"expected {n} tokens that become {m}, got shape {list(shape)} to {list(y.shape)}")
        n = held
        out.append(y)
        flat += (t.data_ptr(), y.data_ptr(), outer, inner * size, size, _bits(t.dtype, value) if value else 0)
    if not out:
        return out
    status = extension().position_remap(pointer(anchor), n, m, flat, num_threads())
    if status:
        check(status, "position_remap")
    return out
