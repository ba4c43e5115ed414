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
    """Norms once, dot products as batched 1×C by C×1 matmuls, no unit rows."""
    frames, slots, c = x.shape
    norm = torch.linalg.vector_norm(x, dim=-1)
    dot = torch.bmm(x[1:].reshape(-1, 1, c), x[:-1].reshape(-1, c, 1)).view(frames - 1, slots)
    score = dot / (norm[1:] * norm[:-1])
    return torch.cat([torch.full_like(score[:1], -torch.inf), score]).view(-1)


def window_eager(x: Tensor, width: int) -> Tensor:
    """Mean cosine over all ordered pairs of frames of a segment, per slot, as PruneVid scores what stands still."""
    frames, slots, c = x.shape
    unit = functional.normalize(x, dim=-1).view(frames // width, width, slots, c).transpose(1, 2)
    pairs = unit @ unit.transpose(-1, -2)
    return ((pairs.sum((-1, -2)) - width) / (width * (width - 1))).reshape(-1)


def window_careful(x: Tensor, width: int) -> Tensor:
    """The same from the norm of the sum of unit rows."""
    _frames, slots, c = x.shape
    inverse = 1.0 / torch.linalg.vector_norm(x, dim=-1)
    parts = x.view(-1, width, slots, c)
    total = torch.einsum("gwlc,gwl->glc", parts, inverse.view(-1, width, slots))
    return ((total.square().sum(-1) - width) / (width * (width - 1))).reshape(-1)
