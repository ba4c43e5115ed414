"""Carry per-token tensors along with a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import position_remap as native
from vidtok.kernels.reference import position_remap as reference
from vidtok.ops._library import define
from vidtok.plan import Plan


def _fake(anchor: Tensor, tensors: list[Tensor], dims: Any, dense: Any, length: Any, fill: Any) -> list[Tensor]:
    m = anchor.shape[0]
    return [t.new_empty(reference.result_shape(t.shape, d, e, m, length)) for t, d, e in zip(tensors, dims, dense)]


_op = define(
    "position_remap",
    "(Tensor anchor, Tensor[] tensors, int[] dims, int[] dense, SymInt length, float[] fill) -> Tensor[]",
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
    count = len(tensors)
    dims = [dim] * count if isinstance(dim, int) else list(dim)
    fills = [float(fill)] * count if isinstance(fill, (int, float)) else [float(f) for f in fill]
    if len(dims) != count or len(fills) != count:
        _check.fail(f"dim and fill for {count} tensors", f"{len(dims)} and {len(fills)}")
    if not count:
        return ()
    dense, inputs, differentiable = [0] * count, list(tensors), False
    for i, t in enumerate(tensors):
        dims[i], dense[i] = _place(plan, t.shape, dims[i])
        if not t.is_contiguous():
            inputs[i] = t.contiguous()
        if t.requires_grad:
            differentiable = True
    length = 0 if plan.length_out is None else plan.length_out
    if differentiable and torch.is_grad_enabled():
        return tuple(reference.remap_one(plan.anchor, *args, length) for args in zip(inputs, dims, dense, fills))
    return tuple(_op(plan.anchor, inputs, dims, dense, length, fills))


def _place(plan: Plan, shape: torch.Size, dim: int) -> tuple[int, int]:
    """The token dimension counted from 0, and 1 when it and the one before it are a dense batch."""
    rank = len(shape)
    if not -rank <= dim < rank:
        _check.fail(f"dim inside a tensor of shape {list(shape)}", str(dim))
    if dim < 0:
        dim += rank
    size, length = shape[dim], plan.length_in
    if length is not None and dim > 0 and size == length and shape[dim - 1] == plan.num_sequences:
        if plan.length_out is None:
            raise ValueError(
                f"expected equal output counts in every sequence for a tensor of {list(shape)}, got differing ones"
            )
        return dim, 1
    if size != plan.num_in:
        expected = f"{plan.num_in} entries along dim {dim}"
        if length is not None:
            expected += f", or ({plan.num_sequences}, {length}) ending there"
        _check.fail(expected, f"shape {list(shape)}")
    return dim, 0
