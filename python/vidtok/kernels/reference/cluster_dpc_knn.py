"""Density-peak clustering with k nearest neighbours, per segment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidtok.kernels.reference._numerics import accumulate_dtype, bounds

STEPS = 2**20
MAX_UNITS = 2**22


def squared_distance_units(x: Tensor) -> tuple[Tensor, float]:
    """Integer-valued units u and unit size q with ‖xᵢ − xⱼ‖²/C = u·q, of one segment.

    q = S·2⁻²⁰ with S the smallest power of two at or above the largest finite ‖x‖²/C. The
    diagonal is 0; a distance that is not finite counts as the largest, 2²².
    """
    acc = accumulate_dtype(x.dtype)
    x32 = x.to(acc)
    c = max(x.shape[1], 1)
    norm = (x32 * x32).sum(1)
    finite = norm[torch.isfinite(norm)]
    largest = float(finite.max()) / c if finite.numel() else 0.0
    scale = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 0.0
    factor = STEPS / (c * scale) if scale > 0 else 0.0
    raw = (norm[:, None] + norm[None, :] - 2.0 * (x32 @ x32.T)) * factor
    units = torch.where(torch.isfinite(raw), torch.round(raw).clamp(0, MAX_UNITS), float(MAX_UNITS))
    units.fill_diagonal_(0)
    return units, scale / STEPS


def decide(units: Tensor, q: float, num_clusters: int, k: int) -> tuple[Tensor, Tensor]:
    """Assignment (rank of the centre) and centres (by rank) of one segment from its distances."""
    n = units.shape[0]
    index = torch.arange(n, device=units.device)
    if num_clusters == 0 or n == 0:
        return index.new_full((n,), -1), index[:0]
    k = min(k, n)
    distance = units.double()
    nearest = distance.topk(k, dim=1, largest=False, sorted=False).values
    density = torch.round(torch.exp(-(nearest.sum(1) * q / k)) * STEPS) / STEPS
    higher = (density[None, :] > density[:, None]) | (
        (density[None, :] == density[:, None]) & (index[None, :] < index[:, None])
    )
    nearest_higher = torch.where(higher, distance, torch.inf).amin(1)
    nearest_higher = torch.where(torch.isinf(nearest_higher), distance.max(), nearest_higher)
    score = density * torch.sqrt(nearest_higher * q)
    center = torch.argsort(score, descending=True, stable=True)[:num_clusters]
    by_index = center.sort()
    choice = by_index.indices[distance[:, by_index.values].argmin(1)]
    choice[center] = torch.arange(num_clusters, device=units.device)
    return choice, center


def cluster_dpc_knn(
    x: Tensor, num_clusters: Tensor, k: int, cu_seqlens: Tensor | None, num_center: int
) -> tuple[Tensor, Tensor]:
    """Per segment: assignment ``[N]`` and packed centre indices by rank."""
    spans = bounds(cu_seqlens, x.shape[0])
    assignment = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    centers = []
    counts = num_clusters.tolist()
    if len(counts) == 1:
        counts = counts * len(spans)
    for (lo, hi), count in zip(spans, counts):
        if not 0 <= count <= hi - lo:
            raise ValueError(f"expected num_clusters between 0 and the segment's {hi - lo} tokens, got {count}")
        units, q = squared_distance_units(x[lo:hi])
        assignment[lo:hi], center = decide(units, q, count, k)
        centers.append(center + lo)
    return assignment, torch.cat(centers) if centers else assignment.new_empty(0)
