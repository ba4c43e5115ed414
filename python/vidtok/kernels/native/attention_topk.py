"""Compiled attention_topk."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def attention_topk(
    query: Tensor,
    key: Tensor,
    keep: list[int],
    span: Tensor,
    group: Tensor | None,
    scale: float,
    mask: Tensor | None,
    query_position: Tensor | None,
    use_max: bool,
    num_index: int,
    num_score: int,
) -> Any:
    """See :func:`vidtok.kernels.reference.attention_topk.attention_topk`."""
    return NotImplemented
