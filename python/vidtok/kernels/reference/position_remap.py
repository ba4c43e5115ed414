"""Gather of the anchors' entries of any number of per-token tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def position_remap(anchor: Tensor, tensors: list[Tensor], fill: list[float]) -> list[Tensor]:
    """Each tensor is ``[outer, N, inner]``; entries of anchor −1 become ``fill``."""
    n = tensors[0].shape[1] if tensors else 0
    if anchor.numel() and (int(anchor.min()) < -1 or int(anchor.max()) >= n):
        raise IndexError(f"expected anchor in [-1, {n}), got [{int(anchor.min())}, {int(anchor.max())}]")
    index, pad = anchor.long().clamp(min=0), anchor < 0
    out = []
    for t, value in zip(tensors, fill):
        if n == 0:
            out.append(t.new_full((t.shape[0], anchor.shape[0], t.shape[2]), value))
            continue
        rows = t.index_select(1, index)
        out.append(rows.masked_fill(pad[None, :, None], value))
    return out
