"""Exact selection of the best tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import topk_select as native
from vidtok.kernels.reference import topk_select as reference
from vidtok.ops._library import define

# Offsets are int32.
_MOST = 2**31 - 1


def _fake(score: Tensor, keep: Any, cu_seqlens: Tensor | None) -> Tensor:
    segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = keep[0] * segments if len(keep) == 1 else sum(keep)
    return score.new_empty(size, dtype=torch.int64)


_op = define(
    "topk_select",
    "(Tensor score, SymInt[] keep, Tensor? cu_seqlens) -> Tensor",
    reference.topk_select,
    _fake,
    native.topk_select,
)


def topk_select(score: Tensor, keep: int | Sequence[int], *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Indices of the ``keep`` highest scores, ascending; exact and without a full sort.

    Order: score descending, then index ascending; +inf first, −inf after every finite score, NaN last.

    Args:
        score: ``[N]``, or ``[B, N]`` for one selection per row. fp32, bf16 or fp16. Detached.
        keep: how many, one number or one per segment; at most the segment's tokens.
        cu_seqlens: int32 ``[S+1]`` offsets of the segments of a packed ``[N]``.

    Returns:
        int64 ``[Σ keep]`` packed indices, ascending inside each segment; ``[B, keep]`` positions
        within the row for ``[B, N]``.

    Raises:
        ValueError: ``keep`` outside 0 … the segment's tokens, or a shape that does not fit.

    Example:
        >>> import torch, vidtok
        >>> vidtok.ops.topk_select(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
        tensor([1, 2])
    """
    _check.float_tensor(score, "score", "[N] or [B, N]")
    if score.dim() == 2:
        return _rows(score, keep, cu_seqlens)
    n = score.shape[0]
    budgets = [keep] if isinstance(keep, (int, torch.SymInt)) else list(keep)
    if cu_seqlens is None:
        if len(budgets) != 1:
            _check.fail("one keep without cu_seqlens", str(budgets))
        if not 0 <= budgets[0] <= n:
            _check.fail(f"keep between 0 and {n}", str(budgets[0]))
    else:
        cu_seqlens = _check.cu_seqlens(cu_seqlens, n)
        if len(budgets) not in (1, cu_seqlens.shape[0] - 1):
            _check.fail(f"one keep or one for each of {cu_seqlens.shape[0] - 1} segments", f"{len(budgets)}")
    return _op(_check.decided_from(score), budgets, cu_seqlens)


def _rows(score: Tensor, keep: int | Sequence[int], cu_seqlens: Tensor | None) -> Tensor:
    batch, n = score.shape
    if cu_seqlens is not None or not isinstance(keep, (int, torch.SymInt)):
        _check.fail("one keep and no cu_seqlens for score of shape [B, N]", f"keep={keep}")
    if not 0 <= keep <= n:
        _check.fail(f"keep between 0 and {n}", str(keep))
    if not torch.compiler.is_compiling() and batch * n > _MOST:
        return torch.stack([_op(row.contiguous(), [keep], None) for row in score.detach()])
    start = torch.arange(batch + 1, dtype=torch.int32, device=score.device) * n
    index = _op(score.detach().reshape(-1), [keep], start).view(batch, keep)
    return index - start[:-1].long().unsqueeze(1)
