"""Adaptive average pooling of packed grids of unequal sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok.kernels.reference._numerics import accumulate_dtype


def _windows(size: int, target: int) -> list[tuple[int, int]]:
    return [(i * size // target, -((-(i + 1) * size) // target)) for i in range(target)]


def _layout(grid_in: Tensor, grid_out: Tensor, num_in: int, num_out: int) -> list[tuple[list[int], list[int]]]:
    rows_in, rows_out = grid_in.tolist(), grid_out.tolist()
    fits = (
        len(rows_in) == len(rows_out)
        and sum(t * h * w for t, h, w in rows_in) == num_in
        and (num_out < 0 or sum(t * h * w for t, h, w in rows_out) == num_out)
        and all(a[0] == b[0] and b[1] <= a[1] and b[2] <= a[2] for a, b in zip(rows_in, rows_out))
    )
    if not fits:
        raise IndexError(f"expected grids over {num_in} tokens that pooling only shrinks, got {rows_in} to {rows_out}")
    return list(zip(rows_in, rows_out))


def pool_packed(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_out: int) -> Tensor:
    """Mean over each window [⌊i·n/o⌋, ⌈(i+1)·n/o⌉) of rows and columns."""
    acc, c = accumulate_dtype(x.dtype), x.shape[1]
    parts, start = [], 0
    for (t, h, w), (_, oh, ow) in _layout(grid_in, grid_out, x.shape[0], num_out):
        frames = x[start : start + t * h * w].view(t, h, w, c)
        start += t * h * w
        if (h, w) == (oh, ow):
            parts.append(frames.reshape(-1, c))
            continue
        pooled = torch.empty(t, oh, ow, c, dtype=x.dtype, device=x.device)
        for i, (top, bottom) in enumerate(_windows(h, oh)):
            for j, (left, right) in enumerate(_windows(w, ow)):
                pooled[:, i, j] = frames[:, top:bottom, left:right].to(acc).mean((1, 2)).to(x.dtype)
        parts.append(pooled.view(-1, c))
    return torch.cat(parts) if parts else x.new_empty(0, c)


def pool_packed_backward(grad: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: int) -> Tensor:
    """Each input token gets 1/area of the gradient of every window that holds it."""
    acc, c = accumulate_dtype(grad.dtype), grad.shape[1]
    parts, start = [], 0
    for (t, h, w), (_, oh, ow) in _layout(grid_in, grid_out, num_in, grad.shape[0]):
        frames = grad[start : start + t * oh * ow].view(t, oh, ow, c).to(acc)
        start += t * oh * ow
        out = torch.zeros(t, h, w, c, dtype=acc, device=grad.device)
        for i, (top, bottom) in enumerate(_windows(h, oh)):
            for j, (left, right) in enumerate(_windows(w, ow)):
                area = (bottom - top) * (right - left)
                out[:, top:bottom, left:right] += (frames[:, i, j] / area)[:, None, None]
        parts.append(out.to(grad.dtype).view(-1, c))
    return torch.cat(parts) if parts else grad.new_empty(0, c)
