"""Frames nearest one contour of equal Mahalanobis distance."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vidtok.kernels.reference._numerics import bounds, inverse_norm, rank, round_bits

RULES = ("stratified", "contour", "contour+fps")
TEMPERATURE = 0.1
SHRINKAGE = 0.1
# Less variance than this share of the mean square is rounding: frames are equal.
LEAST_SPREAD = 2.0**-80


@lru_cache(maxsize=32)
def projection(channels: int, rank: int, seed: int) -> Tensor:
    """Orthonormal ``[C, r]`` fp64: Q of the QR decomposition of a seeded normal draw."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(channels, rank, dtype=torch.float64, generator=generator)).Q


def frame_weights(x: Tensor, query: Tensor | None) -> Tensor:
    """softmax(cos(x, query)/0.1) or uniform, fp64 ``[T]``; frames that are not finite get 0."""
    finite = torch.isfinite(x).all(1)
    logits = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    if query is not None:
        logits = (x @ query) * inverse_norm(x) * inverse_norm(query[None]) / TEMPERATURE
    logits = torch.where(finite, logits, -torch.inf)
    return torch.softmax(logits, 0) if bool(finite.any()) else torch.zeros_like(logits)


def distances(x: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """Squared Mahalanobis distance of each frame in the projected space, fp64 ``[T]``."""
    z = x @ basis.to(x.device)
    known = torch.where(torch.isfinite(z).all(1, keepdim=True), z, 0.0)
    mean = weights @ known
    centred = known - mean
    covariance = (centred * weights[:, None]).T @ centred
    r = basis.shape[1]
    trace = float(covariance.diagonal().sum())
    if not trace > LEAST_SPREAD * float(weights @ known.square().sum(1)):
        out = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    else:
        shrunk = (1 - SHRINKAGE) * covariance
        shrunk.diagonal().add_(SHRINKAGE * trace / r)
        factor = torch.linalg.cholesky(shrunk)
        out = torch.linalg.solve_triangular(factor, centred.T, upper=False).square().sum(0)
    return torch.where(torch.isfinite(z).all(1), out, torch.nan)


def pick(distance: Tensor, num: int, rule: str) -> Tensor:
    """Ascending frame indices of one video."""
    total = distance.shape[0]
    if num == 0:
        return torch.empty(0, dtype=torch.int64, device=distance.device)
    known = distance[~torch.isnan(distance)].sort().values
    contour = known[(known.shape[0] - 1) // 2] if known.shape[0] else distance.new_zeros(())
    closeness = -(distance - contour).abs()
    if rule == "stratified":
        parts = [(s * total // num, (s + 1) * total // num) for s in range(num)]
        return torch.stack([rank(closeness[a:b])[0] + a for a, b in parts])
    if rule == "contour":
        return rank(closeness)[:num].sort().values
    candidates = rank(closeness)[: min(2 * num, total)].tolist()
    chosen = [candidates[0]]
    while len(chosen) < num:
        rest = sorted(set(candidates) - set(chosen))
        chosen.append(max(rest, key=lambda c: (min(abs(c - s) for s in chosen), -c)))
    return torch.tensor(sorted(chosen), dtype=torch.int64, device=distance.device)


def contour_select(
    x: Tensor, num: list[int], query: Tensor | None, max_rank: int, rule: int, seed: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Packed indices and the distance of every frame."""
    spans = bounds(cu_seqlens, x.shape[0])
    budgets = num * len(spans) if len(num) == 1 else num
    indices, out = [], []
    for s, ((lo, hi), count) in enumerate(zip(spans, budgets)):
        if not 0 <= count <= hi - lo:
            raise ValueError(f"expected num between 0 and the sequence's {hi - lo} frames, got {count}")
        frames = x[lo:hi].double()
        r = min(max_rank, (hi - lo) // 4, x.shape[1])
        if r == 0:
            distance = torch.where(torch.isfinite(frames).all(1), 0.0, torch.nan).double()
        else:
            weights = frame_weights(frames, None if query is None else query[s].double())
            distance = distances(frames, weights, projection(x.shape[1], r, seed))
        distance = round_bits(distance)
        indices.append(pick(distance, count, RULES[rule]) + lo)
        out.append(distance)
    empty = torch.empty(0, dtype=torch.int64, device=x.device)
    return torch.cat([empty, *indices]), torch.cat([x.new_empty(0, dtype=torch.float64), *out]).float()
