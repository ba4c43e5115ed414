"""Compiled cluster_dpc_knn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads, pointer

# Bytes a call may use for distances and packed tokens; a segment whose distances do not fit is
# swept block by block, once for each pass over the distances.
WORKSPACE = 64 << 20


def cluster_dpc_knn(x: Tensor, num_clusters: Tensor, k: int, cu_seqlens: Tensor | None, num_center: int) -> Any:
    """See :func:`vidtok.kernels.reference.cluster_dpc_knn.cluster_dpc_knn`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    counts = num_clusters.shape[0]
    if num_center < 0:
        num_center = int(num_clusters.sum()) * (segments if counts == 1 else 1)
        if num_center < 0:
            return NotImplemented
    assignment = x.new_empty(n, dtype=torch.int64)
    center = x.new_empty(num_center, dtype=torch.int64)
    status = extension().cluster_dpc_knn(
        x.data_ptr(), dtype, n, c, x.stride(0), pointer(cu_seqlens), segments, pointer(num_clusters), counts, k,
        pointer(assignment), pointer(center), WORKSPACE, num_threads(),
    )  # fmt: skip
    if status:
        check(status, "cluster_dpc_knn")
    return assignment, center
