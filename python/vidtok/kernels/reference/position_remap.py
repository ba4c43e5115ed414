"""Gather of the anchors' entries of any number of per-token tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def result_shape(shape: Sequence[Any], dim: int, dense: int, count: Any, length: Any) -> list[Any]:
    """Shape after ``count`` anchors; a dense batch ending at ``dim`` gets ``length`` entries per row."""
    tokens = [shape[dim - 1], length] if dense else [count]
    return [*shape[: dim - dense], *tokens, *shape[dim + 1 :]]


def remap_one(anchor: Tensor, t: Tensor, dim: int, dense: int, fill: float, length: int) -> Tensor:
    """One tensor by plain torch, differentiable; entries of anchor −1 become ``fill``."""
    first = dim - dense
    rows = t.flatten(first, dim)
    shape = result_shape(t.shape, dim, dense, anchor.shape[0], length)
    if rows.shape[first] == 0:
        return t.new_full(shape, fill)
    picked = rows.index_select(first, anchor.long().clamp(min=0))
    pad = (anchor < 0).view(-1, *[1] * (rows.dim() - first - 1))
    return picked.masked_fill(pad, fill).view(shape)


def position_remap(
    anchor: Tensor, tensors: list[Tensor], dims: list[int], dense: list[int], length: int, fill: list[float]
) -> list[Tensor]:
    """Tensor i has its tokens along ``dims[i]``, together with the dimension before it where ``dense[i]``."""
    for t, d, e in zip(tensors, dims, dense):
        n = t.shape[d] * (t.shape[d - 1] if e else 1)
        if anchor.numel() and (int(anchor.min()) < -1 or int(anchor.max()) >= n):
            raise IndexError(f"expected anchor in [-1, {n}), got [{int(anchor.min())}, {int(anchor.max())}]")
    return [remap_one(anchor, t, d, e, f, length) for t, d, e, f in zip(tensors, dims, dense, fill)]
