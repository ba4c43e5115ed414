"""Density-peak clustering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import cluster_dpc_knn as native
from vidtok.kernels.reference import cluster_dpc_knn as reference
from vidtok.ops._library import define, dynamic_size


class Clusters(NamedTuple):
    """``assignment`` int64 ``[N]``: rank of the token's centre in its segment; ``center`` int64 ``[ΣK]`` by rank."""

    assignment: Tensor
    center: Tensor


def _fake(x: Tensor, num_clusters: Tensor, k: Any, cu_seqlens: Any, num_center: Any) -> tuple[Tensor, Tensor]:
    size = num_center if isinstance(num_center, torch.SymInt) or num_center >= 0 else dynamic_size()
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(size, dtype=torch.int64)


_op = define(
    "cluster_dpc_knn",
    "(Tensor x, Tensor num_clusters, SymInt k, Tensor? cu_seqlens, SymInt num_center) -> (Tensor, Tensor)",
    reference.cluster_dpc_knn,
    _fake,
    native.cluster_dpc_knn,
)


def cluster_dpc_knn(
    x: Tensor, num_clusters: int | Tensor | Sequence[int], *, k: int, cu_seqlens: Tensor | None = None
) -> Clusters:
    r"""Cluster the tokens of each segment around density peaks.

    :math:`d_{ij} = \|x_i - x_j\|_2/\sqrt C`; density :math:`\rho_i = \exp(-\frac1k \sum d^2)` over the k
    smallest, self included; :math:`\delta_i` = distance to the nearest token of higher density (ρ
    descending, index ascending; the segment's largest distance for the peak); centres are the
    highest ρ·δ; every token joins the nearest centre (lowest token index on a tie), a centre
    itself. Squared distances are rounded to 2⁻²⁰ of the power of two at or above the segment's
    largest ‖x‖²/C and densities to 2⁻²⁰, so that equal tokens tie and the index decides. A
    distance that is not finite counts as the largest.

    Args:
        x: ``[N, C]`` packed tokens. fp32, bf16 or fp16. Detached.
        num_clusters: centres per segment, one number or int64 ``[S]``; at most the segment's tokens.
            With 0 every assignment is −1.
        k: neighbours, at least 1; clamped to the segment.
        cu_seqlens: int32 ``[S+1]``; one segment when None.

    Returns:
        ``Clusters(assignment, center)``, centres as packed indices.

    Raises:
        ValueError: ``num_clusters`` or ``k`` outside their range, or shapes that do not fit.

    Source: Rodriguez and Laio, Science 2014; the k-nearest form of Du, Ding and Jia 2016.

    Example:
        >>> import torch, vidtok
        >>> vidtok.ops.cluster_dpc_knn(torch.tensor([[0.0], [0.1], [1.0], [1.1]]), 2, k=2).assignment
        tensor([0, 0, 1, 1])
    """
    _check.float_tensor(x, "x", "[N, C]")
    if k < 1:
        _check.fail("k of at least 1", str(k))
    segments = 1
    if cu_seqlens is not None:
        cu_seqlens = _check.cu_seqlens(cu_seqlens, x.shape[0])
        segments = cu_seqlens.shape[0] - 1
    num_center: int = -1
    if isinstance(num_clusters, int):
        num_center = num_clusters * segments
        counts = torch.tensor([num_clusters], dtype=torch.int64, device="cpu")
    else:
        counts = torch.as_tensor(num_clusters, dtype=torch.int64, device="cpu").contiguous()
        if counts.dim() != 1 or counts.shape[0] != segments:
            _check.fail(f"num_clusters as one number or one for each of {segments} segments", str(list(counts.shape)))
        if not torch.compiler.is_compiling():
            num_center = int(counts.sum())
    return Clusters(*_op(_check.decided_from(x), counts, k, cu_seqlens, num_center))
