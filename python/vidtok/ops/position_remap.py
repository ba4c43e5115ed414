"""Carry per-token tensors along with a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import position_remap as native
from vidtok.kernels.reference import position_remap as reference
from vidtok.ops._library import define, needs_grad
from vidtok.plan import Plan


def _fake(anchor: Tensor, tensors: list[Tensor], fill: Any) -> list[Tensor]:
    return [t.new_empty(t.shape[0], anchor.shape[0], t.shape[2]) for t in tensors]


_op = define(
    "position_remap",
    "(Tensor anchor, Tensor[] tensors, float[] fill) -> Tensor[]",
    reference.position_remap,
    _fake,
    native.position_remap,
)


def position_remap(
    plan: Plan, *tensors: Tensor, dim: int | Sequence[int] = -1, fill: float | Sequence[float] = 0
) -> tuple[Tensor, ...]:
    """Take the anchors' entries of any number of per-token tensors, in one call.

    ``y[..., m, ...] = x[..., anchor[m], ...]`` along ``dim``; exact for every dtype. A tensor with
    ``N`` entries along ``dim`` is packed; one whose last two dimensions up to ``dim`` are
    ``(B, T)`` of a plan over equally long sequences is dense and becomes ``(B, T')``.

    Args:
        plan: over ``N`` packed tokens.
        tensors: position ids ``[3, N]`` or ``[3, B, T]``, masks ``[B, T]``, labels, timestamps, embeddings …
        dim: the token dimension, one for all or one each.
        fill: value at left padding, one for all or one each (−100 for labels).

    Returns:
        One tensor each, in the same dtype. Gradients flow to tensors that require them.

    Raises:
        ValueError: a tensor without the plan's token count along its ``dim``.
        IndexError: the plan points outside its input.

    Example:
        >>> import torch, vidtok
        >>> plan = vidtok.Plan.identity([2])
        >>> vidtok.ops.position_remap(plan, torch.tensor([[5, 6]]))
        (tensor([[5, 6]]),)
    """
    dims = [dim] * len(tensors) if isinstance(dim, int) else list(dim)
    fills = [float(fill)] * len(tensors) if isinstance(fill, (int, float)) else [float(f) for f in fill]
    if len(dims) != len(tensors) or len(fills) != len(tensors):
        _check.fail(f"dim and fill for {len(tensors)} tensors", f"{len(dims)} and {len(fills)}")
    if not tensors:
        return ()
    views, shapes = [], []
    for t, d in zip(tensors, dims):
        view, shape = _as_rows(plan, t, d)
        views.append(view)
        shapes.append(shape)
    if any(needs_grad(t) for t in tensors):
        out = _differentiable(plan.anchor, views, fills)
    else:
        out = _op(plan.anchor, views, fills)
    return tuple(t.view(s) for t, s in zip(out, shapes))


def _as_rows(plan: Plan, t: Tensor, dim: int) -> tuple[Tensor, list[int]]:
    """``[outer, N, inner]`` view and the shape of the result."""
    shape = list(t.shape)
    if not -len(shape) <= dim < len(shape):
        _check.fail(f"dim inside a tensor of shape {shape}", str(dim))
    dim %= len(shape)
    b, t_in, t_out = plan.num_sequences, plan.length_in, plan.length_out
    dense = dim > 0 and t_in is not None and shape[dim] == t_in and shape[dim - 1] == b
    if dense and (b != 1 or shape[dim] != plan.num_in or shape[dim - 1] == 1):
        if t_out is None:
            raise ValueError(
                f"expected equal output counts in every sequence for a tensor of shape {shape}, got differing ones"
            )
        first, target = dim - 1, [b, t_out]
    elif shape[dim] == plan.num_in:
        first, target = dim, [plan.num_out]
    else:
        expected = f"{plan.num_in} entries along dim {dim}"
        if t_in is not None:
            expected += f", or ({b}, {t_in}) ending there"
        _check.fail(expected, f"shape {shape}")
    inner = 1
    for size in shape[dim + 1 :]:
        inner *= size
    outer = 1
    for size in shape[:first]:
        outer *= size
    rows = t if t.is_contiguous() else t.contiguous()
    return rows.view(outer, plan.num_in, inner), [*shape[:first], *target, *shape[dim + 1 :]]


def _differentiable(anchor: Tensor, views: list[Tensor], fills: list[float]) -> list[Tensor]:
    index, pad = anchor.long().clamp(min=0), (anchor < 0)[None, :, None]
    return [v.index_select(1, index).masked_fill(pad, f) if v.shape[1] else _empty(v, anchor, f)
            for v, f in zip(views, fills)]  # fmt: skip


def _empty(view: Tensor, anchor: Tensor, fill: float) -> Tensor:
    return view.new_full((view.shape[0], anchor.shape[0], view.shape[2]), fill)
