"""Adaptive average pooling of token maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


def permuted(x: Tensor, out_hw: tuple[int, int]) -> Tensor:
    """``[F, h, w, C]`` copied to ``[F, C, h, w]``, pooled, and copied back."""
    pooled = adaptive_avg_pool2d(x.permute(0, 3, 1, 2).contiguous(), out_hw)
    return pooled.permute(0, 2, 3, 1).contiguous()


def channels_last(x: Tensor, out_hw: tuple[int, int]) -> Tensor:
    """The same on a channels-last view, without a copy."""
    return adaptive_avg_pool2d(x.permute(0, 3, 1, 2), out_hw).permute(0, 2, 3, 1)


def loop(x: Tensor, grids: list[tuple[int, int, int]], targets: list[tuple[int, int]], how: object) -> Tensor:
    """One call per grid of a packed ``[N, C]``."""
    parts, start = [], 0
    for (t, h, w), out_hw in zip(grids, targets):
        part = x[start : start + t * h * w].view(t, h, w, -1)
        start += t * h * w
        parts.append(how(part, out_hw).reshape(-1, x.shape[1]))  # type: ignore[operator]
    return torch.cat(parts)
