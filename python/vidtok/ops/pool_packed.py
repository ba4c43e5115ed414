"""Adaptive average pooling of packed grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import pool_packed as native
from vidtok.kernels.reference import pool_packed as reference
from vidtok.ops import _grid
from vidtok.ops._library import define, dynamic_size, needs_grad


class Pooled(NamedTuple):
    """Pooled tokens ``x`` ``[M, C]`` and their ``grid_thw`` int64 ``[V, 3]``."""

    x: Tensor
    grid_thw: Tensor


def _fake(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_out: Any) -> Tensor:
    size = num_out if isinstance(num_out, torch.SymInt) or num_out >= 0 else dynamic_size()
    return x.new_empty(size, x.shape[1])


def _fake_backward(grad: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: Any) -> Tensor:
    return grad.new_empty(num_in, grad.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grid_in, grid_out, _ = inputs
    ctx.num_in = x.shape[0]
    ctx.save_for_backward(grid_in, grid_out)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _op_backward(grad.contiguous(), *ctx.saved_tensors, ctx.num_in), None, None, None


_SCHEMA = "(Tensor x, Tensor grid_in, Tensor grid_out, SymInt num_out) -> Tensor"
_op = define("pool_packed", _SCHEMA, reference.pool_packed, _fake, native.pool_packed)
_op_backward = define(
    "pool_packed_backward",
    "(Tensor grad, Tensor grid_in, Tensor grid_out, SymInt num_in) -> Tensor",
    reference.pool_packed_backward,
    _fake_backward,
    native.pool_packed_backward,
)
_op_grad = define(
    "pool_packed_grad",
    _SCHEMA,
    reference.pool_packed,
    _fake,
    native.pool_packed,
    setup_context=_setup,
    backward=_backward,
)


def target_side(side: int, level: float) -> int:
    """Side after pooling at ``level``: 1 if side/level < 1, else half-even rounding of side/level."""
    quotient = side / level
    return 1 if quotient < 1 else round(quotient)


def pool_packed(
    x: Tensor,
    grid_thw: _grid.GridLike,
    *,
    level: float | None = None,
    out_hw: tuple[int, int] | None = None,
) -> Pooled:
    r"""Average-pool each (height, width) map of packed grids of unequal sizes, all in one call.

    Output (i, j) is the mean over rows :math:`[\lfloor i h/h' \rfloor, \lceil (i+1) h/h' \rceil)` and
    columns likewise, as ``adaptive_avg_pool2d`` does: windows overlap where the side does not divide.
    Sums are taken in fp32. ``level=1`` returns the tokens bit for bit. Carries gradients to ``x``.

    Args:
        x: ``[N, C]`` packed tokens. fp32, bf16 or fp16.
        grid_thw: ``[V, 3]`` tokens per video as (frames, height, width).
        level: at least 1; a side becomes 1 if side/level < 1, else side/level rounded half to even.
        out_hw: the target (height, width) instead, at most the side of every grid.

    Returns:
        ``Pooled(x [M, C], grid_thw int64 [V, 3])``.

    Raises:
        ValueError: both or neither of ``level`` and ``out_hw``, a level below 1, grids that do not fit.

    Example:
        >>> import torch, vidtok
        >>> vidtok.ops.pool_packed(torch.ones(16, 8), [(1, 4, 4)], level=2).grid_thw
        tensor([[1, 2, 2]])
    """
    _check.float_tensor(x, "x", "[N, C]")
    if (level is None) == (out_hw is None):
        _check.fail("either level or out_hw", f"level={level}, out_hw={out_hw}")
    if level is not None and not level >= 1:
        _check.fail("level of at least 1", str(level))
    if out_hw is not None and (len(out_hw) != 2 or min(out_hw) < 1):
        _check.fail("out_hw as (height, width) of at least 1", str(out_hw))
    grid = _grid.as_tensor(grid_thw)
    num_out: int = -1
    if torch.compiler.is_compiling():
        grid_out = _traced_target(grid, level, out_hw)
    else:
        rows = _grid.rows(grid)
        _grid.check_total(rows, x.shape[0])
        out = [[t, *_target(h, w, level, out_hw)] for t, h, w in rows]
        num_out = sum(t * h * w for t, h, w in out)
        grid_out = torch.tensor(out, dtype=torch.int64, device="cpu").reshape(-1, 3)
    op = _op_grad if needs_grad(x) else _op
    return Pooled(op(_check.contiguous(x), grid, grid_out, num_out), grid_out)


def _target(h: int, w: int, level: float | None, out_hw: tuple[int, int] | None) -> tuple[int, int]:
    if h == 0 or w == 0:
        return h, w
    if level is not None:
        return target_side(h, level), target_side(w, level)
    assert out_hw is not None
    if out_hw[0] > h or out_hw[1] > w:
        _check.fail(f"out_hw within the grid ({h}, {w})", str(out_hw))
    return out_hw


def _traced_target(grid: Tensor, level: float | None, out_hw: tuple[int, int] | None) -> Tensor:
    if level is not None:
        quotient = grid[:, 1:].double() / level
        side = torch.where(quotient < 1, 1, torch.round(quotient).long())
    else:
        side = torch.tensor(out_hw, dtype=torch.int64, device="cpu").expand(grid.shape[0], 2)
    side = torch.where((grid[:, 1:] == 0).any(1, keepdim=True), grid[:, 1:], side)
    return torch.cat([grid[:, :1], side], 1)
