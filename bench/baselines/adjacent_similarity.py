"""Cosine of tokens along time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def previous_eager(x: Tensor) -> Tensor:
    """Unit rows first, then products with the frame before; ``x`` ``[T, L, C]``."""
    unit = functional.normalize(x, dim=-1)
    score = (unit[1:] * unit[:-1]).sum(-1)
    return torch.cat([torch.full_like(score[:1], -torch.inf), score]).view(-1)


def previous_careful(x: Tensor) -> Tensor:
    """Norms once; products of one frame at a time in one buffer that stays in the cache."""
    frames, slots, c = x.shape
    norm = torch.linalg.vector_norm(x, dim=-1)
    score = x.new_full((frames, slots), -torch.inf)
    product = x.new_empty(slots, c)
    for t in range(1, frames):
        torch.mul(x[t], x[t - 1], out=product)
        torch.sum(product, -1, out=score[t])
    score[1:] /= norm[1:] * norm[:-1]
    return score.view(-1)


def window_eager(x: Tensor, width: int) -> Tensor:
    """Mean cosine over all ordered pairs of frames of a segment, per slot, as PruneVid scores what stands still."""
    frames, slots, c = x.shape
    unit = functional.normalize(x, dim=-1).view(frames // width, width, slots, c).transpose(1, 2)
    pairs = unit @ unit.transpose(-1, -2)
    return ((pairs.sum((-1, -2)) - width) / (width * (width - 1))).reshape(-1)


def window_careful(x: Tensor, width: int) -> Tensor:
    """The same from the norm of the sum of unit rows, summed frame by frame in one buffer."""
    frames, slots, c = x.shape
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).reciprocal_()
    score = x.new_empty(frames // width, slots)
    total = x.new_empty(slots, c)
    for segment, first in enumerate(range(0, frames, width)):
        torch.mul(x[first], inverse[first], out=total)
        for t in range(first + 1, first + width):
            total.addcmul_(x[t], inverse[t])
        torch.linalg.vector_norm(total, dim=-1, out=score[segment])
    return score.square_().sub_(width).div_(width * (width - 1)).view(-1)
