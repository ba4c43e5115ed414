"""CUDA cluster_dpc_knn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, check, device_list, extension, launch, pointer, workspace

# Bytes that a call may use for distances. Segments that do not fit together take turns; one that does not fit at all
# is swept anew for each pass over its distances.
WORKSPACE = 64 << 20


def _choice(x: Tensor, segments: int, longest: int, sm: int) -> tuple[int, int, int]:
    shape = {"segments": segments, "longest": longest, "channels": x.shape[1]}
    knobs = tables.choose("cuda", "cluster_dpc_knn", sm, DTYPE_NAME[x.dtype], shape)
    return knobs["tile"], knobs["warps"], knobs["stages"]


def _known(cu_seqlens: Tensor | None) -> Tensor | None:
    """Offsets that the host can read without waiting."""
    return None if cu_seqlens is None or cu_seqlens.is_cuda else cu_seqlens


def cluster_dpc_knn(x: Tensor, num_clusters: Tensor, k: int, cu_seqlens: Tensor | None, num_center: int) -> Any:
    """See :func:`vidtok.kernels.reference.cluster_dpc_knn.cluster_dpc_knn`."""
    dtype = DTYPE_CODE.get(x.dtype)
    if dtype is None:
        return NotImplemented
    n, c = x.shape
    _check.below_2_31(n, "tokens")
    segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    counts = num_clusters.shape[0]
    if num_center < 0:
        num_center = int(num_clusters.sum()) * (segments if counts == 1 else 1)
        if num_center < 0:
            return NotImplemented
    # Offsets and counts that the host knows are checked here, others by the kernel.
    known = _known(cu_seqlens)
    longest = -(-n // max(segments, 1))
    if cu_seqlens is None or known is not None:
        offsets = [0, n] if known is None else known.tolist()
        lengths = [high - low for low, high in zip(offsets, offsets[1:])]
        longest = max(lengths, default=0)
        if not num_clusters.is_cuda:
            wanted = num_clusters.tolist()
            for length, count in zip(lengths, wanted * segments if counts == 1 else wanted):
                if not 0 <= count <= length:
                    raise ValueError(f"expected num_clusters between 0 and the segment's {length} tokens, got {count}")
        if known is not None and x.is_cuda:
            cu_seqlens = device_list(offsets, x, torch.int32)
    if x.is_cuda and not num_clusters.is_cuda:
        num_clusters = device_list(num_clusters.tolist(), x)
    if x.stride(1) != 1:
        x = x.contiguous()
    assignment = x.new_empty(n, dtype=torch.int64)
    center = x.new_empty(num_center, dtype=torch.int64)
    ext = extension()
    scratch = workspace(
        x, ext.cluster_dpc_knn_workspace(n, pointer(cu_seqlens), segments, WORKSPACE, pointer(known), num_center)
    )
    on = launch(x)
    status = ext.cluster_dpc_knn(
        x.data_ptr(), dtype, n, c, x.stride(0), pointer(cu_seqlens), segments, pointer(num_clusters), counts, k,
        pointer(assignment), pointer(center), WORKSPACE, pointer(known), num_center, pointer(scratch),
        *_choice(x, segments, longest, on.sm), *on,
    )  # fmt: skip
    check(status, "cluster_dpc_knn", x)
    return assignment, center
