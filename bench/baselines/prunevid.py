"""PruneVid (arXiv 2412.16117), stage 1, from its formulas: eager torch, window by window and frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines.cluster_dpc_knn import eager as dpc_knn
from bench.baselines.cluster_dpc_knn import one_hot_mean
from vidtok.methods.prunevid import refine


def _merge(x: Tensor, ratio: float, k: int) -> Tensor:
    """Cluster means of ``[1, n, C]``; up to 14 tokens stay."""
    n = x.shape[1]
    if n <= 14:
        return x
    clusters = max(1, int(n * ratio))
    return one_hot_mean(x, dpc_knn(x, clusters, k)[0], clusters)


def eager(x: Tensor, tau: float, cluster_ratio: float, temporal_segment_ratio: float, k: int) -> Tensor:
    """Merged tokens ``[M, C]`` of one video ``[T, L, C]``, window after window, static ones first."""
    frames = x.shape[0]
    clusters = max(1, int(frames * temporal_segment_ratio))
    labels = dpc_knn(x.mean(1)[None], clusters, k)[0][0]
    out, start = [], 0
    for width in refine(labels.tolist()):
        part = x[start : start + width]
        start += width
        unit = functional.normalize(part, dim=-1).transpose(0, 1)
        pairs = unit @ unit.transpose(1, 2)
        static = (pairs.sum((1, 2)) - width) / (width * (width - 1)) > tau
        if bool(static.any()):
            out.append(_merge(part[:, static].mean(0)[None], cluster_ratio, k)[0])
        for frame in part:
            if not bool(static.all()):
                out.append(_merge(frame[~static][None], cluster_ratio, k)[0])
    return torch.cat(out)
