"""Compiled contour_select."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def contour_select(
    x: Tensor, num: list[int], query: Tensor | None, max_rank: int, rule: int, seed: int, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.contour_select.contour_select`."""
    return NotImplemented
