"""Compiled bipartite_match and bipartite_merge."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def bipartite_match(
    metric: Tensor, r: int, size: Tensor | None, protected: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_match`."""
    return NotImplemented


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    protected: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_merge`."""
    return NotImplemented
