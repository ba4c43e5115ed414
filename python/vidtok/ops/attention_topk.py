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

    index: Tensor
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
    num_index = num_score = -1
    if not isinstance(span, Tensor):
        spans = [[int(v) for v in row] for row in span]
        if any(len(row) != 3 for row in spans):
            _check.fail("span as rows (row, start, stop)", str(spans))
        num_score = sum(hi - lo for _, lo, hi in spans)
        span_tensor = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
    else:
        if span.dim() != 2 or span.shape[1] != 3 or span.is_floating_point():
            _check.fail("span of integers [S, 3]", span)
        span_tensor = span.to(device="cpu", dtype=torch.int64).contiguous()
        if not torch.compiler.is_compiling():
            num_score = int((span_tensor[:, 2] - span_tensor[:, 1]).sum())
    segments = span_tensor.shape[0]
    groups: int | None = segments
    group_tensor = None
    if group is not None:
        groups = None if isinstance(group, Tensor) and torch.compiler.is_compiling() else -1
        group_tensor = torch.as_tensor(group, dtype=torch.int64).cpu().contiguous()
        if tuple(group_tensor.shape) != (segments,):
            _check.fail(f"group of integers [{segments}]", str(list(group_tensor.shape)))
        if groups == -1:
            groups = len(set(group if not isinstance(group, Tensor) else group_tensor.tolist()))
    if len(budgets) > 1 or (groups is not None and len(budgets) == groups):
        num_index = sum(budgets)
    elif groups is not None and len(budgets) == 1:
        num_index = budgets[0] * groups
    return Selected(
        *_op(
            _check.decided_from(query), _keys(key.detach() if key.requires_grad else key), budgets, span_tensor, group_tensor,
            d**-0.5 if scale is None else float(scale), mask, query_position, reduce == "max", num_index, num_score,
        )
    )  # fmt: skip


def _keys(key: Tensor) -> Tensor:
    """Keys with a contiguous last dimension; the heads and tokens may be strided, as in a cache."""
    return key if key.stride(-1) == 1 else key.contiguous()
