"""Compiled position_remap."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def position_remap(anchor: Tensor, tensors: list[Tensor], fill: list[float]) -> Any:
    """See :func:`vidtok.kernels.reference.position_remap.position_remap`."""
    return NotImplemented
