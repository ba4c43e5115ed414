"""Density peaks by k nearest neighbours (Rodriguez and Laio 2014; Du, Ding and Jia 2016), as PruneVid uses it."""

from __future__ import annotations

import torch
from torch import Tensor


def eager(x: Tensor, clusters: int, k: int) -> tuple[Tensor, Tensor]:
    """Assignment ``[B, N]`` and centres ``[B, K]`` of ``x`` ``[B, N, C]``; density ties by random noise."""
    batch, _n, c = x.shape
    distance = torch.cdist(x, x) / c**0.5
    nearest = torch.topk(distance, k=k, dim=-1, largest=False).values
    density = (-(nearest**2).mean(dim=-1)).exp()
    density = density + torch.rand_like(density) * 1e-6
    higher = (density[:, None, :] > density[:, :, None]).type(x.dtype)
    largest = distance.flatten(1).max(dim=-1)[0][:, None, None]
    parent = (distance * higher + largest * (1 - higher)).min(dim=-1).values
    center = torch.topk(parent * density, k=clusters, dim=-1).indices
    rows = torch.arange(batch, device=x.device)[:, None]
    assignment = distance[rows, center].argmin(dim=1)
    assignment[rows, center] = torch.arange(clusters, device=x.device)[None].expand(batch, -1)
    return assignment, center


def careful(x: Tensor, clusters: int, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances from one matmul, in place, and no random noise; ``x`` ``[N, C]``."""
    _n, c = x.shape
    norm = x.square().sum(1)
    squared = torch.addmm(norm[None], x, x.t(), alpha=-2.0).add_(norm[:, None]).clamp_(min=0).div_(c)
    squared.fill_diagonal_(0)
    density = squared.topk(k, dim=1, largest=False, sorted=False).values.mean(1).neg_().exp_()
    lower = density[None, :] <= density[:, None]
    parent = squared.masked_fill(lower, torch.inf).amin(1)
    parent = torch.where(torch.isinf(parent), squared.max(), parent)
    center = (parent.sqrt() * density).topk(clusters).indices
    assignment = squared.index_select(0, center).argmin(0)
    assignment[center] = torch.arange(clusters, device=x.device)
    return assignment, center


def one_hot_mean(x: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """Cluster means by a matmul with the one-hot matrix, as published."""
    weight = torch.nn.functional.one_hot(assignment, clusters).to(x.dtype)
    return (weight.transpose(-1, -2) @ x) / weight.sum(-2)[..., None]


def index_add_mean(x: Tensor, assignment: Tensor, inverse_count: Tensor, out: Tensor) -> Tensor:
    """Cluster means in one pass over ``x``, with the counts known."""
    return out.zero_().index_add_(0, assignment, x).mul_(inverse_count)
