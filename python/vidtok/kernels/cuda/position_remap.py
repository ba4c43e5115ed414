"""CUDA position_remap."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import check, extension, launch, pointer
from vidtok.kernels.native.position_remap import _bits
from vidtok.kernels.reference.position_remap import result_shape


def position_remap(
    anchor: Tensor, tensors: list[Tensor], dims: list[int], dense: list[int], length: int, fill: list[float]
) -> Any:
    """See :func:`vidtok.kernels.reference.position_remap.position_remap`."""
    if anchor.dtype is not torch.int32:
        return NotImplemented
    m = anchor.shape[0]
    out: list[Tensor] = []
    flat: list[int] = []
    n, row = -1, 0
    for t, dim, batch, value in zip(tensors, dims, dense, fill):
        size, shape = t.itemsize, t.shape
        if size > 8:
            return NotImplemented
        first = dim - batch
        held = shape[first] * shape[dim] if batch else shape[dim]
        outer, inner = math.prod(shape[:first]), math.prod(shape[dim + 1 :]) * size
        y = t.new_empty(result_shape(shape, dim, batch, m, length))
        if held != n >= 0 or (batch and shape[dim - 1] * length != m):
            raise ValueError(f"expected {n} tokens that become {m}, got shape {list(shape)} to {list(y.shape)}")
        n = held
        row += outer * inner
        out.append(y)
        flat += (t.data_ptr(), y.data_ptr(), outer, inner, size, _bits(t.dtype, value) if value else 0)
    if not out:
        return out
    _check.below_2_31(max(n, m), "tokens")
    x = tensors[0]
    on = launch(anchor)
    # Bytes move whatever their type; the tables know this operator by one name.
    knobs = tables.choose("cuda", "position_remap", on.sm, "float32", {"rows": m, "tensors": len(out), "bytes": row})
    status = extension().position_remap(pointer(anchor), n, m, flat, knobs["threads"], *on)
    check(status, "position_remap", x)
    return out
