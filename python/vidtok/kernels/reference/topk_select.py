"""Exact top-k per segment."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok.kernels.reference._numerics import bounds, rank


def topk_select(score: Tensor, keep: list[int], cu_seqlens: Tensor | None) -> Tensor:
    """Packed indices of the ``keep`` best of each segment, ascending."""
    spans = bounds(cu_seqlens, score.shape[0])
    budgets = list(keep) * len(spans) if len(keep) == 1 else keep
    parts = []
    for (lo, hi), k in zip(spans, budgets):
        if not 0 <= k <= hi - lo:
            raise ValueError(f"expected keep between 0 and the segment's {hi - lo} tokens, got {k}")
        parts.append(rank(score[lo:hi])[:k].sort().values + lo)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=score.device)
