"""Compiled cluster_dpc_knn."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def cluster_dpc_knn(x: Tensor, num_clusters: Tensor, k: int, cu_seqlens: Tensor | None, num_center: int) -> Any:
    """See :func:`vidtok.kernels.reference.cluster_dpc_knn.cluster_dpc_knn`."""
    return NotImplemented
