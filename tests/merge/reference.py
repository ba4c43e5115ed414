"""Token merging written with loops, from its definition: what the towers are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def groups(metric: Tensor, r: int, protected: int) -> list[list[int]]:
    """The tokens of one sequence that become one each after ``r`` merges, of each group the destination first."""
    tokens = metric.shape[0]
    sources = [i for i in range(0, tokens, 2) if i >= protected]
    targets = [i for i in range(1, tokens, 2) if i >= protected]
    r = min(r, (tokens - protected) // 2, len(sources)) if targets else 0
    if r <= 0:
        return [[i] for i in range(tokens)]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    table = (unit[sources] @ unit[targets].T).detach().double().mul(2**20).round().tolist()
    best = []
    for source, cosines in zip(sources, table, strict=True):
        top = max(cosines)
        best.append((-top, source, targets[cosines.index(top)]))
    gone = {source: target for _, source, target in sorted(best)[:r]}
    order = [i for i in range(protected) if i not in gone]
    order += [i for i in sources if i not in gone] + targets
    return [[i, *(source for source, target in gone.items() if target == i)] for i in order]


def merge(x: Tensor, metric: Tensor, size: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """One sequence ``[T, C]``, its metric ``[T, D]`` and sizes ``[T]`` after ``r`` merges."""
    outputs, sizes = [], []
    for members in groups(metric.detach(), r, protected):
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
