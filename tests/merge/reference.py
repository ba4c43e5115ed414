"""Token merging written with loops, from its definition: what the towers are compared with."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def match(metric: Tensor, r: int, protected: int | Collection[int]) -> tuple[list[int], dict[int, int]]:
    """Which of the tokens of one sequence are left, in their new order, and where each of the others goes."""
    tokens = metric.shape[0]
    held = set(range(protected) if isinstance(protected, int) else protected)
    sources = [i for i in range(0, tokens, 2) if i not in held]
    targets = [i for i in range(1, tokens, 2) if i not in held]
    r = min(r, (tokens - len(held)) // 2, len(sources)) if targets else 0
    if r <= 0:
        return list(range(tokens)), {}
    unit = metric / metric.norm(dim=-1, keepdim=True)
    table = (unit[sources] @ unit[targets].T).detach().double().mul(2**20).round().tolist()
    best = []
    for source, cosines in zip(sources, table, strict=True):
        top = max(cosines)
        best.append((-top, source, targets[cosines.index(top)]))
    gone = {source: target for _, source, target in sorted(best)[:r]}
    return sorted(held) + [i for i in sources if i not in gone] + targets, gone


def merge(x: Tensor, metric: Tensor, size: Tensor, r: int, protected: int | Collection[int]) -> tuple[Tensor, Tensor]:
    """One sequence ``[T, C]``, its metric ``[T, D]`` and sizes ``[T]`` after ``r`` merges."""
    order, gone = match(metric, r, protected)
    outputs, sizes = [], []
    for i in order:
        members = [i, *(source for source, target in gone.items() if target == i)]
        weight = torch.stack([size[m] for m in members])
        total = weight.sum()
        outputs.append(sum(size[m] * x[m] for m in members) / total)
        sizes.append(total)
    return torch.stack(outputs), torch.stack(sizes)


def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """``[H, T, D]``; keys count ``size`` ``[T]`` times."""
    logits = scale * q @ k.transpose(1, 2)
    weight = logits.sub(logits.amax(-1, keepdim=True)).exp()
    if size is not None:
        weight = weight * size
    return weight / weight.sum(-1, keepdim=True) @ v
