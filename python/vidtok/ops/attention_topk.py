"""Attention importance of visual tokens and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import attention_topk as native
from vidtok.kernels.reference import attention_topk as reference
from vidtok.kernels.reference._numerics import accumulate_dtype
from vidtok.ops._library import define, dynamic_size


class Selected(NamedTuple):
    """``index`` int64: chosen positions in their row; ``score`` fp32: every span token, in span order."""

    index: Tensor  # type: ignore[assignment]
    score: Tensor


def _fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    num_index, num_score = rest[-2:]
    sizes = [s if isinstance(s, torch.SymInt) or s >= 0 else dynamic_size() for s in (num_index, num_score)]
    return key.new_empty(sizes[0], dtype=torch.int64), key.new_empty(sizes[1], dtype=accumulate_dtype(key.dtype))


_op = define(
    "attention_topk",
    "(Tensor query, Tensor key, SymInt[] keep, Tensor span, Tensor? group, float scale, Tensor? mask, "
    "Tensor? query_position, bool use_max, SymInt num_index, SymInt num_score) -> (Tensor, Tensor)",
    reference.attention_topk,
    _fake,
    native.attention_topk,
)


def attention_topk(
    query: Tensor,
    key: Tensor,
    keep: int | Sequence[int],
    *,
    span: Tensor | Sequence[Sequence[int]],
    group: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_position: Tensor | None = None,
    reduce: Literal["mean", "max"] = "mean",
) -> Selected:
    r"""Score visual tokens by the attention of a few query rows, and select the best of each group.

    :math:`s_l = \mathrm{reduce}_{h,w}\ \mathrm{softmax}_{l'}(scale \cdot q_{h,w} \cdot k_{g(h),l'})_l`
    over all visible keys in fp32, then rounded to 16 significant bits. Never holds L×L. Not differentiable.

    Args:
        query: ``[B, Hq, W, D]``; any W.
        key: ``[B, Hkv, L, D]``, Hq a multiple of Hkv. fp32, bf16 or fp16, the dtype of ``query``.
        keep: how many per group, one number or one each; at most the group's tokens.
        span: int ``[S, 3]`` = (row, start, stop) of visual tokens.
        group: int ``[S]``; spans with equal number share one budget and must ascend in one row.
            Every span its own group when None.
        scale: 1/√D when None.
        mask: bool ``[B, L]``, True where a key may be seen.
        query_position: int ``[B, W]``; row w sees keys at or before it; −1 marks an unused row. None: all keys.
        reduce: ``mean`` or ``max`` over heads and used rows.

    Returns:
        ``Selected(index, score)``: index ascends inside a group, groups in order of first appearance.

    Raises:
        ValueError, IndexError: shapes, spans or budgets that do not fit.

    Example:
        >>> import torch, vidtok
        >>> q, k = torch.ones(1, 2, 1, 4), torch.eye(4)[None, None] * torch.arange(4.0)
        >>> vidtok.ops.attention_topk(q, k, 2, span=[(0, 0, 4)]).index
        tensor([2, 3])
    """
    _check.float_tensor(query, "query", "[B, Hq, W, D]")
    _check.float_tensor(key, "key", "[B, Hkv, L, D]")
    (b, hq, w, d), (kb, hkv, length, kd) = query.shape, key.shape
    if kb != b or kd != d or hkv == 0 or hq % hkv or query.dtype != key.dtype:
        _check.fail(
            f"key of shape [{b}, Hkv, L, {d}] in {query.dtype} with Hkv dividing {hq}", f"{key.dtype} {list(key.shape)}"
        )
    if reduce not in ("mean", "max"):
        _check.fail("reduce among mean, max", repr(reduce))
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (b, length)):
        _check.fail(f"mask of bool [{b}, {length}]", mask)
    if query_position is not None:
        if query_position.is_floating_point() or tuple(query_position.shape) != (b, w):
            _check.fail(f"query_position of integers [{b}, {w}]", query_position)
        query_position = query_position.to(torch.int64).contiguous()
    budgets = [keep] if isinstance(keep, (int, torch.SymInt)) else list(keep)
    spans, num_score = _spans(span)
    groups, count = _groups(group, spans.shape[0])
    num_index = -1
    if len(budgets) > 1 or len(budgets) == count:
        num_index = sum(budgets)
    elif count is not None and budgets:
        num_index = budgets[0] * count
    scale = max(d, 1) ** -0.5 if scale is None else float(scale)
    query, key, use_max = _check.decided_from(query), _keys(key), reduce == "max"
    return Selected(
        *_op(query, key, budgets, spans, groups, scale, mask, query_position, use_max, num_index, num_score)
    )


def _spans(span: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """``[S, 3]`` on the CPU, and the tokens they hold; −1 where traced code cannot know."""
    if isinstance(span, Tensor):
        if span.dim() != 2 or span.shape[1] != 3 or span.is_floating_point():
            _check.fail("span of integers [S, 3]", span)
        spans = span.to(device="cpu", dtype=torch.int64).contiguous()
        return spans, -1 if torch.compiler.is_compiling() else sum(hi - lo for _, lo, hi in spans.tolist())
    total = 0
    for row in span:
        if len(row) != 3:
            _check.fail("span as rows (row, start, stop)", str(span))
        total += row[2] - row[1]
    return torch.tensor(span, dtype=torch.int64, device="cpu").reshape(-1, 3), total


def _groups(group: Tensor | Sequence[int] | None, spans: int) -> tuple[Tensor | None, int | None]:
    """int64 ``[S]`` on the CPU, and how many groups there are; None where traced code cannot know."""
    if group is None:
        return None, spans
    numbers = torch.as_tensor(group, dtype=torch.int64, device="cpu").contiguous()
    if tuple(numbers.shape) != (spans,):
        _check.fail(f"group of integers [{spans}]", str(list(numbers.shape)))
    if isinstance(group, Tensor):
        return numbers, None if torch.compiler.is_compiling() else len(set(numbers.tolist()))
    return numbers, len(set(group))


def _keys(key: Tensor) -> Tensor:
    """Keys with a contiguous last dimension; the heads and tokens may be strided, as in a cache."""
    if key.requires_grad:
        key = key.detach()
    return key if key.stride(-1) == 1 else key.contiguous()
