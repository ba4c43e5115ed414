"""Compiled position_remap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import check, extension, num_threads, pointer

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


def position_remap(anchor: Tensor, tensors: list[Tensor], fill: list[float]) -> Any:
    """See :func:`vidtok.kernels.reference.position_remap.position_remap`."""
    m = anchor.shape[0]
    out, flat = [], []
    n = 0
    for t, value in zip(tensors, fill):
        size = t.element_size()
        if size > 8 or not t.is_contiguous():
            return NotImplemented
        outer, n, inner = t.shape
        y = t.new_empty(outer, m, inner)
        out.append(y)
        flat += (t.data_ptr(), y.data_ptr(), outer, inner * size, size, _bits(t.dtype, value))
    status = extension().position_remap(pointer(anchor), n, m, flat, num_threads())
    if status:
        check(status, "position_remap")
    return out
