"""Frames nearest a contour of equal Mahalanobis distance, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def eager(x: Tensor, basis: Tensor, num: int) -> Tensor:
    """One frame of each of ``num`` time segments, the one nearest the median contour; fp64 as the operator."""
    total, r = x.shape[0], basis.shape[1]
    z = x.double() @ basis
    centred = z - z.mean(0)
    covariance = centred.T @ centred / total
    shrunk = 0.9 * covariance + 0.1 * covariance.trace() / r * torch.eye(r, dtype=torch.float64)
    factor = torch.linalg.cholesky(shrunk)
    distance = torch.linalg.solve_triangular(factor, centred.T, upper=False).square().sum(0)
    gap = (distance - distance.median()).abs()
    parts = [(s * total // num, (s + 1) * total // num) for s in range(num)]
    return torch.stack([gap[a:b].argmin() + a for a, b in parts])
