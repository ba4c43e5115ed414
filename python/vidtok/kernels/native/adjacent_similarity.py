"""Compiled adjacent_similarity."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def adjacent_similarity(
    x: Tensor,
    grid: Tensor,
    mode: int,
    window: Tensor | None,
    center: Tensor | None,
    cu_seqlens: Tensor | None,
    num_out: int,
) -> Any:
    """See :func:`vidtok.kernels.reference.adjacent_similarity.adjacent_similarity`."""
    return NotImplemented
