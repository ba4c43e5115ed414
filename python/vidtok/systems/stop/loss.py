"""The contrastive loss over the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum over ranks, as every rank computes the whole loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        rank, most = dist.get_rank(), max(counts)
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - x.shape[0])).contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.count], None


def gather(x: Tensor) -> Tensor:
    """``[B, …]`` of every process, one after the other; ``x`` itself where there is one. Differentiable.

    The gradient is summed over ranks, so that the mean over ranks that DDP takes is that of the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    count = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    return _Gather.apply(x, [int(c) for c in counts])


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    r""":math:`-\frac1{2B}\sum_i (\log softmax(s_{i:})_i + \log softmax(s_{:i})_i)` of ``[B, B]`` logits."""
    logits = logits.float()
    target = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
