"""Weighted gather-reduce of tokens by a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import plan_apply as native
from vidtok.kernels.reference import plan_apply as reference
from vidtok.ops._library import define, needs_grad
from vidtok.plan import Plan

_LISTS = "Tensor anchor, Tensor? member, Tensor? offset, Tensor? weight"


def _fake(x: Tensor, anchor: Tensor, member: Any, offset: Any, weight: Any) -> Tensor:
    return x.new_empty(anchor.shape[0], x.shape[1])


def _fake_backward(grad: Tensor, anchor: Tensor, member: Any, offset: Any, weight: Any, num_in: int) -> Tensor:
    return grad.new_empty(num_in, grad.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *lists = inputs
    ctx.num_in = x.shape[0]
    ctx.save_for_backward(*lists)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _op_backward(grad.contiguous(), *ctx.saved_tensors, ctx.num_in), None, None, None, None


_op = define("plan_apply", f"(Tensor x, {_LISTS}) -> Tensor", reference.plan_apply, _fake, native.plan_apply)
_op_backward = define(
    "plan_apply_backward",
    f"(Tensor grad, {_LISTS}, SymInt num_in) -> Tensor",
    reference.plan_apply_backward,
    _fake_backward,
    native.plan_apply_backward,
)
_op_grad = define(
    "plan_apply_grad",
    f"(Tensor x, {_LISTS}) -> Tensor",
    reference.plan_apply,
    _fake,
    native.plan_apply,
    setup_context=_setup,
    backward=_backward,
)


def plan_apply(plan: Plan, x: Tensor) -> Tensor:
    r"""Move tokens by a plan: :math:`y_m = \sum_{j \in m} weight_j\, x_{member_j}`.

    Sums are taken in fp32; an output of one member is a bit-exact copy; left padding gives zeros.
    Carries gradients to ``x``.

    Args:
        plan: over ``N`` packed input tokens and ``M`` outputs.
        x: ``[N, C]``, or ``[B, T, C]`` when every sequence of the plan has ``T`` tokens in and the
            same number out. fp32, bf16 or fp16; a contiguous last dimension is enough, anything
            else is copied once.

    Returns:
        ``[M, C]`` or ``[B, T', C]``, in the dtype of ``x``.

    Raises:
        ValueError: the shape does not fit the plan.
        IndexError: the plan points outside its input.

    Example:
        >>> import torch, vidtok
        >>> plan = vidtok.Plan.identity([3])
        >>> vidtok.ops.plan_apply(plan, torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    shape = x.shape
    op = _op_grad if needs_grad(x) else _op
    if len(shape) == 2:
        if shape[0] != plan.num_in:
            _check.fail(f"x of shape [{plan.num_in}, C]", str(list(shape)))
        return op(
            x if x.stride(1) == 1 else x.contiguous(), plan.anchor, plan.csr_member, plan.csr_offset, plan.csr_weight
        )
    _check.float_tensor(x, "x", "[N, C] or [B, T, C]")
    length_out = _dense_length(plan, shape)
    y = op(x.reshape(-1, shape[2]), plan.anchor, plan.csr_member, plan.csr_offset, plan.csr_weight)
    return y.view(shape[0], length_out, shape[2])


def _dense_length(plan: Plan, shape: torch.Size) -> int:
    """Common output length of a dense batch."""
    batch = plan.num_sequences
    if plan.length_in is not None:
        if shape[0] != batch or shape[1] != plan.length_in:
            _check.fail(f"x of shape [{batch}, {plan.length_in}, C]", str(list(shape)))
    elif shape[0] != batch or shape[0] * shape[1] != plan.num_in:
        _check.fail(f"x packed as [{plan.num_in}, C], since the plan's sequences differ in length", str(list(shape)))
    if plan.length_out is not None:
        return plan.length_out
    if not torch.compiler.is_compiling():
        lengths = set(plan.lengths_out())
        if len(lengths) == 1:
            return int(lengths.pop())
    raise ValueError(
        "expected equal output counts in every sequence for x of shape [B, T, C], got differing ones; "
        f"pass x packed as [{plan.num_in}, C]"
    )
